"""The loop in trouble: stop signals, steps that are not finite, spikes, and steps that hang."""

import math
import signal
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.cli import main
from llmos_jax.data import pipeline
from llmos_jax.train import loop, objectives
from tests.end_to_end import runs

# One of these tokens, which the tokenizer does not have, all over a batch makes it go wrong.
NOT_FINITE, HUGE = 318, 319


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def train(config, tmp_path, capsys):
    """Trains in `tmp_path`/w; gives the exit code and what was said."""

    def train(*settings: str, stop_at: int | None = None) -> tuple[int, str]:
        stop = ["--stop-at", str(stop_at)] if stop_at else []
        arguments = ["train", str(config), "--workdir", str(tmp_path / "w"), *stop, "--json"]
        code = main([*arguments, "--set", "train.steps=12", *settings])
        return code, capsys.readouterr().err

    return train


@pytest.fixture
def workdir(tmp_path) -> Path:
    return tmp_path / "w"


@pytest.fixture
def trained_on(monkeypatch) -> list[int]:
    """The numbers of the batches, in the order they are given to the device."""
    numbers: list[int] = []
    dispatch = loop.Loop._dispatch

    def watched(self):
        done = dispatch(self)
        numbers.append(done.batch)
        return done

    monkeypatch.setattr(loop.Loop, "_dispatch", watched)
    return numbers


# Stopping.


@pytest.fixture
def raise_signal(monkeypatch):
    """Makes the run receive a signal while it takes a step."""

    def arrange(step: int, number: signal.Signals) -> None:
        dispatch = loop.Loop._dispatch

        def interrupted(self):
            if self.step + 1 == step:
                signal.raise_signal(number)
            return dispatch(self)

        monkeypatch.setattr(loop.Loop, "_dispatch", interrupted)

    return arrange


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGTERM, None), (signal.SIGINT, "75")])
def test_a_signal_saves_and_stops(train, workdir, raise_signal, monkeypatch, number, wanted):
    if wanted:
        monkeypatch.setenv("LLMOS_STOPPED_EXIT_CODE", wanted)
    raise_signal(6, number)
    code, said = train()
    assert code == int(wanted or 0)
    assert runs.events(workdir, "stop_requested")[-1]["details"] == {"signal": number.name}
    assert runs.params(workdir)[0] == 6  # the step that was under way is in the checkpoint, though 4 is the interval
    assert "step 6/12  checkpoint saved" in said
    monkeypatch.undo()
    assert train()[0] == 0
    assert runs.events(workdir, "resumed")[-1]["details"] == {"batch": 6}
    assert list(runs.losses(workdir)) == list(range(1, 13))


def test_a_run_stops_where_it_is_told(train, workdir):
    assert train(stop_at=4)[0] == 0
    assert runs.params(workdir)[0] == 4
    assert train(stop_at=4)[0] == 0  # it is there already
    assert train(stop_at=7)[0] == 0
    assert train(stop_at=100)[0] == 0
    assert [row["step"] for row in runs.events(workdir, "resumed")] == [4, 4, 7]
    assert list(runs.losses(workdir)) == list(range(1, 13))
    assert runs.events(workdir, "finished")


# Steps that go wrong.


def poisoned(run, params, batch):
    """The objective of a run whose batches say which weights they want."""
    weight = jnp.where(batch["tokens"] == HUGE, 100.0, batch["loss_mask"])
    weight = jnp.where(batch["tokens"] == NOT_FINITE, jnp.nan, weight)
    return objectives.causal_lm(run, params, batch | {"loss_mask": weight})


@pytest.fixture
def poison(monkeypatch):
    """Makes batches go wrong, by number: not finite, or with a huge loss."""

    def arrange(not_finite=(), huge=()) -> None:
        read = pipeline._Batches.__getitem__

        def spoilt(self, number):
            batch = read(self, number)
            token = NOT_FINITE if number in not_finite else HUGE if number in huge else None
            return batch if token is None else batch | {"tokens": np.full_like(batch["tokens"], token)}

        monkeypatch.setattr(pipeline._Batches, "__getitem__", spoilt)
        monkeypatch.setitem(objectives.OBJECTIVES, "causal_lm", poisoned)

    return arrange


def test_a_step_that_is_not_finite_is_left_out(train, workdir, poison):
    poison(not_finite=[5])
    code, said = train("checkpoint.every=1")
    assert code == 0
    (skipped,) = runs.events(workdir, "skipped_step")
    assert (skipped["step"], skipped["details"]["batch"], skipped["details"]["loss"]) == (6, 5, "nan")
    assert "step 6/12  skipped step  loss=nan" in said
    found = runs.losses(workdir)
    assert math.isnan(found.pop(6))
    assert all(map(math.isfinite, found.values()))
    assert not runs.events(workdir, "rewind")
    assert found[12] < found[1]


def test_the_skipped_step_leaves_the_parameters_alone(train, workdir, poison):
    poison(not_finite=[5])
    train(stop_at=5)
    _, before = runs.params(workdir)
    train(stop_at=6)
    step, after = runs.params(workdir)
    assert step == 6
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_spike_goes_back_and_passes_the_data_over(train, workdir, poison, trained_on):
    poison(huge=[25])
    code, said = train("train.steps=30")
    assert code == 0
    (rewind,) = runs.events(workdir, "rewind")
    assert rewind["step"] == 24  # the newest checkpoint before the spike
    assert rewind["details"]["why"] == "spike"
    assert (rewind["details"]["bad_step"], rewind["details"]["next_batch"]) == (26, 26)
    assert "step 24/30  rewind  why=spike" in said
    # 0 ... 25 and one more, which was under way when the spike was seen; then on from 26, at step 25.
    assert trained_on == [*range(27), *range(26, 32)]
    found = runs.losses(workdir)
    assert list(found) == list(range(1, 31))
    assert max(found.values()) < 10


def test_steps_that_stay_bad_go_back_too(train, workdir, poison):
    poison(not_finite=[5, 6, 7])
    code, _ = train("checkpoint.every=2", "faults.max_bad_steps=3")
    assert code == 0
    (rewind,) = runs.events(workdir, "rewind")
    assert (rewind["details"]["why"], rewind["details"]["next_batch"]) == ("too_many_bad", 8)
    assert list(runs.losses(workdir)) == list(range(1, 13))


@pytest.mark.parametrize("first", [0, 6], ids=["before the first checkpoint", "later"])
def test_a_run_that_cannot_be_saved_gives_up(train, workdir, poison, first):
    poison(not_finite=range(first, 1000))
    code, said = train("faults.max_rewinds=2")
    assert code == 2
    (message,) = [line for line in said.splitlines() if line.startswith("llmos train:")]
    assert "too_many_bad" in message
    assert "after 2 rewinds; the run gives up" in message
    assert "Traceback" not in said
    assert len(runs.events(workdir, "rewind")) == 2
    if first:
        step, found = runs.params(workdir)  # nothing that is kept has gone wrong
        assert step <= first + 2
        assert all(np.isfinite(value).all() for value in found.values())


# Hanging.


def test_a_step_that_hangs_is_reported(train, workdir, monkeypatch):
    read = pipeline._Batches.__getitem__

    def slow(self, number):
        if number == 7:
            time.sleep(3.0)
        return read(self, number)

    monkeypatch.setattr(pipeline._Batches, "__getitem__", slow)
    code, said = train("faults.hang_seconds=1.5", "data.num_threads=0")
    assert code == 0
    (hang,) = runs.events(workdir, "hang")
    assert hang["step"] == 8
    assert hang["details"]["seconds"] >= 1.5
    assert "step 8/12  hang" in said
    assert "_dispatch" in (workdir / "hangs.txt").read_text()  # where it hung
