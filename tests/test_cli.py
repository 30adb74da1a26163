"""The command line as a user has it: from training to the exported model, JSON, start-up time, no compiling on the way."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llmos_jax import cli, opening
from llmos_jax.runtime.metrics import read_metrics
from llmos_jax.train import loop
from tests import tiny
from tests.end_to_end import runs


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def trained(config) -> Path:
    workdir = config.parent / "trained"
    assert cli.main(["train", str(config), "--workdir", str(workdir), "--set", "train.steps=30"]) == 0
    return workdir


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    folder = trained.parent / "exported"
    assert cli.main(["export", str(trained), "--to", str(folder)]) == 0
    return folder


@pytest.fixture
def llmos(capfd):
    """Runs a command in this process; gives what it wrote to standard output, down to the file descriptor."""

    def llmos(*arguments, code: int = 0) -> str:
        capfd.readouterr()
        assert cli.main([str(a) for a in arguments]) == code
        return capfd.readouterr().out

    return llmos


@pytest.fixture
def ask(llmos):
    """Runs a command with --json; gives the object, which must be all of standard output."""

    def ask(*arguments) -> dict:
        out = llmos(*arguments, "--json")
        assert out.count("\n") == 1

        def refuse(word: str):
            raise AssertionError(f"{word} is not JSON")

        return json.loads(out, parse_constant=refuse)

    return ask


# The whole way.


def test_from_a_trained_run_to_the_exported_model(trained, exported, ask, config):
    """The workdir, the folder exported from it and the pulled folder are one model."""
    ask("pull", exported, "--name", "exported-tiny")
    answers = [ask("generate", m, "the cat", "--max-tokens", 12) for m in (trained, exported, "exported-tiny")]
    assert answers[0]["text"] == answers[1]["text"] == answers[2]["text"]
    assert answers[0]["tokens"] == answers[1]["tokens"] == answers[2]["tokens"]
    assert len(answers[0]["tokens"]) == 12
    corpus = config.parent / "corpus"
    measured = [
        ask("eval", m, "--data", corpus, "--seq-len", 32, "--batches", 2) for m in (trained, exported, "exported-tiny")
    ]
    assert measured[0]["eval_loss"] == measured[1]["eval_loss"] == measured[2]["eval_loss"]
    assert measured[0]["eval_loss"] < 0.8 * math.log(312)
    for values in measured:
        assert values["perplexity"] == pytest.approx(math.exp(values["eval_loss"]))
    ids = [model["name"] for model in ask("models")["models"]]
    assert "exported-tiny" in ids


def test_evaluating_afterwards_and_at_the_end_of_the_run_agree(config, tmp_path, ask):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(" ".join(runs.WORDS) * 20)
    settings = [f"data.eval_sources={held_out}", "data.eval_fraction=0", "train.eval_batches=1000"]
    summary = ask("train", config, "--workdir", tmp_path / "w", "--set", *settings)
    measured = ask("eval", tmp_path / "w", "--data", held_out, "--seq-len", 32, "--batches", 1000)
    for name, value in summary["evaluation"].items():
        assert name == "step" or measured[name] == pytest.approx(value, rel=1e-5)


def test_what_is_exported_comes_back_bit_for_bit(trained, exported):
    _, written = runs.params(trained)
    source = opening.find(str(exported))
    read = opening.weights_of(source, source.model, tiny.mesh(data=1))
    assert source.model == opening.find(str(trained)).model
    assert read.keys() == written.keys()
    for name, value in written.items():
        assert np.asarray(read[name]).tobytes() == value.tobytes(), name


def test_exported_again_the_files_are_the_same(exported, llmos, tmp_path):
    llmos("export", exported, "--to", tmp_path / "again")
    for file in exported.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_starts_from_an_exported_model(exported, trained, config, tmp_path, ask):
    settings = [f"init_from={exported}", "data.tokenizer=", "data.tokenizer_vocab_size=0", "train.steps=2"]
    ask("train", config, "--workdir", tmp_path / "w", "--set", *settings)
    first = runs.losses(tmp_path / "w")[1]
    assert first < 1.05 * runs.losses(trained)[30]


# Standard output.


def test_a_finished_run_told_to_train_says_what_it_has(trained, config, ask):
    before = {path: path.read_bytes() for path in (trained / "checkpoints").rglob("*") if path.is_file()}
    summary = ask("train", config, "--workdir", trained, "--set", "train.steps=30")
    assert (summary["step"], summary["stopped"]) == (30, False)
    assert summary["loss"] == runs.losses(trained)[30]
    assert before == {path: path.read_bytes() for path in (trained / "checkpoints").rglob("*") if path.is_file()}


def test_doctor_and_data_answer_in_json(config, ask):
    assert ask("doctor")["ok"] is True
    assert ask("data", config)


def test_a_configuration_in_json_and_explained(config, ask, llmos):
    found = ask("config", config, "--set", "train.steps=7", "mesh.tensor=2")
    assert found["train.steps"] == {"value": 7, "source": "command line"}
    assert found["train.batch_size"] == {"value": 8, "source": "default"}
    assert found["train.seq_len"] == {"value": 32, "source": "run.py"}
    explained = llmos("config", config, "--explain", "--set", "train.steps=7")
    (line,) = [line for line in explained.splitlines() if line.startswith("train.steps ")]
    assert line.split() == ["train.steps", "7", "command", "line"]
    assert len(explained.splitlines()) == len(found)
    plain = llmos("config", config)
    assert "train.seq_len" in plain
    assert "optimizer.eps" not in plain  # a default


def test_text_is_streamed_as_the_json_has_it(trained, ask, llmos):
    options = ("generate", trained, "the dog", "--max-tokens", 20, "--temperature", 1, "--seed", 5)
    value = ask(*options)
    assert llmos(*options) == value["text"] + "\n"
    assert value["finish_reason"] == "length"
    assert len(value["tokens"]) == 20
    again = ask("generate", trained, "the dog", "--max-tokens", 20, "--temperature", 1, "--seed", 6)
    assert again["tokens"] != value["tokens"]


def test_an_answer_ends_with_the_context(trained, ask):
    value = ask("generate", trained, "the cat", "--max-tokens", 10_000)
    assert value["prompt_tokens"] + len(value["tokens"]) <= 64
    assert value["finish_reason"] in ("length", "stop")
    if value["prompt_tokens"] + len(value["tokens"]) == 64:
        assert value["finish_reason"] == "length"


def test_a_number_that_is_not_finite_is_null_in_json(config, tmp_path, ask):
    settings = ["optimizer.learning_rate=1e38", "optimizer.clip_norm=0", "faults.max_bad_steps=100"]
    summary = ask("train", config, "--workdir", tmp_path / "w", "--set", *settings, "optimizer.name=sgd")
    assert summary["loss"] is None
    assert summary["evaluation"]["eval_loss"] is None


# Start-up.


@pytest.mark.timed
def test_help_is_quick_and_loads_no_jax():
    code = (
        "import sys; from llmos_jax.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print([m for m in ('jax', 'numpy', 'rich', 'tensorstore') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")
    assert all(name in shown for name in ("doctor", "pull", "train", "generate", "eval", "export"))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llmos_jax.cli", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.3


# Compiling.


def test_nothing_is_compiled_in_the_loop(config, tmp_path, monkeypatch):
    """After the first step, evaluation and save, a step runs what was compiled before it."""
    compiled: list[tuple[int, str]] = []
    step = 0

    def listen(name: str, _seconds: float, **_) -> None:
        if name in ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"):
            compiled.append((step, name))

    dispatch = loop.Loop._dispatch

    def watched(self):
        nonlocal step
        step = self.step + 1
        return dispatch(self)

    monkeypatch.setattr(loop.Loop, "_dispatch", watched)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        settings = ["train.steps=20", "train.eval_every=4", "checkpoint.every=4", "seed=3"]
        assert cli.main(["train", str(config), "--workdir", str(tmp_path / "w"), "--set", *settings]) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert any(step == 0 for step, _ in compiled)
    # Up to step 4 things are met for the first time, the last of them the evaluation and the save after it.
    assert not [entry for entry in compiled if entry[0] not in (0, 1, 4)]


def test_metrics_are_there_for_every_step(trained):
    rows = [row for row in read_metrics(trained / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 31))
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds", "tokens_seen", "mfu"):
        assert all(math.isfinite(row[name]) for row in rows), name
    assert rows[-1]["tokens_seen"] == sum(row["tokens"] for row in rows)
    assert (trained / "report.html").stat().st_size > 1000


def test_a_workdir_may_be_named_from_here(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(config), "--workdir", "here", "--stop-at", "4"]) == 0
    assert cli.main(["train", str(config), "--workdir", "here"]) == 0
    assert runs.params(Path("here"))[0] == 12
    shutil.rmtree("here")
