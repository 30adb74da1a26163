"""What a run writes down while it trains: `metrics.jsonl`, the terminal, TensorBoard and Weights & Biases.

`metrics.jsonl` is the record that everything else can be rebuilt from. One JSON object a line, appended and flushed
a line at a time, so a killed run loses at most the line it was writing:

    {"step": 20, "kind": "train", "loss": 3.21, "tokens_per_second": 51200.0, "time": 1767225600.125}
    {"step": 20, "kind": "eval", "eval_loss": 3.4, "time": 1767225601.5}
    {"step": 20, "kind": "event", "event": "checkpoint_saved", "details": {"seconds": 0.8}, "time": 1767225602.0}

`time` is in seconds since 1970 (UTC). JSON has no word for a number that is not finite: those are the strings "nan",
"inf" and "-inf", and `read_metrics` turns those of train and eval rows back into floats.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmos_jax.config import LogConfig, UserError
from llmos_jax.runtime.workdir import is_remote, read_file, write_file

Row = dict[str, Any]

# Events after which the run goes on from an earlier step, so that what was recorded past it no longer counts.
GOES_BACK = ("resumed", "rewind")
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Sink(Protocol):
    """Somewhere that rows go."""

    name: str

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """The record of one run. Only the primary process writes; on the others every method does nothing.

    Raises UserError if the workdir cannot be written, or if `log.wandb_project` is set and wandb is not installed.
    A place that fails later (a full disk) is reported once and the run goes on: a log is not worth a run.

    A workdir in a bucket (gs://bucket/run) gets `metrics.jsonl` anew every half minute, for the objects of a bucket
    cannot be appended to, and no TensorBoard files.
    """

    def __init__(self, workdir: str | Path, total_steps: int, log: LogConfig, primary: bool) -> None:
        self._sinks: list[Sink] = []
        self._failed: set[str] = set()
        self._lock = threading.Lock()  # checkpoints and the watchdog report from threads of their own
        if not primary:
            return
        try:
            self._open(str(workdir), total_steps, log)
        except BaseException:
            self.close()
            raise

    def _open(self, workdir: str, total_steps: int, log: LogConfig) -> None:
        remote = is_remote(workdir)
        lines = RemoteJsonLines(workdir) if remote else JsonLines(Path(workdir) / "metrics.jsonl")
        self._sinks.append(lines)
        if log.wandb_project:
            self._sinks.append(WeightsAndBiases(workdir, log.wandb_project))
        if log.tensorboard and not remote:
            try:
                self._sinks.append(TensorBoard(Path(workdir) / "tensorboard"))
            except ImportError:
                _notice("TensorBoard files are not written; pip install tensorboardX brings them back")
        bar = sys.stderr.isatty()
        self._sinks.append(ProgressBar(sys.stderr, total_steps) if bar else PlainLines(total_steps, log.every))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Records the training metrics of a finished step: loss, grad_norm, learning_rate, tokens_per_second, mfu
        (0 to 1), step_seconds, data_wait_seconds, device_memory_bytes, tokens_seen; any of them may be missing."""
        self._write(step, "train", {name: float(value) for name, value in values.items()})

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Records held-out metrics after a step: eval_loss (nats a token), perplexity, bits_per_byte."""
        self._write(step, "eval", {name: float(value) for name, value in values.items()})

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Records that something happened: compiled, checkpoint_saved, resumed, skipped_step, spike, rewind, hang,
        stop_requested, finished, ... For `resumed` and `rewind`, `step` is the step that the run goes on from."""
        self._write(step, "event", {"event": kind, "details": details})

    def close(self) -> None:
        for sink in self._sinks:
            self._attempt(sink, sink.close)
        self._sinks = []

    def _write(self, step: int, kind: str, values: Row) -> None:
        row = {"step": int(step), "kind": kind, **values, "time": round(time.time(), 3)}
        with self._lock:
            for sink in self._sinks:
                self._attempt(sink, partial(sink.write, row))

    def _attempt(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if sink.name not in self._failed:
                _notice(f"{sink.name} cannot be written ({error.strerror or error}); the run goes on without it")
            self._failed.add(sink.name)


class JsonLines:
    """Appends rows to a file, starting on a fresh line if the last one was torn by a kill."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(
                f"the workdir {path.parent} cannot be written ({error.strerror}); give another one with --workdir"
            ) from error
        self._torn = self._file.tell() > 0 and not _ends_with_newline(path)

    def write(self, row: Row) -> None:
        line = (b"\n" if self._torn else b"") + json.dumps(_plain(row)).encode() + b"\n"
        self._torn = True
        written = self._file.write(line)
        self._torn = written != len(line)  # a full disk can take half a line without an error

    def close(self) -> None:
        self._file.close()


class RemoteJsonLines:
    """The whole of `metrics.jsonl`, kept in memory and written to a bucket every half minute."""

    name = "metrics.jsonl"
    every = 30.0  # seconds

    def __init__(self, workdir: str) -> None:
        self._workdir = workdir
        try:
            self._text = bytearray(read_file(workdir, self.name) or b"")
            self._send()
        except OSError as error:
            raise UserError(
                f"the workdir {workdir} cannot be written ({error}); give another one with --workdir"
            ) from error

    def write(self, row: Row) -> None:
        self._text += json.dumps(_plain(row)).encode() + b"\n"
        if time.monotonic() - self._sent >= self.every:
            self._send()

    def close(self) -> None:
        self._send()

    def _send(self) -> None:
        self._sent = time.monotonic()
        write_file(self._workdir, self.name, bytes(self._text))


class TensorBoard:
    """Scalars for TensorBoard, as train/loss, eval/eval_loss and so on. Raises ImportError without tensorboardX."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, row: Row) -> None:
        if row["kind"] == "event":
            self._writer.add_text(f"event/{row['event']}", json.dumps(_plain(row["details"])), row["step"])
        for name, value in numbers(row).items():
            self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars for Weights & Biases. The run's id is kept in the workdir, so a resumed run goes on in the same place."""

    name = "Weights & Biases"

    def __init__(self, workdir: str, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"log.wandb_project={project!r} is set but wandb is not installed; "
                "run pip install 'llmos-jax[log]' or set log.wandb_project=''"
            ) from error
        name = workdir.rstrip("/").rsplit("/", 1)[-1]
        known = read_file(workdir, "wandb_id")
        self._run = wandb.init(project=project, name=name, id=known.decode() if known else None, resume="allow")
        write_file(workdir, "wandb_id", self._run.id.encode())
        # A resumed run takes steps again; with a step metric of our own wandb accepts a step that goes back.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        self._run.log({"step": row["step"], **{f"{row['kind']}/{name}": v for name, v in numbers(row).items()}})

    def close(self) -> None:
        self._run.finish()


class PlainLines:
    """One line on stderr every `every` steps, and one for each evaluation and event."""

    name = "terminal"

    def __init__(self, total_steps: int, every: int) -> None:
        self._total, self._every = total_steps, every
        self._start = (-1, 0.0)  # (step, time) of the first row: timed from there, so that compiling is left out

    def write(self, row: Row) -> None:
        if row["kind"] != "train":
            print(describe(row, self._total), file=sys.stderr, flush=True)
            return
        if self._start[0] < 0 or row["step"] < self._start[0]:
            self._start = (row["step"], row["time"])
        if row["step"] % self._every == 0 or row["step"] in (self._start[0], self._total):
            print(describe(row, self._total) + self._remaining(row), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

    def _remaining(self, row: Row) -> str:
        steps, seconds = row["step"] - self._start[0], row["time"] - self._start[1]
        if steps == 0 or row["step"] >= self._total:
            return ""
        return f"  ETA {duration(seconds / steps * (self._total - row['step']))}"


class ProgressBar:
    """A progress bar on a terminal, with evaluations and events printed above it."""

    name = "terminal"

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self._total = total_steps
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            redirect_stdout=False,  # stdout carries the command's result
        )
        self._task = self._progress.add_task("train", total=total_steps, numbers="")
        self._progress.start()

    def write(self, row: Row) -> None:
        if row["kind"] == "train":
            self._progress.update(self._task, completed=row["step"], numbers="  ".join(_train_parts(row)))
            return
        self._progress.console.print(describe(row, self._total), markup=False, highlight=False)
        if row["kind"] == "event" and row["event"] in GOES_BACK:
            self._progress.reset(self._task, completed=row["step"])

    def close(self) -> None:
        self._progress.stop()


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, on disk or in a bucket, in the order they were written; numbers that are not
    finite are floats.

    A torn line, or one that is not a row, is left out; a file that does not exist has no rows. Raises OSError if the
    file cannot be read.
    """
    folder, _, name = str(path).rpartition("/")
    data = read_file(folder or ".", name) or b""
    return parse_metrics(data.decode(errors="replace"))


def parse_metrics(text: str) -> list[Row]:
    """The rows in the text of a `metrics.jsonl`; see `read_metrics`."""
    rows = (_parse(line) for line in text.split("\n"))
    return [row for row in rows if row is not None]


def latest(rows: Iterable[Row], kind: str) -> list[Row]:
    """The rows of `kind` that still count, by step: the last one written for a step, and none that a resume or a
    rewind to an earlier step has undone."""
    kept: dict[int, Row] = {}
    for row in rows:
        if row["kind"] == "event" and row.get("event") in GOES_BACK:
            kept = {step: old for step, old in kept.items() if step <= row["step"]}
        elif row["kind"] == kind:
            kept[row["step"]] = row
    return [kept[step] for step in sorted(kept)]


def numbers(row: Row) -> dict[str, float]:
    """The measured values of a train or eval row, without its step, kind and time."""
    return {k: v for k, v in row.items() if k not in ("step", "time") and isinstance(v, float | int)}


def describe(row: Row, total_steps: int) -> str:
    """`row` as a line for a person."""
    if row["kind"] == "train":
        parts = _train_parts(row)
    elif row["kind"] == "eval":
        names = {"eval_loss": "held-out loss", "bits_per_byte": "bits a byte"}
        parts = [f"{names.get(name, name.replace('_', ' '))} {value:.4g}" for name, value in numbers(row).items()]
    else:
        parts = [row["event"].replace("_", " "), *(f"{k}={show(k, v)}" for k, v in row["details"].items())]
    return "  ".join([f"step {row['step']}/{total_steps}", *parts])


def show(name: str, value: Any) -> str:
    """A value of an event's details for a person: bytes in GiB or MiB, floats with four digits."""
    if isinstance(value, int | float) and name.endswith("bytes") and math.isfinite(value):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compact(value: float) -> str:
    """`value` with three digits and k, M, G, T or P: 51234 is 51.2k."""
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit and math.isfinite(value):
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """0:42, 12:05, 3:07:30 or 2d 03:07."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _train_parts(row: Row) -> list[str]:
    texts = {
        "loss": lambda v: f"loss {v:.4f}",
        "grad_norm": lambda v: f"grad {v:.3g}",
        "learning_rate": lambda v: f"lr {v:.3g}",
        "tokens_per_second": lambda v: f"{compact(v)} tok/s",
        "mfu": lambda v: f"{v:.1%} MFU",
    }
    return [text(row[name]) for name, text in texts.items() if name in row]


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not (isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("kind"), str)):
        return None
    if row["kind"] == "event" and not (isinstance(row.get("event"), str) and isinstance(row.get("details"), dict)):
        return None
    return {name: NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: "nan", "inf" and "-inf" for what is not finite, text for what it does not know."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):  # a NumPy or JAX scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _notice(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
