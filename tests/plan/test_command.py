"""`llmos plan` as it is called: exit codes, one JSON object, pages and comparisons, messages."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from llmos_jax import cli
from llmos_jax.compiler import target as targets
from llmos_jax.plan import search
from llmos_jax.plan.search import Tried

CONFIG = """
from llmos_jax.config import RunConfig, TrainConfig
from tests import tiny

def get_config():
    return RunConfig(model=tiny.model(dtype="float32"), train=TrainConfig(batch_size=16, seq_len=16, steps=30))
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def plan(*arguments: str, code: int = 0) -> None:
    assert cli.main(["plan", *map(str, arguments)]) == code


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs of which a program may take 1 kB."""
    real = targets.measured_cpu
    monkeypatch.setattr(targets, "measured_cpu", lambda n: dataclasses.replace(real(n), usable_bytes=1e3))


def answered(capsys: pytest.CaptureFixture[str]) -> dict:
    """The answer, which is all of standard output."""
    return json.loads(capsys.readouterr().out)


def test_json_is_one_object(config: str, capsys: pytest.CaptureFixture[str]):
    plan(config, "--target", "cpu:8", "--json")
    value = answered(capsys)
    [report] = value["reports"]
    assert report["fits"] is True and report["target"] == "cpu:8" and report["program"] == "train"
    assert list(report["estimates"]) == ["analytic", "roofline", "schedule"] and value["advice"] == {}


def test_a_page_tells_verdict_memory_and_time(config: str, capsys: pytest.CaptureFixture[str]):
    plan(config, "--target", "cpu:8", "--price", "3")
    page = capsys.readouterr().out
    for part in ("train on cpu:8 (8 chips; fsdp 8): fits", "parameters", "optimizer state", "temporaries", "tokens/s"):
        assert part in page
    assert "a million tokens" in page and "for 30 steps" in page


def test_this_machine_is_the_default_target(config: str, capsys: pytest.CaptureFixture[str]):
    plan(config, "--json", "--set", "mesh.fsdp=4", "mesh.tensor=2")
    [report] = answered(capsys)["reports"]
    assert report["target"] == "local" and report["mesh"] == {"fsdp": 4, "tensor": 2}


def test_what_does_not_fit_exits_with_3_and_advice(config: str, small_memory, capsys: pytest.CaptureFixture[str]):
    plan(config, "--target", "cpu:8", "--json", code=3)
    value = answered(capsys)
    assert value["reports"][0]["fits"] is False and list(value["advice"]) == ["cpu:8"]
    plan(config, "--target", "cpu:8", "--json", "--no-advice", code=3)
    assert answered(capsys)["advice"] == {}
    plan(config, "--target", "cpu:8", code=3)
    page = capsys.readouterr().out
    assert "does not fit" in page and "nothing that is known makes it fit cpu:8" in page


def test_several_targets_stand_side_by_side(config: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    """A mesh that does not divide a target's devices is given up there for one that does."""
    monkeypatch.setenv("COLUMNS", "160")
    settings = ["--set", "mesh.fsdp=8", "mesh.data=1"]
    plan(config, "--compare", "cpu:8,cpu:4", "--json", *settings)
    reports = answered(capsys)["reports"]
    assert [(one["target"], one["mesh"]) for one in reports] == [("cpu:8", {"fsdp": 8}), ("cpu:4", {"fsdp": 4})]
    plan(config, "--compare", "cpu:8,cpu:4", *settings)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == ["target", "cpu:8", "cpu:4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "v99:8"], r"target 'v99:8' is not known; use local"),
        (["--target", "cpu:2x2"], r"takes one number"),
        (
            ["--target", "cpu:64", "--set", "mesh.data=64", "mesh.fsdp=1", "train.batch_size=64"],
            r"needs 64 simulated devices.*XLA_FLAGS",
        ),
        (["--target", "cpu:8", "--set", "mesh.fsdp=3"], r"mesh axes multiply to 3 but there are 8 devices"),
        (["--target", "cpu:8", "--set", "train.batch_size=7"], r"batch_size=7"),
    ],
)
def test_a_mistake_is_one_sentence_and_exits_with_2(
    config: str, arguments, message, capsys: pytest.CaptureFixture[str]
):
    plan(config, *arguments, code=2)
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    assert re.search(message, " ".join(shown.err.split()))


# ------------------------------------------------------------------------------------------------------------- search


def answering(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    found = {"fits": fits, "step_seconds": 0.5, "mfu": 0.25, "peak_bytes": 2.0**30}
    monkeypatch.setattr(search, "_plan_apart", lambda candidate, *rest: Tried(candidate, found))


def test_a_search_ends_with_the_line_to_set(config: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    answering(monkeypatch, fits=True)
    arguments = ["--target", "cpu:8", "--search", "--compile", "2", "--jobs", "1"]
    plan(config, *arguments, "--json")
    value = answered(capsys)
    assert len(value["tried"]) == 2 and value["stopped"] is False and value["scored"] >= value["possible"] > 2
    assert value["best"] == " ".join(value["tried"][0]["settings"])
    plan(config, *arguments)
    page = " ".join(capsys.readouterr().out.split())
    assert f"--set {value['best']}" in page and "2 compiled" in page


def test_a_search_that_finds_nothing_exits_with_3(config: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    answering(monkeypatch, fits=False)
    arguments = ["--target", "cpu:8", "--search", "--compile", "1", "--jobs", "1"]
    plan(config, *arguments, "--json", code=3)
    assert answered(capsys)["best"] is None
    plan(config, *arguments, code=3)
    assert "nothing that was compiled fits" in capsys.readouterr().out


def test_the_line_to_set_can_be_set(config: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    """What a search answers with is understood by the command that it is meant for, and gives the same mesh."""
    answering(monkeypatch, fits=True)
    plan(config, "--target", "cpu:8", "--search", "--compile", "1", "--json")
    best = answered(capsys)["best"].split()
    plan(config, "--target", "cpu:8", "--json", "--set", *best)
    sizes = {s.split("=")[0].removeprefix("mesh."): int(s.split("=")[1]) for s in best if s.startswith("mesh.")}
    assert answered(capsys)["reports"][0]["mesh"] == {axis: size for axis, size in sizes.items() if size > 1}
