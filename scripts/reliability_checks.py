"""What a server has to have kept of its promises after a run of the reliability check."""

import asyncio
import collections
import json
import math
import signal
import sqlite3
import time
from typing import Any, NamedTuple

from scripts import reliability_load as load
from scripts.reliability_load import MODEL, ask
from scripts.reliability_run import SECONDS, Run, Sample
from scripts.reliability_server import Server

GROWTH = 48 << 20  # bytes that a process may grow by after its start-up


class Check(NamedTuple):
    name: str
    passed: bool
    detail: str


def about_answers(run: Run, kills: int) -> list[Check]:
    known = sum((counts for kind, counts in run.outcomes.items() if "known" in kind), collections.Counter())
    asked, left = run.num_calls, run.count("left")
    could_leave = asked - sum(run.outcomes[kind].total() for kind in ("completion, two backlogs", "100,000 tokens"))
    few = 0.08 * could_leave - 3 * math.sqrt(0.08 * could_leave)  # some kinds never leave; three deviations below
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
        Check("a tenth of the clients leave", left >= few, f"{left:,} of {could_leave:,}"),
        Check("overload is answered early", run.count("busy") > 0, f"{run.count('busy'):,} got 429"),
        Check("pages were short", run.totals["preemptions"] > 0 and run.totals["evictions"] > 0, "see below"),
        Check(
            "a killed engine comes back",
            len(run.recoveries) == kills,
            f"{len(run.recoveries)} of {kills}, after at most {max(run.recoveries, default=0):.1f} s",
        ),
        Check("nothing is compiled after ready", not run.totals["compilations"], f"{run.totals['compilations']}"),
    ]


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
