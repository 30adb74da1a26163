"""The HTTP process's side of the engines: starts workers, restarts what crashed or hangs, and loses no request.

A request is accepted once and kept here, with every token that came back, until all its answers have ended. When its
engine is lost, it is replayed from its tokens and its stream goes on. A request that makes engines fail is found by
trying the suspects one at a time; it is refused, and so is its like from then on. No jax.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from typing import Any

from llmos_jax.config import UserError
from llmos_jax.runtime import allocator
from llmos_jax.serve.request import Output, Request, Token
from llmos_jax.serve.router import Router
from llmos_jax.serve.worker import Job

Say = Callable[[str], None]
WORKER = (sys.executable, "-m", "llmos_jax.serve.worker")  # and the number of its pipe
START_SECONDS = 1800.0  # compiling a large model for the first time
MOST_STARTS = 3  # in a row that fail, before requests are told so
MOST_POISON = 4096  # fingerprints that are remembered


class Live:
    """A request that was accepted and is not answered fully."""

    def __init__(self, request: Request):
        self.request = request
        self.news: asyncio.Queue[Output] = asyncio.Queue()
        self.tokens: list[list[Token]] = [list(given) for given in request.outputs] or [[] for _ in range(request.n)]
        self.unfinished = set(range(request.n))
        self.suspected = 0  # how many failures in a row it was part of
        self.sent = False  # to the engine that is running now

    def take(self, output: Output) -> None:
        if output.index not in self.unfinished:
            return
        self.tokens[output.index] += output.tokens
        if output.finish is not None:
            self.unfinished.discard(output.index)
        self.suspected = 0
        self.news.put_nowait(output)

    def fail(self, status: int, error: str) -> None:
        for index in sorted(self.unfinished):
            self.take(Output(self.request.id, index, finish="error", error=error, status=status))

    def replay(self) -> Request:
        """The request with what was answered already. Answers that ended are given as they are, and end at once."""
        return dataclasses.replace(self.request, outputs=tuple(tuple(tokens) for tokens in self.tokens))


class Replica:
    """One worker process. state: "starting", "ready", "down" (between two starts) or "refused" (it cannot start)."""

    def __init__(self, name: str, job: Job, hang_seconds: float, say: Say):
        self.name, self._job, self._hang_seconds, self._say = name, job, hang_seconds, say
        self.state, self.problem, self.about = "down", "", dict[str, Any]()
        self.live: dict[str, Live] = {}
        self.stats: dict[str, Any] = {}
        self.restarts = -1
        self._trial: str | None = None  # the suspect that runs alone
        self._running: frozenset[str] = frozenset()
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._tickets = itertools.count()
        self._poison: OrderedDict[bytes, None] = OrderedDict()
        self._heard = 0.0
        self._failed_starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._epoch = 0  # how many steps of this process have failed
        self._closing = False

    # The process.

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spawn()
        self._watch = self._loop.create_task(self._watch_over())

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        self.state, self._heard = "starting", time.monotonic()
        self.restarts += 1
        environment = {**os.environ, **allocator.environment(), **_devices(self._job.devices)}
        command = [*WORKER, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        theirs.close()
        self._pipe, self._outbox, self._epoch = Connection(ours.detach()), queue.SimpleQueue(), 0
        self._outbox.put(self._job)
        threading.Thread(target=self._listen, args=(self._pipe,), daemon=True).start()
        threading.Thread(target=_speak, args=(self._pipe, self._outbox), daemon=True).start()

    def _listen(self, pipe: Connection) -> None:
        """In a thread: messages become events of the loop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            try:
                while True:
                    self._loop.call_soon_threadsafe(self._hear, pipe, pipe.recv())
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._died, pipe)

    def _send(self, *message: Any) -> None:
        if self._pipe is not None:
            self._outbox.put(message)

    def _hear(self, pipe: Connection, message: tuple[Any, ...]) -> None:
        if pipe is not self._pipe:
            return
        self._heard = time.monotonic()
        kind, *rest = message
        if kind == "outputs":
            for output in rest[0]:
                self._tell(output)
        elif kind == "running":
            self._running = rest[0]
        elif kind == "beat":
            self.stats = rest[0]
        elif kind == "reply":
            _resolve(self._replies.pop(rest[0]), rest[1:])
        elif kind == "failed":
            self._say(f"{self.name}: a step failed ({rest[1]}); its engine was rebuilt")
            self._epoch += 1  # what was sent before is not taken any more
            self._suspect(rest[0], certain=True)
        elif kind == "ready":
            self.about, self.state, self._failed_starts = rest[0], "ready", 0
            self._send_all()
        elif kind == "refused":
            self.problem = rest[0]
            self.state = "refused" if self.restarts == 0 else self.state
        else:
            self._say(f"{self.name}: {rest[0]}")

    def _died(self, pipe: Connection) -> None:
        if pipe is not self._pipe or self._closing:
            return
        was_ready, self._pipe = self.state == "ready", None
        self._outbox.put(None)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for reply in self._replies.values():
            _resolve(reply, (False, "the engine was restarted meanwhile; ask again"))
        self._replies.clear()
        if self.state == "refused":
            return
        self._say(f"{self.name}: the engine's process ended; starting another one")
        self.state = "down"
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if self._failed_starts >= MOST_STARTS:
            for live in list(self.live.values()):
                live.fail(503, "the engine cannot be started at the moment")
            self.live.clear()
        if was_ready:
            self._suspect(self._running, certain=False)
        delay = 0.0 if was_ready else min(2.0**self._failed_starts, 30.0)
        self._loop.call_later(delay, lambda: None if self._closing else self._spawn())

    async def _watch_over(self) -> None:
        """Kills a worker that says nothing for too long; its end is then noticed as any other."""
        while not self._closing:
            await asyncio.sleep(min(1.0, self._hang_seconds / 4))
            limit = self._hang_seconds if self.state == "ready" else START_SECONDS
            if self._process is not None and self._pipe is not None and time.monotonic() - self._heard > limit:
                self._say(f"{self.name}: the engine has not answered for {limit:.0f} s; it is killed")
                self._heard = time.monotonic()
                self._process.kill()

    async def close(self) -> None:
        self._closing = True
        self._send("stop")
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, 5.0)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if hasattr(self, "_watch"):
            self._watch.cancel()

    @property
    def alive(self) -> bool:
        """Whether it would make progress: it runs and was heard of lately."""
        return self.state == "ready" and time.monotonic() - self._heard < min(self._hang_seconds, 10.0)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    # Requests.

    def add(self, live: Live) -> None:
        self.live[live.request.id] = live
        if self.state == "ready" and self._trial is None and not self._suspects():
            self._submit(live)

    def abort(self, id: str) -> None:
        if self.live.pop(id, None) is not None:
            self._send("abort", id)
            if self._trial == id:
                self._trial = None
                self._send_all()

    def is_poison(self, request: Request) -> bool:
        return fingerprint(request) in self._poison

    def _submit(self, live: Live) -> None:
        live.sent = True
        self._send("add", live.replay() if any(live.tokens) else live.request, self._epoch)

    def _tell(self, output: Output) -> None:
        live = self.live.get(output.id)
        if live is None:
            return
        live.take(output)
        if not live.unfinished:
            del self.live[output.id]
        if self._trial == output.id:  # it passed a step, alone
            self._trial = None
            self._send_all()

    def _suspects(self) -> list[Live]:
        return [live for live in self.live.values() if live.suspected > 1]

    def _suspect(self, ids: frozenset[str], certain: bool) -> None:
        """After a failure with `ids` in the step. certain: the step raised; a process may also be killed from outside.

        One trial runs one suspect alone, so a failure then has one cause. What was told before is kept; everything is
        sent again.
        """
        trial, self._trial, self._running = self._trial, None, frozenset()
        for live in self.live.values():
            live.sent = False
        if trial is not None and trial in ids:
            guilty = self.live.pop(trial)
            self._poison[fingerprint(guilty.request)] = None
            if len(self._poison) > MOST_POISON:
                self._poison.popitem(last=False)
            self._say(f"{self.name}: request {trial} makes the engine fail; it is refused from now on")
            guilty.fail(500, "this request makes the engine fail; it is not tried again")
        else:
            for id in ids & self.live.keys():
                self.live[id].suspected += 2 if certain else 1
        if self.state == "ready":
            self._send_all()

    def _send_all(self) -> None:
        """Sends what the engine does not have: one suspect alone, as long as there are any."""
        if self.state != "ready" or self._trial is not None:
            return
        suspects = self._suspects()
        if suspects:
            # The rest waits until it is known who is to blame: a failure now would cast suspicion on it again.
            self._trial = suspects[0].request.id
            self._submit(suspects[0])
            return
        for live in self.live.values():
            if not live.sent:
                self._submit(live)

    async def call(self, name: str, *arguments: Any) -> Any:
        """Asks the worker to do something. Raises UserError with its reason where it cannot."""
        if self.state != "ready":
            raise UserError(f"{self.name} is {self.state}; try again when it is ready")
        ticket = next(self._tickets)
        reply = self._replies[ticket] = self._loop.create_future()
        self._send("call", ticket, name, arguments)
        worked, value = await reply
        if not worked:
            raise UserError(str(value))
        return value

    @property
    def num_refused(self) -> int:
        return len(self._poison)


class Supervisor:
    """All replicas of the served models, as the routes' client.

    most: requests that may be open at once; a tenant with less than its share of them is taken all the same.
    """

    def __init__(self, jobs: list[Job], *, most: int = 4096, hang_seconds: float = 120.0, say: Say = lambda _: None):
        self.replicas = [Replica(f"replica {i}", job, hang_seconds, say) for i, job in enumerate(jobs)]
        self._router, self._most, self.draining = Router(len(jobs)), most, False

    async def start(self) -> None:
        for replica in self.replicas:
            replica.start()

    async def wait_ready(self) -> None:
        """Until every replica is ready. Raises UserError where one cannot start."""
        while not all(replica.state == "ready" for replica in self.replicas):
            for replica in self.replicas:
                if replica.state == "refused":
                    raise UserError(replica.problem)
            await asyncio.sleep(0.05)
        self._router.page_size = next(iter(self.replicas[0].about.values()))["page_size"]

    async def close(self) -> None:
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    async def drain(self, seconds: float) -> None:
        """No new requests; waits for the running ones, at most so long."""
        self.draining = True
        until = time.monotonic() + seconds
        while self.num_live and time.monotonic() < until:
            await asyncio.sleep(0.05)

    @property
    def num_live(self) -> int:
        return sum(len(replica.live) for replica in self.replicas)

    async def ready(self) -> bool:
        return not self.draining and any(replica.alive for replica in self.replicas)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """The outputs of a request until all its answers have ended. Closing the iterator aborts it."""
        live = Live(request)
        replica = self._place(live)
        try:
            while live.unfinished or not live.news.empty():
                yield await live.news.get()
        finally:
            if replica is not None:
                replica.abort(request.id)
                self._router.done(request.id)

    def _place(self, live: Live) -> Replica | None:
        if self.draining:
            live.fail(503, "the server is about to stop; send the request again elsewhere")
            return None
        if self.num_live >= self._most and not self._below_share(live.request.tenant):
            live.fail(429, "the server has as many requests as it takes; try again in a moment")
            return None
        usable = [i for i, replica in enumerate(self.replicas) if replica.state != "refused"]
        if not usable:
            live.fail(503, "no engine can be started at the moment")
            return None
        request = live.request
        if any(replica.is_poison(request) for replica in self.replicas):
            live.fail(400, "a request like this made the engine fail before; it is not tried again")
            return None
        ready = [i for i in usable if self.replicas[i].alive] or usable
        replica = self.replicas[self._router.choose(request, ready)]
        replica.add(live)
        return replica

    def _below_share(self, tenant: str) -> bool:
        """Whether a tenant has so few requests open that another's flood must not shut it out.

        Each tenant may fill an equal share whatever the others do, so at most twice `most` are open.
        """
        open_by = Counter(live.request.tenant for replica in self.replicas for live in replica.live.values())
        return open_by[tenant] < self._most // len({*open_by, tenant})

    async def stats(self) -> dict[str, Any]:
        """Of each model, its replicas' counts summed; and how the engines fare."""
        models: dict[str, dict[str, Any]] = {}
        for replica in self.replicas:
            for name, counts in replica.stats.items():
                into = models.setdefault(name, {})
                for key, value in counts.items():
                    into[key] = _joined(into.get(key), value)
        own = {
            "restarts": sum(max(replica.restarts, 0) for replica in self.replicas),
            "refused": sum(replica.num_refused for replica in self.replicas),
            "open": self.num_live,
        }
        return {name: counts | own for name, counts in models.items()}

    async def call(self, name: str, *arguments: Any) -> dict[str, Any]:
        """Has every replica do something."""
        answers = await asyncio.gather(*(replica.call(name, *arguments) for replica in self.replicas))
        return answers[0]


def fingerprint(request: Request) -> bytes:
    """What makes two requests alike: the model, the prompt, and how tokens are drawn, but for the seed."""
    how = dataclasses.replace(request.sampling, seed=0)
    text = repr((request.model, request.adapter, request.prompt, how, request.embed))
    return hashlib.sha256(text.encode()).digest()


def _speak(pipe: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    """In a thread: a worker that hangs does not read, and nobody but this may wait for it."""
    with contextlib.suppress(OSError):  # it died; its end is heard by the listener
        while (message := outbox.get()) is not None:
            pipe.send(message)


def _resolve(reply: asyncio.Future[Any], value: Any) -> None:
    if not reply.done():  # who asked may have left
        reply.set_result(value)


def _joined(one: Any, other: Any) -> Any:
    if one is None:
        return other
    if isinstance(other, dict):
        return {key: _joined(one.get(key), other.get(key)) for key in {**one, **other}}
    if isinstance(other, list):
        return one if one == other else [*one, *other]
    return one if other is None else one + other


def _devices(devices: tuple[int, ...]) -> dict[str, str]:
    """What makes a process see these accelerators of its host only."""
    listed = ",".join(map(str, devices))
    return {"CUDA_VISIBLE_DEVICES": listed, "TPU_VISIBLE_CHIPS": listed} if devices else {}


def kill(replica: Replica) -> None:
    """Ends a worker at once, for tests of what happens then."""
    if replica.pid is not None:
        os.kill(replica.pid, signal.SIGKILL)
