"""What bounds a step and an answer: sizes, the price of a preemption, what may be asked, where an answer ends. No jax."""

from dataclasses import dataclass

from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.request import Request
from llmos_jax.serve.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """Of a step: `max_tokens` new tokens, `max_rows` of logits, `chunk` prompt tokens of one sequence (0: max_tokens).

    max_sequences run at once, each in a slot of its own; each has at most max_model_len tokens.
    """

    max_tokens: int
    max_rows: int
    max_sequences: int
    max_model_len: int
    chunk: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= min(self.max_tokens, self.max_rows):
            raise ValueError(
                f"max_tokens={self.max_tokens} and max_rows={self.max_rows} must be at least "
                f"max_sequences={self.max_sequences}, so that every running sequence gets a token in each step"
            )


@dataclass(frozen=True)
class Costs:
    """What decides whether a preempted sequence is computed again or swapped to the host and back."""

    prefill_tokens_per_second: float
    swap_bytes_per_second: float
    page_bytes: int

    def prefers_swap(self, num_tokens: int, num_blocks: int) -> bool:
        swap = 2 * num_blocks * self.page_bytes / self.swap_bytes_per_second
        return swap < num_tokens / self.prefill_tokens_per_second


def end_of(request: Request, limits: Limits) -> int:
    """How many tokens an answer has at most, its prompt's included."""
    answer = 0 if request.embed else request.sampling.max_tokens
    return min(len(request.prompt) + answer, limits.max_model_len)


def check_size(request: Request, limits: Limits, blocks: BlockManager) -> None:
    """Raises ValueError, one sentence, where its prompt and answer could never be held."""
    tokens = len(request.prompt)
    if not tokens:
        raise ValueError(f"request {request.id} has an empty prompt; give at least one token")
    if tokens + (not request.embed) > limits.max_model_len:
        raise ValueError(
            f"the prompt has {tokens} tokens, and with its answer at most {limits.max_model_len} fit; shorten it"
        )
    pages = blocks.blocks_for(max(tokens, end_of(request, limits) - 1))
    most = blocks.num_blocks if request.max_pages is None else min(request.max_pages, blocks.num_blocks)
    if pages > most:
        raise ValueError(
            f"the prompt and max_tokens need {pages} pages of {blocks.block_size} tokens, and at most {most} "
            "may be held; shorten the prompt or lower max_tokens"
        )


def finish_of(sequence: Sequence) -> str | None:
    """Why it is finished by its last token, if it is."""
    sampling = sequence.request.sampling
    num_output = len(sequence.tokens) - sequence.num_prompt
    if num_output > sampling.min_tokens and sequence.tokens[-1] in sampling.stop_ids:
        return "stop"
    if len(sequence.tokens) < sequence.end:
        return None
    return "length" if num_output or not (sequence.request.embed or sampling.prompt_logprobs is not None) else None
