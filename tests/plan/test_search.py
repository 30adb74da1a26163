"""The search: what is compiled, in which order it comes out, and what is left when it is interrupted."""

import subprocess
import sys
import threading

import pytest

from llmos_jax.compiler import target as described
from llmos_jax.compiler.target import Target
from llmos_jax.config import UserError, check
from llmos_jax.overrides import apply_settings
from llmos_jax.plan import search as module
from llmos_jax.plan import show
from llmos_jax.plan.candidates import Candidate, every
from llmos_jax.plan.search import Found, Tried, search
from tests import tiny

CPUS = Target.parse("cpu:8")
CONFIG = tiny.run(tiny.DENSE, 16, 16)


def report(seconds: float, fits: bool = True) -> dict:
    return {"fits": fits, "step_seconds": seconds, "mfu": 0.1, "peak_bytes": 1.0}


class Compiler:
    """In place of the processes that compile: answers from a function of the candidate and of how many came before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reply):
        self.asked: list[Candidate] = []
        self.reply, self.lock = reply, threading.Lock()
        monkeypatch.setattr(module, "_plan_apart", self.compile)

    def compile(self, candidate: Candidate, path, settings, target) -> Tried:
        with self.lock:
            self.asked.append(candidate)
            return self.reply(candidate, len(self.asked))


def run(most: int = 4, jobs: int = 1, said: list[str] | None = None) -> Found:
    return search(CONFIG, "configuration.py", [], CPUS, most, jobs, (said if said is not None else []).append)


def test_the_best_by_the_compiled_program_comes_first(monkeypatch: pytest.MonkeyPatch):
    """The formula's order is turned around: each that is compiled is faster than the one before it."""
    compiler = Compiler(monkeypatch, lambda one, number: Tried(one, report(10.0 - number)))
    said: list[str] = []
    found = run(4, said=said)
    formula = [one.seconds for one in compiler.asked]
    assert len(found.tried) == len(compiler.asked) == 4 and formula == sorted(formula)
    assert found.best and found.best.candidate == compiler.asked[-1]
    assert [one.seconds for one in found.tried] == [6.0, 7.0, 8.0, 9.0]
    assert found.scored >= found.possible >= 4 and not found.stopped
    assert len([line for line in said if line.startswith("compiling ")]) == 4


def test_what_does_not_fit_comes_behind_and_another_takes_its_place(monkeypatch: pytest.MonkeyPatch):
    compiler = Compiler(monkeypatch, lambda one, number: Tried(one, report(float(number), fits=number > 2)))
    found = run(2)
    assert [one.fits for one in found.tried] == [True, True, False, False]
    assert len(compiler.asked) == 4 and found.best and found.best.seconds == 3.0


def test_candidates_that_cannot_be_compiled_are_named_and_passed_over(monkeypatch: pytest.MonkeyPatch):
    Compiler(
        monkeypatch, lambda one, number: Tried(one, {}, "out of patience") if number < 3 else Tried(one, report(1.0))
    )
    said: list[str] = []
    found = run(1, said=said)
    assert found.best is None and len(found.tried) == 2  # twice as many as were asked for
    assert any("not compiled (out of patience)" in line for line in said)


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_more_are_compiled_than_asked_for(monkeypatch: pytest.MonkeyPatch, jobs: int):
    compiler = Compiler(monkeypatch, lambda one, number: Tried(one, report(float(number))))
    assert len(run(3, jobs).tried) == len(compiler.asked) == 3


def test_an_interrupt_leaves_the_best_so_far(monkeypatch: pytest.MonkeyPatch):
    def reply(one: Candidate, number: int) -> Tried:
        if number == 3:
            raise KeyboardInterrupt
        return Tried(one, report(float(number)))

    Compiler(monkeypatch, reply)
    found = run(5)
    assert found.stopped and len(found.tried) == 2 and found.best and found.best.seconds == 1.0


def test_nothing_that_fits_by_far_is_an_error_with_advice():
    huge = tiny.run(tiny.model(embed_dim=2**20, mlp_dim=2**22), 4, 16)
    with pytest.raises(UserError, match=r"no mesh of cpu:8 holds this model.*more chips"):
        search(huge, "configuration.py", [], CPUS, 1, 1)


def test_a_target_that_cannot_be_described_is_not_taken_for_one_that_is_too_small(monkeypatch: pytest.MonkeyPatch):
    """Without libtpu every candidate broke a rule, and the search said that no mesh holds the model."""
    monkeypatch.setattr(described, "_has", lambda module: False)
    described._described_tpus.cache_clear()
    with pytest.raises(UserError, match="needs libtpu"):
        search(CONFIG, "configuration.py", [], Target.parse("v6e:2x4"), 1, 1)


def test_of_those_that_are_alike_few_are_compiled():
    def one(tensor: int, remat: str, seconds: float, memory: float) -> Candidate:
        settings = (f"mesh.data={int(seconds)}", f"mesh.tensor={tensor}", f"model.remat={remat}")
        return Candidate(settings, memory, seconds, 0.1, 1.0)

    ranked = [
        one(1, "none", 1, 100),
        one(1, "dots", 2, 95),
        one(1, "full", 3, 50),
        one(1, "x", 4, 10),
        one(2, "x", 5, 99),
    ]
    assert module._different(ranked) == [ranked[0], ranked[2], ranked[4]]


def test_the_line_to_set_is_valid_for_a_configuration_that_names_activations(capsys):
    saving = tiny.run(tiny.model(remat="names", remat_save=("input",)), 16, 16)
    full = next(one for one in every(saving, CPUS) if one and "model.remat=full" in one.settings)
    show.ranking(Found(tried=[Tried(full, report(1.0))]))
    line = capsys.readouterr().out.rpartition("--set ")[2].split()
    assert line == [*full.settings]
    check(apply_settings(saving, line), 8)


def test_a_process_that_fails_or_takes_too_long_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch):
    candidate = Candidate(("mesh.data=8", "model.remat=full"), 1.0, 1.0, 0.1, 1.0)
    commands = []

    def failing(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 2, "", "progress\nerror: mesh.data=8 is too much\n")

    monkeypatch.setattr(subprocess, "run", failing)
    tried = module._plan_apart(candidate, "c.py", ["train.steps=3"], CPUS)
    assert tried.problem == "error: mesh.data=8 is too much" and not tried.fits and tried.seconds == float("inf")
    settings = commands[0][commands[0].index("--set") + 1 :]
    assert commands[0][0] == sys.executable and settings == ["train.steps=3", *candidate.settings]

    def late(command, **options):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", late)
    assert "longer than" in module._plan_apart(candidate, "c.py", [], CPUS).problem
