"""What goes into an engine and what comes out: plain frozen data that crosses process borders. No jax."""

import time
from dataclasses import dataclass, field

Token = int


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like. kind: "json_schema", "json_object", "regex", "choice" or "lark".

    text: the schema or the choices (a list) as JSON, the expression, or the grammar.
    """

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn (names and meaning as in OpenAI's API and vLLM's extensions of it).

    temperature: 0 takes the likeliest token. top_k: 0 is off. seed: with the request's index it decides every draw,
    whatever else is in the batch. logit_bias: (token, added to its logit). stop_ids: end the answer and are not part
    of its text. min_tokens: before so many no stop id is drawn. logprobs: how many likeliest tokens to report beside
    the drawn one; None reports nothing. prompt_logprobs: the same for the tokens of the prompt.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[Token, float], ...] = ()
    seed: int = 0
    stop_ids: tuple[Token, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits depend on what was drawn before, so that the host must see a token before the next step."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return self.grammar is not None or any(penalties) or self.min_tokens > 0


@dataclass(frozen=True, slots=True)
class Request:
    """One question to one model.

    id: unique while it lives. model: which of the served models. n: how many answers; answer i draws with seed + i.
    tenant: whose fair share it counts against. salt: pages of a prefix are shared between requests of equal salt only.
    adapter: name of a loaded LoRA adapter, "" for none. priority: lower goes first. deadline: seconds since the epoch
    after which it is not begun any more. arrival: seconds since the epoch. max_pages: how many pages its tenant may
    hold at once, None for all. outputs: tokens of each answer that a lost engine had produced already; they are taken
    as given. embed: wanted is the vector of the prompt, no answer.
    """

    id: str
    prompt: tuple[Token, ...]
    sampling: Sampling
    model: str = ""
    n: int = 1
    tenant: str = ""
    salt: str = ""
    adapter: str = ""
    priority: int = 0
    deadline: float | None = None
    arrival: float = field(default_factory=time.time)
    max_pages: int | None = None
    outputs: tuple[tuple[Token, ...], ...] = ()
    embed: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, of the model's own distribution (before temperature and penalties)."""

    token: Token
    logprob: float
    top: tuple[tuple[Token, float], ...] = ()  # likeliest first


@dataclass(frozen=True, slots=True)
class Output:
    """News of answer `index` of a request: its next tokens, and at the end why it ended.

    finish: None while it goes on; "stop" (a stop id, which is among the tokens, or a grammar that is complete),
    "length", "abort", or "error" (see `error`, one sentence for the user). The last output of every answer has a
    finish. status: the HTTP status of an error. prompt_logprobs: with the first output; its first entry is None. queued:
    seconds from the engine's acceptance to the request's first step, with the first output of its first answer.
    """

    id: str
    index: int = 0
    tokens: tuple[Token, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None
    error: str = ""
    status: int = 500
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    embedding: tuple[float, ...] | None = None
    queued: float | None = None
