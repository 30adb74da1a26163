"""A run of the reliability check: what is asked of the server, what came of it, and the system meanwhile."""

import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import time
from typing import Any, NamedTuple

from scripts import reliability_load as load
from scripts.reliability_load import Call, Mix, ask
from scripts.reliability_server import TENANTS, Server, resident

SECONDS = 180.0  # after which a request counts as hanging
RECOVERY = 60.0  # seconds after which a killed engine counts as lost
EVERY = 0.2  # seconds between samples of the system
WATCHED = ("preemptions", "evictions", "swaps", "hits", "generated_tokens", "accepted_tokens", "compilations")


class Sample(NamedTuple):
    """The system at one moment. at: seconds since the load began. Resident memory in bytes; 0 where there is none."""

    at: float
    server: int
    worker: int
    worker_pid: int


class Run:
    """One run against one server: what was asked, what came of it, and the system meanwhile."""

    def __init__(self, server: Server, mix: Mix):
        self.server, self.mix = server, mix
        self.outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.faults: list[str] = []
        self.samples: list[Sample] = []
        self.kills: list[float] = []
        self.recoveries: list[float] = []
        self.totals: collections.Counter[str] = collections.Counter()
        self.seen_401: set[bytes] = set()
        self.served: collections.Counter[str] = collections.Counter()  # tokens by tenant
        self.began = time.monotonic()

    async def make(self, call: Call) -> str:
        """Makes a call and notes its outcome: "answered", "refused", "busy" (429), "left", "hung" or "wrong"."""
        ask_it = ask(
            self.server.port, call.path, call.body, call.key, method=load.method(call), leave_after=call.leave_after
        )
        try:
            reply = await asyncio.wait_for(ask_it, SECONDS)
        except TimeoutError:
            outcome, problem = "hung", f"no end after {SECONDS:.0f} s"
        else:
            outcome, problem = self._judge(call, reply)
        self.outcomes[call.kind][outcome] += 1
        if problem:
            self.faults.append(f"{time.monotonic() - self.began:.1f} s, {call.kind}: {problem}")
        return outcome

    def _judge(self, call: Call, reply: load.Reply) -> tuple[str, str]:
        if call.leave_after is not None:
            return "left", ""
        if reply.status == 401:
            self.seen_401.add(reply.body)
        if reply.status == 429 and call.busy:
            problem = "" if "retry-after" in reply.headers else "429 without Retry-After"
            return ("wrong", problem) if problem else ("busy", "")
        problem = call.judge(reply)
        if problem:
            return "wrong", problem
        if reply.status == 200:
            self.served[call.tenant] += call.tokens
        return "answered" if reply.status == 200 else "refused", ""

    @property
    def num_calls(self) -> int:
        return sum(map(sum, (counts.values() for counts in self.outcomes.values())))

    def count(self, outcome: str) -> int:
        return sum(counts[outcome] for counts in self.outcomes.values())

    # Phases.

    async def learn(self, count: int) -> None:
        """Asks for the answers of an undisturbed server, one after the other."""
        for _ in range(count):
            body = self.mix.sample()
            reply = await ask(self.server.port, "/v1/completions", json.dumps(body).encode(), self.server.keys["alice"])
            self.mix.samples.append((body, load.read_answer(reply, streamed=False)))

    async def closed(self, count: int, users: int) -> float:
        """`count` calls by so many users, each of whom waits for the answer. Calls a second."""
        started, left = time.monotonic(), count

        async def user() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.make(self.mix.draw())

        await asyncio.gather(*(user() for _ in range(users)))
        return count / (time.monotonic() - started)

    async def widen(self, count: int) -> None:
        """Prompts of 100,000 tokens among others: allocators keep what the most of them at once have needed."""
        for start in range(0, count, 12):
            calls = [self.mix.too_long(name) for name in TENANTS for _ in range(6)]
            calls += [self.mix.plain(TENANTS[start % 2]) for _ in range(24)]
            await asyncio.gather(*(self.make(call) for call in calls))

    async def flood(self, count: int, rate: float, kills: int) -> None:
        """`count` calls that come as they like (Poisson), whatever the server can do; `kills` while they come."""
        kill_at = {round(count * (i + 1) / (kills + 2)) for i in range(kills)}
        chance, tasks = random.Random(1), []
        due = time.monotonic()
        for number in range(count):
            due += chance.expovariate(rate)
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self.make(self.mix.draw())))
            if number in kill_at:
                tasks.append(asyncio.create_task(self._kill()))
        await asyncio.gather(*tasks)

    async def _kill(self) -> None:
        while not (pid := self.server.worker_pid) or not await self.server.is_ready():
            await asyncio.sleep(0.1)
        killed = time.monotonic()
        self.kills.append(killed - self.began)
        os.kill(pid, signal.SIGKILL)
        while time.monotonic() - killed < RECOVERY:
            if self.server.worker_pid not in (0, pid) and await self.server.is_ready():
                self.recoveries.append(time.monotonic() - killed)
                break
            await asyncio.sleep(0.05)

    async def share(self, seconds: float, most: int) -> tuple[dict[str, float], str]:
        """Each tenant's share of the service while both have more to ask for than there is room; one asks for more.

        most: requests that may be open.
        """
        stop = asyncio.Event()

        async def user(tenant: str, prompt: int, max_tokens: int) -> None:
            while not stop.is_set():
                call = self.mix.plain(tenant, prompt, max_tokens)
                call.kind = "completion, two backlogs"
                await self.make(call)

        users = [user("alice", 200, 8) for _ in range(most * 3 // 5)] + [user("bob", 20, 24) for _ in range(most // 3)]
        tasks = [asyncio.create_task(one) for one in users]
        await asyncio.sleep(3)
        before = (await self.server.stats())["tenant_service"]
        await asyncio.sleep(seconds)
        after = (await self.server.stats())["tenant_service"]
        stop.set()
        await asyncio.gather(*tasks)
        service = {name: after[name] - before[name] for name in TENANTS}
        total = sum(service.values())
        told = ", ".join(f"{name} {service[name] / total:.1%}" for name in TENANTS)
        return {name: service[name] / total for name in TENANTS}, f"{told} of {total:,} units in {seconds:.0f} s"

    async def watch(self) -> None:
        """A sample now and then until it is cancelled."""
        before: dict[str, Any] = {}
        while True:
            pid = self.server.worker_pid
            at = time.monotonic() - self.began
            self.samples.append(Sample(at, resident(self.server.process.pid), resident(pid), pid))
            with contextlib.suppress(OSError, ValueError, KeyError):
                now = await self.server.stats()
                for name in WATCHED:  # they start again with each engine
                    new = now.get(name, 0) - before.get(name, 0)
                    self.totals[name] += new if new >= 0 else now[name]
                before = now
            await asyncio.sleep(EVERY)
