"""Sequence: one answer being generated, as the host keeps it. No jax."""

from llmos_jax.serve.request import Request, Token


class Sequence:
    """The tokens of one answer and how far the device has come with them.

    tokens: the prompt and what was drawn and seen by the host. num_computed: of how many tokens the keys and values
    are in the pages, or will be after the steps in flight. pending: how many tokens the steps in flight will add, which
    the host has not seen. drafts: guesses at the next tokens, to be verified by the next step. blocks: the block table.
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "digests",
        "drafts",
        "end",
        "finish",
        "index",
        "num_computed",
        "num_prompt",
        "pending",
        "preemptions",
        "request",
        "runs_ahead",
        "slot",
        "swapped",
        "tokens",
    )

    def __init__(self, request: Request, index: int = 0):
        self.request, self.index = request, index
        given = request.outputs[index] if request.outputs else ()
        self.tokens: list[Token] = [*request.prompt, *given]
        self.num_prompt = len(request.prompt)
        self.num_computed = 0
        self.pending = 0
        self.drafts: list[Token] = []
        self.blocks: list[int] = []
        self.swapped: list[int] = []  # host blocks that hold its pages while it waits
        self.slot = -1  # its row of the device's last tokens while it runs
        self.cached_tokens = 0  # of the prompt, found in the prefix cache
        self.finish: str | None = None
        self.end = self.num_prompt + request.sampling.max_tokens  # so many tokens at most; the scheduler may lower it
        self.preemptions = 0
        self.digests: list[bytes] = []  # of its full blocks, as far as they were needed
        # Whether its next step may be planned before the host has seen the token of the last one.
        self.runs_ahead = not request.sampling.adjusts_logits

    @property
    def id(self) -> tuple[str, int]:
        return self.request.id, self.index

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_ahead(self) -> int:
        """Tokens that it has or will have when the steps in flight are done."""
        return len(self.tokens) + self.pending

    def __repr__(self) -> str:
        return f"Sequence({self.request.id}.{self.index}, {self.num_computed}/{self.num_ahead} of {self.num_prompt}+)"
