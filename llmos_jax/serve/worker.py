"""The engine's process: `python -m llmos_jax.serve.worker FD`, started by the supervisor, which speaks to it in pickles.

The main thread steps the engines; another one receives. A step that raises takes its engine down: the supervisor is
told who was in it, a new engine is built over the same compiled programs and weights, and the supervisor replays what
it had accepted.
"""

import functools
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from llmos_jax.config import MeshConfig, UserError
from llmos_jax.serve.request import Request, Token

IDLE_SECONDS = 0.5  # between two signs of life


class Job(NamedTuple):
    """What a worker does.

    models: `models.ServedModel`s. awake_bytes: that those awake may take together, 0 for no limit. devices: numbers of
    the host's accelerators, () for all. adapters: (model, name, PEFT folder) to load at the start.
    """

    models: tuple[Any, ...]
    mesh: MeshConfig
    awake_bytes: float = 0.0
    devices: tuple[int, ...] = ()
    adapters: tuple[tuple[str, str, str], ...] = ()
    poison: tuple[Token, ...] = ()


class Worker:
    def __init__(self, job: Job, pipe: Connection):
        from llmos_jax.serve.resident import Residents

        self._job, self._pipe = job, pipe
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._residents = Residents(job.awake_bytes or float("inf"), self._say)
        self._running: dict[str, frozenset[str]] = {}
        self._epoch = 0  # how many steps have failed
        self._stopped = False

    def run(self) -> None:
        from llmos_jax.serve.models import build_engine

        threading.Thread(target=self._receive, daemon=True).start()
        for one in self._job.models:
            self._residents.put(one.name, build_engine(one, self._job.mesh, self._say, self._job.poison))
        for adapter in self._job.adapters:
            self._do_load_adapter(*adapter)
        for name, one in self._residents.models.items():
            one.engine.announce = functools.partial(self._tell_running, name)
            one.engine.start()
        self._send("ready", {name: one.engine.about() for name, one in self._residents.models.items()})
        while not self._stopped:
            self._read_inbox()
            if self._residents.has_work:
                self._step()

    def _receive(self) -> None:
        try:
            while True:
                self._inbox.put(self._pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the supervisor is gone

    def _send(self, *message: Any) -> None:
        self._pipe.send(message)

    def _say(self, text: str) -> None:
        self._send("say", text)

    def _read_inbox(self) -> None:
        """All that is there; where there is nothing to do it waits for a message, and tells that it lives."""
        if not self._residents.has_work:
            try:
                self._handle(self._inbox.get(timeout=IDLE_SECONDS))
            except queue.Empty:
                self._send("beat", self._stats())
        while not self._inbox.empty():
            self._handle(self._inbox.get())

    def _handle(self, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "add":
            request, epoch = rest
            if epoch == self._epoch:  # else it was sent before its sender heard of a failure, and is sent again
                self._add(request)
        elif kind == "abort":
            self._residents.abort(rest[0])
        elif kind == "call":
            ticket, name, arguments = rest
            self._send("reply", ticket, *self._call(name, arguments))
        elif kind == "stop":
            self._stopped = True

    def _add(self, request: Request) -> None:
        from llmos_jax.serve.resident import refusals

        try:
            self._residents.add(request)
        except ValueError as error:
            self._send("outputs", refusals(request, str(error)))
        except Exception:
            traceback.print_exc()
            self._residents.abort(request.id)
            self._send("outputs", refusals(request, "the engine failed to take this request; its log says why", 500))

    def _step(self) -> None:
        try:
            told = self._residents.step()
        except Exception as error:
            traceback.print_exc()
            suspects = frozenset().union(*(one.engine.in_step for one in self._residents.models.values()))
            for one in self._residents.models.values():
                one.engine = one.engine.rebuilt()
                one.held = []
            self._running = {}
            self._epoch += 1
            self._send("failed", suspects, f"{type(error).__name__}: {error}")
            return
        if told:
            self._send("outputs", told)
        now = time.monotonic()
        if now - self._told > IDLE_SECONDS:
            self._told = now
            self._send("beat", self._stats())

    _told = 0.0

    def _tell_running(self, model: str, ids: frozenset[str]) -> None:
        """Who would be to blame if the process died in the step of `model` that begins."""
        if self._running.get(model) != ids:
            self._running[model] = ids
            self._send("running", frozenset().union(*self._running.values()))

    def _stats(self) -> dict[str, Any]:
        return {
            name: one.engine.stats() | {"asleep": one.asleep, "held": len(one.held)}
            for name, one in self._residents.models.items()
        }

    def _call(self, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """(whether it worked, the answer or the reason)."""
        try:
            return True, getattr(self, f"_do_{name}")(*arguments)
        except (UserError, ValueError, KeyError) as error:
            return False, str(error)
        except Exception as error:  # of a damaged file, say: no reason to lose what runs
            traceback.print_exc()
            return False, f"{type(error).__name__}: {error}"

    def _do_stats(self) -> dict[str, Any]:
        return self._stats()

    def _do_load_adapter(self, model: str, name: str, path: str) -> dict[str, Any]:
        from llmos_jax.serve.adapters import load_adapter

        engine = self._residents.models[model].engine
        engine.load_adapter(load_adapter(path, engine.runner.model, name))
        return {"adapters": [*engine.adapters]}

    def _do_unload_adapter(self, model: str, name: str) -> dict[str, Any]:
        engine = self._residents.models[model].engine
        engine.unload_adapter(name)
        return {"adapters": [*engine.adapters]}

    def _do_sleep(self, model: str) -> dict[str, Any]:
        self._residents.sleep(model)
        return {"model": model, "asleep": self._residents.models[model].asleep}

    def _do_wake(self, model: str) -> dict[str, Any]:
        self._residents.wake(model)
        return {"model": model, "asleep": self._residents.models[model].asleep}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    job = pipe.recv()
    try:
        Worker(job, pipe).run()
    except UserError as error:
        pipe.send(("refused", str(error)))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("refused", f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
