"""The record of a run: what is written, what survives a kill, and what a person sees."""

import errno
import io
import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import LogConfig, UserError
from llmos_jax.runtime import metrics as metrics_module
from llmos_jax.runtime.metrics import Metrics, ProgressBar, compact, describe, duration, latest, numbers, read_metrics

QUIET = LogConfig(every=1000, tensorboard=False)


def train_row(step, **values):
    return {"step": step, "kind": "train", **values, "time": 0.0}


def event_row(step, event):
    return {"step": step, "kind": "event", "event": event, "details": {}, "time": 0.0}


def test_rows_come_back_as_they_were_written(tmp_path):
    metrics = Metrics(tmp_path, 10, QUIET, primary=True)
    metrics.step(1, {"loss": np.float32(2.5), "mfu": 0.4})
    metrics.evaluation(1, {"eval_loss": 2.75})
    metrics.event(1, "checkpoint_saved", seconds=np.float32(0.5), path=tmp_path, sizes=(1, 2))
    metrics.close()
    train, held_out, event = read_metrics(tmp_path / "metrics.jsonl")
    assert numbers(train) == {"loss": 2.5, "mfu": 0.4} and train["kind"] == "train" and train["step"] == 1
    assert numbers(held_out) == {"eval_loss": 2.75} and held_out["kind"] == "eval"
    assert event["event"] == "checkpoint_saved"
    assert event["details"] == {"seconds": 0.5, "path": str(tmp_path), "sizes": [1, 2]}
    assert train["time"] <= held_out["time"] <= event["time"]


def test_each_line_is_on_disk_before_the_run_goes_on(tmp_path):
    metrics = Metrics(tmp_path, 10, QUIET, primary=True)
    metrics.step(1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    metrics.close()


@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_any_float_survives_strict_json(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("run")
    metrics = Metrics(folder, 100, QUIET, primary=True)
    for step, value in enumerate(values):
        metrics._sinks[0].write(train_row(step, loss=value))
    metrics.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    read = [row["loss"] for row in read_metrics(path)]
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(read, values, strict=True))


def test_not_finite_details_of_an_event_are_json(tmp_path):
    metrics = Metrics(tmp_path, 10, QUIET, primary=True)
    metrics.event(3, "skipped_step", loss=math.nan)
    metrics.close()
    assert '"loss": "nan"' in (tmp_path / "metrics.jsonl").read_text()


@given(st.integers(0, 200))
def test_a_line_torn_anywhere_does_not_spoil_its_neighbours(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    first, second = (json.dumps(train_row(step, loss=1.0 / step)) + "\n" for step in (1, 2))
    path.write_text(first + second[: min(cut, len(second))])
    metrics = Metrics(path.parent, 10, QUIET, primary=True)
    metrics.step(3, {"loss": 3.0})
    metrics.close()
    steps = [row["step"] for row in read_metrics(path)]
    assert steps in ([1, 3], [1, 2, 3])
    assert (2 in steps) == (cut >= len(second) - 1)


def test_a_killed_writer_loses_nothing_it_had_written(tmp_path):
    code = """
import os, signal, sys
from llmos_jax.config import LogConfig
from llmos_jax.runtime.metrics import Metrics
metrics = Metrics(sys.argv[1], 10, LogConfig(tensorboard=False), primary=True)
for step in range(1, 6):
    metrics.step(step, {"loss": float(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_reader_leaves_out_what_is_not_a_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(train_row(1, loss=1.0))
    path.write_bytes(b'\xff\xfe\n[]\n3\n{"step": "x", "kind": "train"}\n{"step": 1, "kind": "event"}\n' + good.encode())
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_after_a_resume_the_lost_steps_do_not_count():
    rows = [train_row(s, loss=1.0) for s in (10, 20, 30, 40)]
    rows += [event_row(20, "resumed"), train_row(30, loss=2.0)]
    assert [(r["step"], r["loss"]) for r in latest(rows, "train")] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    rows += [event_row(10, "rewind"), train_row(20, loss=3.0)]
    assert [(r["step"], r["loss"]) for r in latest(rows, "train")] == [(10, 1.0), (20, 3.0)]


def test_the_last_line_for_a_step_counts():
    rows = [train_row(20, loss=1.0), train_row(10, loss=1.0), train_row(20, loss=2.0)]
    assert [(r["step"], r["loss"]) for r in latest(rows, "train")] == [(10, 1.0), (20, 2.0)]


def test_only_the_primary_process_writes(tmp_path, capsys):
    metrics = Metrics(tmp_path / "run", 10, LogConfig(wandb_project="p"), primary=False)
    metrics.step(1, {"loss": 1.0})
    metrics.event(1, "finished")
    metrics.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_plain_lines_every_n_steps(tmp_path, capsys):
    metrics = Metrics(tmp_path, 25, LogConfig(every=10, tensorboard=False), primary=True)
    for step in range(1, 26):
        metrics.step(step, {"loss": 2.0, "tokens_per_second": 51234.0, "mfu": 0.412})
    metrics.evaluation(25, {"eval_loss": 2.25, "perplexity": 9.488})
    metrics.event(25, "checkpoint_saved", bytes=3 * 2**30)
    metrics.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""  # stdout carries the command's result
    assert [line.split("  ")[0] for line in lines[:4]] == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]
    assert lines[1].startswith("step 10/25  loss 2.0000  51.2k tok/s  41.2% MFU  ETA 0:0")
    assert "ETA" not in lines[0] and "ETA" not in lines[3]
    assert lines[4] == "step 25/25  held-out loss 2.25  perplexity 9.488"
    assert lines[5] == "step 25/25  checkpoint saved  bytes=3.00 GiB"


def test_progress_bar_shows_the_numbers_and_prints_events_above(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar = ProgressBar(stream, 50)
    bar.write(train_row(10, loss=3.25, mfu=0.5))
    bar.write(event_row(10, "spike"))
    bar.write(event_row(5, "rewind"))
    bar.write(train_row(6, loss=3.5))
    bar.close()
    text = stream.getvalue()
    assert "step 10/50  spike" in text and "step 5/50  rewind" in text
    assert "loss 3.5000" in text and " 6/50" in text


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path, 10, LogConfig(), primary=True)
    metrics.step(1, {"loss": 1.0})
    metrics.event(1, "finished")
    metrics.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_without_tensorboardx_there_is_one_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    metrics = Metrics(tmp_path, 10, LogConfig(every=1), primary=True)
    for step in (1, 2):
        metrics.step(step, {"loss": 1.0})
    metrics.close()
    assert capsys.readouterr().err.count("tensorboardX") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_wandb_that_is_not_installed_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb_project='mine'.*not installed; run pip install"):
        Metrics(tmp_path, 10, LogConfig(tensorboard=False, wandb_project="mine"), primary=True)


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def define_metric(self, *args, **kwargs):
            pass

        def log(self, values):
            calls.append(values)

        def finish(self):
            calls.append("finish")

    def init(**kwargs):
        calls.append(kwargs["id"])
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = LogConfig(tensorboard=False, wandb_project="mine")
    for step in (20, 10):  # the second run resumes from an earlier step
        metrics = Metrics(tmp_path, 30, log, primary=True)
        metrics.step(step, {"loss": 1.0})
        metrics.close()
    assert calls == [None, {"step": 20, "train/loss": 1.0}, "finish", "abc", {"step": 10, "train/loss": 1.0}, "finish"]


def test_a_workdir_in_a_bucket(tmp_path):
    workdir = f"file://{tmp_path}/run"  # the same driver interface as gs:// and s3://
    for step in (1, 2):  # the second run goes on after the first
        metrics = Metrics(workdir, 10, QUIET, primary=True)
        metrics.step(step, {"loss": float(step)})
        metrics.event(step, "checkpoint_saved")
        metrics.close()
    rows = read_metrics(f"{workdir}/metrics.jsonl")
    assert [(row["step"], row["kind"]) for row in rows] == [(1, "train"), (1, "event"), (2, "train"), (2, "event")]
    assert read_metrics(f"{workdir}/absent.jsonl") == []
    with pytest.raises(UserError, match=r"the workdir bogus://x cannot be written .*--workdir"):
        Metrics("bogus://x", 10, QUIET, primary=True)


def test_a_bucket_that_fails_later_is_reported_once(tmp_path, monkeypatch, capsys):
    metrics = Metrics(f"file://{tmp_path}/run", 10, LogConfig(every=1000, tensorboard=False), primary=True)

    def fail(*_):
        raise OSError("the network is down")

    monkeypatch.setattr(metrics_module.RemoteJsonLines, "every", 0.0)
    monkeypatch.setattr(metrics_module, "write_file", fail)
    metrics.step(2, {"loss": 1.0})
    metrics.step(3, {"loss": 1.0})
    metrics.close()
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written (the network is down)") == 1


def test_a_workdir_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the workdir .* cannot be written .*--workdir"):
        Metrics(tmp_path / "file" / "run", 10, QUIET, primary=True)


def test_a_full_disk_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    metrics = Metrics(tmp_path, 10, LogConfig(every=1, tensorboard=False), primary=True)
    file, full = metrics._sinks[0]._file, [True]

    class Disk:
        def write(self, data):
            if full[0]:
                file.write(data[:9])  # half a line goes through, then there is no room
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(data)

        def close(self):
            file.close()

    monkeypatch.setattr(metrics._sinks[0], "_file", Disk())
    metrics.step(1, {"loss": 1.0})
    metrics.step(2, {"loss": 1.0})
    full[0] = False
    metrics.step(3, {"loss": 1.0})
    metrics.close()
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3]


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (7.125, "7.12"), (999, "999"), (999.6, "1k"), (51234, "51.2k"), (3.5e6, "3.5M"), (7e15, "7P")],
)
def test_compact(value, text):
    assert compact(value) == text


@given(st.floats(min_value=0.001, max_value=1e17))
def test_compact_is_within_half_a_percent(value):
    text = compact(value)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1], 1)
    assert float(text.rstrip("kMGTP")) * scale == pytest.approx(value, rel=0.0051)
    assert len(text) <= 9


@pytest.mark.parametrize("seconds, text", [(-1, "0:00"), (42.4, "0:42"), (725, "12:05"), (11250, "3:07:30")])
def test_duration(seconds, text):
    assert duration(seconds) == text
    assert duration(2 * 86400 + 3 * 3600 + 7 * 60) == "2d 03:07"


def test_describe_leaves_out_what_was_not_measured():
    assert describe(train_row(3, loss=1.0), 9) == "step 3/9  loss 1.0000"
    assert metrics_module.describe(train_row(3, loss=math.nan), 9) == "step 3/9  loss nan"
