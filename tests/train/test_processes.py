"""Two processes of four devices each are one of eight: the same losses, checkpoints that either goes on from, one stop."""

import shutil
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llmos_jax.cli import main
from tests.end_to_end import runs

pytestmark = pytest.mark.usefixtures("eight_devices")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    """A workdir with steps 1 ... 8 of one process, and a checkpoint of step 4."""
    workdir = tmp_path_factory.mktemp("alone") / "w"
    assert main(arguments(config, workdir)) == 0
    shutil.rmtree(workdir / "checkpoints" / "8")
    return workdir


def arguments(config: Path, workdir: Path, *settings: str) -> list[str]:
    # Rows and parameters are split over the processes.
    return [
        "train",
        str(config),
        "--workdir",
        str(workdir),
        "--set",
        "mesh.data=2",
        "mesh.fsdp=4",
        "train.steps=8",
        *settings,
    ]


def start_two(args: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    place = {"LLMOS_COORDINATOR": coordinator, "LLMOS_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    return [runs.start(*args, devices=4, **place, LLMOS_PROCESS_ID=str(i)) for i in (0, 1)]


def finish_both(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    try:
        return [runs.finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_take_the_steps_of_one_which_then_goes_on(config, alone, tmp_path):
    first, second = finish_both(start_two([*arguments(config, tmp_path / "w"), "--stop-at", "4", "--json"]))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].count("\n") == 1  # the answer comes from one of them
    assert second[1] == ""
    assert "loss" not in second[2]
    assert main(arguments(config, tmp_path / "w")) == 0
    assert runs.events(tmp_path / "w", "resumed")[0]["step"] == 4
    expected, found = runs.losses(alone), runs.losses(tmp_path / "w")
    assert list(found) == list(range(1, 9))
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-5)


def test_a_signal_to_one_stops_both(config, alone, tmp_path):
    """They go on from the checkpoint of one process; a signal to the second is heard by the first."""
    workdir = tmp_path / "w"
    shutil.copytree(alone, workdir)
    processes = start_two(arguments(config, workdir, "train.steps=5000", "checkpoint.every=5000"))
    runs.wait_until(lambda: max(runs.losses(workdir)) >= 9 and len(runs.events(workdir, "resumed")) == 1, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    first, second = finish_both(processes)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert runs.events(workdir, "stop_requested")[-1]["details"] == {"signal": "SIGTERM"}
    found = runs.losses(workdir)
    assert runs.params(workdir)[0] == max(found) < 5000
    expected = runs.losses(alone)
    np.testing.assert_allclose([found[step] for step in expected], [*expected.values()], rtol=1e-5)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"LLMOS_COORDINATOR": "127.0.0.1:1"},
            "LLMOS_COORDINATOR is set but not LLMOS_NUM_PROCESSES, LLMOS_PROCESS_ID",
        ),
        (
            {"LLMOS_COORDINATOR": "127.0.0.1:1", "LLMOS_NUM_PROCESSES": "2", "LLMOS_PROCESS_ID": "2"},
            "LLMOS_PROCESS_ID=2 must be below LLMOS_NUM_PROCESSES=2",
        ),
        (
            {"LLMOS_COORDINATOR": "127.0.0.1:1", "LLMOS_NUM_PROCESSES": "two", "LLMOS_PROCESS_ID": "0"},
            "are whole numbers, not two and 0",
        ),
    ],
)
def test_a_place_that_is_not_one(config, tmp_path, monkeypatch, capsys, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(arguments(config, tmp_path / "w")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
