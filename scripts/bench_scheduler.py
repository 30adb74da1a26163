#!/usr/bin/env python3
"""Measures what the host spends on a step of serving: planning it and taking in its results, without any device.

    python scripts/bench_scheduler.py
    python scripts/bench_scheduler.py --running 256 --waiting 10000 --tenants 100 --steps 2000

Without numbers it prints a table over running and waiting sequences and tenants. Answers end and others begin while it
runs, at the rate that their lengths give; prompts share a prefix of 256 tokens by tenant.
"""

import argparse
import gc
import random
import statistics
import time

from rich.console import Console
from rich.table import Table

from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.limits import Limits
from llmos_jax.serve.request import Request, Sampling
from llmos_jax.serve.scheduler import Scheduler

CASES = [
    (running, waiting, tenants)
    for running in (64, 256, 1000)
    for waiting in (100, 10_000, 100_000)
    for tenants in (2, 1000)
]
PREFIX, OWN, ANSWER = 256, 64, 256  # tokens


def question(i: int, tenants: int, rng: random.Random) -> Request:
    tenant = i % tenants
    prompt = (*[tenant] * PREFIX, *(rng.randrange(50_000) for _ in range(OWN)))
    sampling = Sampling(max_tokens=rng.randint(ANSWER // 2, ANSWER * 3 // 2), stop_ids=(1,))
    return Request(f"{i}", prompt, sampling, tenant=f"tenant {tenant}", arrival=float(i))


def measure(running: int, waiting: int, tenants: int, steps: int, ahead: bool) -> dict[str, float]:
    """Milliseconds of one step: median and 99th percentile of all, and the part spent in schedule()."""
    rng = random.Random(0)
    limits = Limits(max_tokens=running + 8192, max_rows=running, max_sequences=running, max_model_len=4096)
    scheduler = Scheduler(limits, BlockManager(running * 48, 16))
    count = running + waiting
    for i in range(count):
        scheduler.add(question(i, tenants, rng))
    while len(scheduler.running) < running:
        advance(scheduler, scheduler.schedule())
    flight = scheduler.schedule() if ahead else None
    totals, plans = [], []
    gc.collect()
    gc.freeze()
    for _ in range(steps):
        start = time.perf_counter()
        step = scheduler.schedule()
        planned = time.perf_counter()
        advance(scheduler, flight if ahead else step)
        totals.append(time.perf_counter() - start)
        plans.append(planned - start)
        flight = step
        while scheduler.num_waiting < waiting:  # arrivals are not part of a step
            count += 1
            scheduler.add(question(count, tenants, rng))
    gc.unfreeze()
    totals = [1e3 * seconds for seconds in totals]
    return {
        "median": statistics.median(totals),
        "mean": statistics.fmean(totals),
        "p99": statistics.quantiles(totals, n=100)[-1],
        "schedule": 1e3 * statistics.median(plans),
    }


def advance(scheduler: Scheduler, step) -> None:
    for chunk in step.chunks:
        scheduler.advance(chunk, [7] if chunk.num_rows else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--ahead", action="store_true", help="plan each step while the one before it is in flight")
    args = parser.parse_args()
    cases = [(args.running, args.waiting, args.tenants)] if args.running else CASES
    table = Table("running", "waiting", "tenants", "median ms", "mean ms", "p99 ms", "schedule ms", "us per running")
    for running, waiting, tenants in cases:
        found = measure(running, waiting, tenants, args.steps, args.ahead)
        numbers = [f"{found[name]:.3f}" for name in ("median", "mean", "p99", "schedule")]
        table.add_row(
            f"{running:,}", f"{waiting:,}", f"{tenants:,}", *numbers, f"{1e3 * found['median'] / running:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
