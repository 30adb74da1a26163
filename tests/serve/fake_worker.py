"""The worker's process with an engine that counts instead of thinking, and no jax: `python -m tests.serve.fake_worker FD`.

Answer i to a prompt p is a token for each position: `token(p, i, position)`. Some tokens in a prompt do harm when a step
has their request: RAISES, DIES, HANGS. What ends the process once and not again is a file named in LLMOS_FAKE_ONCE.
"""

import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

from llmos_jax.config import UserError
from llmos_jax.serve.request import Output, Request

RAISES, DIES, HANGS, SLOW, REFUSED, BREAKS_ADD, DIES_ONCE = 901, 902, 903, 904, 905, 906, 907
BATCH = 8


def token(prompt: tuple[int, ...], index: int, position: int) -> int:
    return (sum(prompt) * 31 + index * 7 + position * position) % 900


class FakeEngine:
    bytes = 1

    def __init__(self) -> None:
        self.requests: dict[str, tuple[Request, list[list[int]]]] = {}
        self.in_step: frozenset[str] = frozenset()
        self.announce: Any = lambda ids: None

    has_work = property(lambda self: bool(self.requests))

    def start(self) -> None:
        pass

    def about(self) -> dict[str, Any]:
        return {"page_size": 4, "pid": os.getpid()}

    def stats(self) -> dict[str, Any]:
        return {"running": len(self.requests), "tenants": {"a": 1}, "names": ["x"]}

    def rebuilt(self) -> "FakeEngine":
        fresh = FakeEngine()
        fresh.announce = self.announce
        return fresh

    def check(self, request: Request) -> None:
        pass

    def add(self, request: Request) -> None:
        if request.id in self.requests:
            raise ValueError("is being answered already")
        if REFUSED in request.prompt:
            raise ValueError("refused")
        if BREAKS_ADD in request.prompt:
            raise RuntimeError("broken")
        self.requests[request.id] = request, [list(one) for one in request.outputs] or [[] for _ in range(request.n)]

    def abort(self, id: str) -> None:
        self.requests.pop(id, None)

    def step(self) -> list[Output]:
        """A token for each answer of the first requests."""
        batch = list(self.requests.values())[:BATCH]
        self.in_step = frozenset(request.id for request, _ in batch)
        self.announce(self.in_step)
        time.sleep(0.2 if any(SLOW in request.prompt for request, _ in batch) else 0.002)
        told = []
        for request, drawn in batch:
            self._harm(request, drawn)
            for index, tokens in enumerate(drawn):
                if len(tokens) < request.sampling.max_tokens:
                    tokens.append(token(request.prompt, index, len(tokens)))
                    ended = len(tokens) == request.sampling.max_tokens
                    told.append(Output(request.id, index, (tokens[-1],), finish="length" if ended else None))
            if all(len(tokens) == request.sampling.max_tokens for tokens in drawn):
                del self.requests[request.id]
        return told

    def _harm(self, request: Request, drawn: list[list[int]]) -> None:
        if RAISES in request.prompt:
            raise RuntimeError("harm")
        once = Path(os.environ.get("LLMOS_FAKE_ONCE", "/nonexistent"))
        if DIES in request.prompt or (DIES_ONCE in request.prompt and len(drawn[0]) == 5 and not once.exists()):
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if HANGS in request.prompt:
            time.sleep(60)


def build_engine(model: Any, *rest: Any) -> FakeEngine:
    if model.reference == "missing":
        raise UserError("there is no such model")
    if model.reference == "unstartable":
        os._exit(1)
    return FakeEngine()


def main() -> None:
    for name, content in (("engine", {"Engine": FakeEngine}), ("models", {"build_engine": build_engine})):
        module = types.ModuleType(f"llmos_jax.serve.{name}")
        module.__dict__.update(content)
        sys.modules[module.__name__] = module
    from llmos_jax.serve import worker

    worker.main()


if __name__ == "__main__":
    main()
