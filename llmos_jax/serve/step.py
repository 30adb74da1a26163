"""A step: what the devices do at once. Plain data between scheduler, runner and engine. No jax."""

from dataclasses import dataclass, field

from llmos_jax.serve.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """`num_tokens` tokens of a sequence from position `start` on, the last `num_drafts` of them its drafts.

    The last `num_rows` tokens get logits: none where the chunk does not reach the last token, 1 + num_drafts where it
    does, all where logprobs of the prompt are asked.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_drafts: int
    num_rows: int


@dataclass(slots=True)
class Step:
    """The device does swap_out [(block, host block)], swap_in [(host block, block)], copies [(from, to)], then chunks."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
