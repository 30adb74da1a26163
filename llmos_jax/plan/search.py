"""The best mesh, remat policy, micro-batch and offload of a configuration for a target.

Every candidate is scored by formula; the best are compiled for real, each in a process of its own through `llmos plan`,
and ranked by what their compiled schedules say. What was compiled is remembered by the executable cache.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from llmos_jax.compiler.target import Target
from llmos_jax.config import RunConfig, UserError
from llmos_jax.plan.candidates import Candidate, every, number

SLACK = 1.25  # the formula's memory may be this far too high: such candidates are compiled before they are given up
TIMEOUT = 900.0  # seconds for one compilation

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tried:
    """A candidate that was compiled. report: of `llmos plan --json`; empty where it could not be compiled."""

    candidate: Candidate
    report: dict[str, Any]
    problem: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.report) and bool(self.report["fits"])

    @property
    def seconds(self) -> float:
        return self.report["step_seconds"] if self.report else math.inf


@dataclass
class Found:
    """tried: what was compiled, the best first. scored: how many candidates were scored; possible: that break no rule."""

    scored: int = 0
    possible: int = 0
    tried: list[Tried] = field(default_factory=list)
    stopped: bool = False

    @property
    def best(self) -> Tried | None:
        return next((one for one in self.tried if one.fits), None)

    def add(self, one: Tried) -> None:
        self.tried = sorted([*self.tried, one], key=lambda tried: (not tried.fits, tried.seconds))


def search(
    config: RunConfig, path: str, settings: list[str], target: Target, most: int, jobs: int, say: Say = lambda _: None
) -> Found:
    """Scores all candidates of the training program, compiles up to `most` of the best, `jobs` at a time.

    path, settings: of `config`, for the processes that compile. An interrupt gives the best so far. Raises UserError
    where the target cannot be described here or nothing fits it.
    """
    found = Found()
    target.devices()  # a target that cannot be described is said so, where each candidate would quietly break a rule
    try:
        ranked = _score(config, target, found, say)
        if not ranked:
            raise UserError(
                f"no mesh of {target.name} holds this model by formula; take more chips, or a smaller train.batch_size"
            )
        _compile(ranked, path, settings, target, most, jobs, found, say)
    except KeyboardInterrupt:
        found.stopped = True
    return found


def _score(config: RunConfig, target: Target, found: Found, say: Say) -> list[Candidate]:
    total = number(config, target)
    say(f"scoring {total:,} candidates by formula")
    capacity, possible = target.chip.usable_bytes, []
    for candidate in every(config, target):
        found.scored += 1
        if candidate:
            found.possible += 1
            if candidate.memory <= capacity * SLACK:
                possible.append(candidate)
        if found.scored % 5000 == 0:
            say(f"scored {found.scored:,} of {total:,}")
    return _different(sorted(possible, key=lambda one: (one.seconds, one.memory)))


def _different(ranked: list[Candidate]) -> list[Candidate]:
    """At most two that are alike up to the remat policy and the split between data and fsdp: the fastest, and the fastest
    that is smaller. Those two hardly change the time, and compiling ten of a kind would tell nothing."""
    kept: dict[tuple[str, ...], list[Candidate]] = {}
    answer = []
    for one in ranked:
        alike = kept.setdefault(tuple(s for s in one.settings if not s.startswith(_MINOR)), [])
        if len(alike) < 2 and all(one.memory < 0.9 * other.memory for other in alike):
            alike.append(one)
            answer.append(one)
    return answer


_MINOR = ("mesh.data=", "mesh.fsdp=", "model.remat")


def _compile(
    ranked: list[Candidate],
    path: str,
    settings: list[str],
    target: Target,
    most: int,
    jobs: int,
    found: Found,
    say: Say,
) -> None:
    """Takes candidates in order until `most` that fit were compiled, or twice as many were tried."""
    waiting = iter(ranked[: 2 * most])
    running: dict[Future[Tried], Candidate] = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        while True:
            while len(running) < jobs and sum(one.fits for one in found.tried) + len(running) < most:
                candidate = next(waiting, None)
                if candidate is None:
                    break
                say(f"compiling {' '.join(candidate.settings)}")
                running[pool.submit(_plan_apart, candidate, path, settings, target)] = candidate
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.pop(future)
                found.add(one := future.result())
                say(_line(one))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _line(one: Tried) -> str:
    if not one.report:
        return f"not compiled ({one.problem}): {' '.join(one.candidate.settings)}"
    verdict = "fits" if one.fits else "does not fit"
    return (
        f"{one.seconds:.2f} s a step (formula {one.candidate.seconds:.2f}), {one.report['peak_bytes'] / 2**30:.1f} GiB, "
        f"{verdict}: {' '.join(one.candidate.settings)}"
    )


def _plan_apart(candidate: Candidate, path: str, settings: list[str], target: Target) -> Tried:
    command = [sys.executable, "-m", "llmos_jax.cli", "plan", path, "--target", target.name, "--json", "--no-advice"]
    command += ["--set", *settings, *candidate.settings]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        return Tried(candidate, {}, f"longer than {TIMEOUT:.0f} s")
    if done.returncode not in (0, 3):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return Tried(candidate, {}, lines[-1][:200] if lines else f"exit code {done.returncode}")
    return Tried(candidate, json.loads(done.stdout)["reports"][0])
