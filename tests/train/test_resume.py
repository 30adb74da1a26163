"""A run that is killed and started again ends as if nothing had happened: bit for bit, and on another mesh too."""

import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llmos_jax.cli import main
from llmos_jax.train import loop
from tests.end_to_end import runs

STEPS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("resume"))


# Killed.


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def kill(args: list, devices: int, workdir: Path, moment: str, draw: random.Random) -> None:
    """Starts the run, and ends it with SIGKILL at the given kind of moment."""
    process = runs.start(*args, devices=devices)
    compiled = len(runs.events(workdir, "compiled"))
    if moment == "before the first step":
        time.sleep(draw.uniform(0.3, 2.5))
    else:
        runs.wait_until(lambda: len(runs.events(workdir, "compiled")) > compiled, process)
        before = len(runs.losses(workdir))
        runs.wait_until(lambda: len(runs.losses(workdir)) != before, process)
        time.sleep(draw.uniform(0.0, 0.2))
    if moment == "during a save":
        runs.wait_until(lambda: saving(workdir), process, pause=0.0005)
    process.send_signal(signal.SIGKILL)
    assert runs.finish(process)[0] == -signal.SIGKILL


def killed_five_times(config: Path, folder: Path, devices: int, seed: int) -> None:
    draw = random.Random(seed)
    settings = ["--set", f"train.steps={STEPS}"]
    whole, killed = folder / "whole", folder / "killed"
    train = ["train", config, "--workdir", whole, *settings, "checkpoint.every=1000"]
    assert runs.finish(runs.start(*train, devices=devices))[0] == 0
    train = ["train", config, "--workdir", killed, *settings, "checkpoint.every=2"]
    moments = ["before the first step", "during a save", "at any time", "during a save", "at any time"]
    draw.shuffle(moments)
    for moment in moments:
        kill(train, devices, killed, moment, draw)
    code, _, err = runs.finish(runs.start(*train, devices=devices))
    assert code == 0, err
    assert runs.events(killed, "resumed"), "no kill came after a save"
    assert runs.state_bytes(killed) == runs.state_bytes(whole)
    reference = runs.losses(whole)
    every_attempt = [row for row in runs.read_metrics(killed / "metrics.jsonl") if row["kind"] == "train"]
    assert len(reference) == STEPS
    assert {(row["step"], row["loss"]) for row in every_attempt} == set(reference.items())


def test_killed_five_times_it_ends_bit_for_bit_the_same(config, tmp_path):
    with ThreadPoolExecutor() as pool:  # side by side: most of their time is starting up
        for done in [pool.submit(killed_five_times, config, tmp_path / str(n), n, seed=n) for n in (1, 8)]:
            done.result()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_many_more_moments(config, tmp_path, seed):
    killed_five_times(config, tmp_path, devices=1 + 7 * (seed % 2), seed=100 + seed)


# Moved to other meshes.

MESHES = [("data=4", "tensor=2", "fsdp=1"), ("data=2", "tensor=4", "fsdp=1"), ("data=1", "tensor=1", "fsdp=8")]


def train(config: Path, workdir: Path, *settings: str, stop_at: int | None = None) -> None:
    stop = ["--stop-at", str(stop_at)] if stop_at else []
    assert main(["train", str(config), "--workdir", str(workdir), *stop, "--json", "--set", *settings]) == 0


@pytest.mark.usefixtures("eight_devices")
def test_moved_from_mesh_to_mesh_it_takes_the_same_steps(config, tmp_path, monkeypatch):
    """The same rows go to the device in the same order, and the losses agree to 1e-5."""
    seen = watch_batches(monkeypatch)
    moved, still = tmp_path / "moved", tmp_path / "still"
    for i, mesh in enumerate(MESHES):
        train(config, moved, "train.steps=12", *(f"mesh.{axis}" for axis in mesh), stop_at=4 * (i + 1))
    rows_moved = seen.copy()
    seen.clear()
    train(config, still, "train.steps=12")
    assert rows_moved == seen
    assert list(seen) == list(range(12))
    expected, found = runs.losses(still), runs.losses(moved)
    assert list(found) == list(expected) == list(range(1, 13))
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-5)


def watch_batches(monkeypatch) -> dict[int, bytes]:
    """Fills with the rows of every batch that is trained on, by the batch's number."""
    seen: dict[int, bytes] = {}
    dispatch = loop.Loop._dispatch

    def watched(self):
        real, arrived = self.program, {}

        def program(state, batch):
            arrived.update(batch)
            return real(state, batch)

        self.program = program
        try:
            done = dispatch(self)
        finally:
            self.program = real
        seen[done.batch] = b"".join(np.asarray(arrived[name]).tobytes() for name in sorted(arrived))
        return done

    monkeypatch.setattr(loop.Loop, "_dispatch", watched)
    return seen


# Going on for longer.


def test_a_run_may_be_made_longer(config, tmp_path):
    """With the same learning rates so far, a run that was made longer is the longer run."""
    settings = ["optimizer.schedule=wsd", "optimizer.decay_steps=2"]
    longer, once = tmp_path / "longer", tmp_path / "once"
    train(config, once, "train.steps=10", *settings)
    # wsd falls at the end of the shorter run, so that one is stopped before it.
    train(config, longer, "train.steps=8", *settings, stop_at=6)
    train(config, longer, "train.steps=10", *settings)
    assert runs.state_bytes(longer) == runs.state_bytes(once)


def test_a_finished_run_made_longer_goes_on(config, tmp_path, capsys):
    train(config, tmp_path / "w", "train.steps=4")
    train(config, tmp_path / "w", "train.steps=6")
    assert list(runs.losses(tmp_path / "w")) == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / "w")
    train(config, tmp_path / "w", "train.steps=4", "optimizer.schedule=cosine")
    capsys.readouterr()
    arguments = ["train", str(config), "--workdir", str(tmp_path / "w"), "--set", "optimizer.schedule=cosine"]
    assert main([*arguments, "train.steps=6"]) == 2
    assert "train.steps: 4 then, 6 now" in capsys.readouterr().err
