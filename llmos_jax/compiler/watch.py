"""Watches for compilations where there should be none: once a loop is warm, each one is a stall with a cause.

jax reports every computation that reaches the compiler, those it finds in its own cache on disk included; both mean
that something was traced anew.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

Say = Callable[[str, float], None]  # name of the computation, seconds

_COMPILED = "/jax/core/compile/backend_compile_duration"  # the same on jax 0.10 to 0.12

strict = False  # in tests: a compilation that is watched for raises Recompiled where it happens


class Recompiled(RuntimeError):
    """A computation was compiled after warm-up."""


class CompileWatch:
    """Counts compilations between `start` and `stop`, and tells each to `say`. `pause` excepts expected ones."""

    def __init__(self, say: Say = lambda name, seconds: None):
        self._say = say
        self.on = False
        self.count = 0
        self.names: list[str] = []

    def start(self) -> None:
        if not self.on:
            jax.monitoring.register_event_duration_secs_listener(self._heard)
        self.on = True

    def stop(self) -> None:
        if self.on:
            jax.monitoring.unregister_event_duration_listener(self._heard)
        self.on = False

    def __enter__(self) -> "CompileWatch":
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is compiled inside is expected. A watch that was not started stays so."""
        was_on = self.on
        self.stop()
        try:
            yield
        finally:
            if was_on:
                self.start()

    def _heard(self, event: str, duration_secs: float, **details: Any) -> None:
        if event != _COMPILED:
            return
        name = str(details.get("fun_name", "unknown"))
        self.count += 1
        self.names.append(name)
        self._say(name, duration_secs)
        if strict:
            raise Recompiled(
                f"{name} was compiled after warm-up, in {duration_secs:.2f} s; give it a Program before the loop"
            )
