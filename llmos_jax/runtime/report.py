"""The page that tells a person how a run went: `report.html`, made from what the run left in its workdir.

The page is one file that loads nothing else. It is made from `metrics.jsonl`, `config.json` (the resolved
configuration) and, where it exists, `samples.jsonl` (one `{"step": 100, "prompt": "...", "text": "..."}` a line).
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from llmos_jax.config import UserError
from llmos_jax.runtime import charts
from llmos_jax.runtime.charts import Chart, Mark, Series
from llmos_jax.runtime.metrics import Row, compact, duration, latest, numbers, parse_metrics, show
from llmos_jax.runtime.report_style import PAGE
from llmos_jax.runtime.workdir import is_remote, read_file, write_file

# Events: (what a person calls it, colour, whether it is drawn as a small tick). Others appear in the table only.
EVENT_MARKS = {
    "checkpoint_saved": ("checkpoint", "--good", True),
    "resumed": ("resumed", "--line-1", False),
    "skipped_step": ("skipped step", "--warn", False),
    "spike": ("loss spike", "--warn", False),
    "rewind": ("rewind", "--bad", False),
    "hang": ("hang", "--bad", False),
    "stop_requested": ("stop requested", "--note", False),
}
MOST_EVENTS = 200  # rows of the table of events
MOST_SAMPLES = 12
SMOOTH_FROM = 30  # points; a shorter curve is drawn as it is


@dataclass(frozen=True)
class Panel:
    """A small chart of train metrics, each `factor` times what was recorded, smoothed where it is `noisy`."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]  # (metric, what a person calls it)
    factor: float = 1.0
    from_zero: bool = True
    noisy: bool = True


PANELS = (
    Panel("Gradient norm", "", (("grad_norm", "gradient norm"),), from_zero=False),
    Panel("Learning rate", "", (("learning_rate", "learning rate"),), noisy=False),
    Panel("Throughput", "tokens/s", (("tokens_per_second", "tokens/s"),)),
    Panel("Model FLOPs utilization", "%", (("mfu", "MFU"),), factor=100.0),
    Panel("Step time", "s", (("step_seconds", "step"), ("data_wait_seconds", "waiting for data"))),
    Panel("Device memory", "GiB", (("device_memory_bytes", "in use"),), factor=2.0**-30, noisy=False),
)


def write_report(workdir: str | Path, summary: Mapping[str, Any] | None = None) -> str | Path:
    """Writes `report.html` into `workdir`, whole or not at all, and returns where it is: a path, or the address of one
    in a bucket.

    summary: what else a reader should know, as label -> value, or label -> {label: value} for a block of its own:
    model size, devices, memory plan. Raises UserError if the workdir holds no run or cannot be written.
    """
    metrics, config_text = _read(workdir, "metrics.jsonl"), _read(workdir, "config.json")
    if metrics is None and config_text is None:
        raise UserError(
            f"{workdir} has no metrics.jsonl and no config.json; give the folder that llmos train had as --workdir"
        )
    config = _parse_config(config_text or "{}", workdir)
    rows = parse_metrics(metrics or "")
    page = PAGE.format(
        title=escape(_name(config, workdir)),
        theme=f":root{{color-scheme:light dark;{charts.LIGHT}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{charts.DARK}}}}}{charts.STYLE}",
        header=_header(config, rows, workdir),
        tiles=_tiles(config, rows),
        charts=_charts(rows),
        events=_events(rows),
        samples=_samples(_read(workdir, "samples.jsonl") or ""),
        summary=_tables("What ran", summary or {}),
        config=_tables("Configuration", config),
    )
    try:
        write_file(workdir, "report.html", page.encode())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{workdir}/report.html cannot be written ({reason}); check the space and the rights"
        ) from error
    return f"{str(workdir).rstrip('/')}/report.html" if is_remote(workdir) else Path(workdir) / "report.html"


def loss_chart_svg(workdir: str | Path) -> str:
    """The training and held-out loss of a run as an SVG that stands alone, for a notebook or a README."""
    rows = parse_metrics(_read(workdir, "metrics.jsonl") or "")
    return _loss_chart(rows, style=charts.standalone_style()).svg


def _read(workdir: str | Path, name: str) -> str | None:
    """The text of a file of the workdir, or None where there is none."""
    try:
        data = read_file(workdir, name)
    except OSError as error:
        raise UserError(f"{workdir}/{name} cannot be read ({error.strerror or error}); check the rights") from error
    return None if data is None else data.decode(errors="replace")


def _parse_config(text: str, workdir: str | Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"{workdir}/config.json is not JSON ({error}); the run wrote it, so restore it") from error
    return config if isinstance(config, dict) else {}


def _name(config: Mapping[str, Any], workdir: str | Path) -> str:
    return str(config.get("name") or str(workdir).rstrip("/").rsplit("/", 1)[-1])


def _header(config: Mapping[str, Any], rows: Sequence[Row], workdir: str | Path) -> str:
    state, css = _state(rows)
    when = f"{_clock(rows[0])} to {_clock(rows[-1])} UTC" if rows else "nothing recorded"
    start = f" · started from {escape(str(config['init_from']))}" if config.get("init_from") else ""
    return (
        f'<h1>{escape(_name(config, workdir))} <span class="state {css}">{state}</span></h1>'
        f'<p class="sub">{when}{start}</p><p class="sub mono">{escape(str(workdir))}</p>'
    )


def _state(rows: Sequence[Row]) -> tuple[str, str]:
    """Where the run stands (text, CSS class), by the last event that says so."""
    for row in reversed(rows):
        if row["kind"] == "train":
            return "not finished", "open"
        if row["kind"] == "event" and row["event"] == "finished":
            return "finished", "done"
        if row["kind"] == "event" and row["event"] == "stop_requested":
            return "stopped, can be resumed", "open"
    return "no steps yet", "open"


def _tiles(config: Mapping[str, Any], rows: Sequence[Row]) -> str:
    train, evals = latest(rows, "train"), latest(rows, "eval")
    tiles: list[tuple[str, str, str]] = []  # label, figure, note
    if train:
        planned = (config.get("train") or {}).get("steps")
        tiles.append(("Steps", f"{train[-1]['step']:,}", f"of {planned:,}" if isinstance(planned, int) else ""))
        loss = next((r["loss"] for r in reversed(train) if "loss" in r), None)
        if loss is not None:
            tiles.append(("Training loss", f"{loss:.4f}", f"from {train[0].get('loss', math.nan):.4f}"))
    scored = [row for row in evals if math.isfinite(row.get("eval_loss", math.nan))]
    if scored:
        best = min(scored, key=lambda row: row["eval_loss"])
        note = "the best so far" if best is scored[-1] else f"best {best['eval_loss']:.3f} at {compact(best['step'])}"
        tiles.append(("Held-out loss", f"{scored[-1]['eval_loss']:.4f}", note))
        if "perplexity" in scored[-1]:
            note = f"{scored[-1]['bits_per_byte']:.3f} bits a byte" if "bits_per_byte" in scored[-1] else ""
            tiles.append(("Perplexity", f"{scored[-1]['perplexity']:.4g}", note))
    if train and "tokens_seen" in train[-1]:
        tiles.append(("Tokens", compact(train[-1]["tokens_seen"]), ""))
    rates = _finite(train, "tokens_per_second")
    if rates:
        mfu = _finite(train, "mfu")
        note = f"{statistics.median(mfu):.1%} MFU" if mfu else "median"
        tiles.append(("Tokens/s", compact(statistics.median(rates)), note))
    if len(rows) > 1:
        resumes = sum(row["kind"] == "event" and row["event"] == "resumed" for row in rows)
        tiles.append(("Time", duration(_running_seconds(rows)), f"{resumes} resumed" if resumes else ""))
    return "".join(
        f'<div class="tile"><span>{label}</span><b>{figure}</b><small>{note}</small></div>'
        for label, figure, note in tiles
    )


def _charts(rows: Sequence[Row]) -> str:
    train = latest(rows, "train")
    if not train and not latest(rows, "eval"):
        return '<p class="empty">No steps have been recorded yet.</p>'
    loss = _loss_chart(rows)
    figures = [_figure("Loss", "nats a token", loss, "wide")] if loss.points else []
    for panel in PANELS:
        series: list[Series] = []
        for (metric, name), color in zip(panel.metrics, ("--line-1", "--line-2"), strict=False):
            kept = [(row["step"], panel.factor * row[metric]) for row in train if metric in row]
            series += _curve(name, kept, color, panel.noisy)
        if series:
            chart = charts.draw(series, _marks(rows), label=f"{panel.title} by step", from_zero=panel.from_zero)
            figures.append(_figure(panel.title, panel.unit, chart))
    return f'{_mark_legend(rows)}<div class="charts">{"".join(figures)}</div>'


def _loss_chart(rows: Sequence[Row], style: str = "") -> Chart:
    train = [(row["step"], row["loss"]) for row in latest(rows, "train") if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in latest(rows, "eval") if "eval_loss" in row]
    series = _curve("training", train, "--line-1")
    if held_out:
        steps, values = zip(*held_out, strict=True)
        series.append(Series("held-out", steps, values, "--line-2", dots=True))
    label = "Training and held-out loss by step"
    return charts.draw(series, _marks(rows), label=label, width=1140, height=320, style=style)


def _curve(name: str, points: Sequence[tuple[int, float]], color: str, noisy: bool = True) -> list[Series]:
    """A curve; a noisy one that has points enough gets its smoothing, over a hundredth of them, drawn in front."""
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    if not noisy or len(points) < SMOOTH_FROM:
        return [Series(name, steps, values, color)]
    smoothed = charts.smooth(values, span=max(3.0, len(values) / 100))
    return [Series(name, steps, values, color, faint=True), Series(name, steps, smoothed, color)]


def _figure(title: str, unit: str, chart: Chart, css: str = "") -> str:
    names = [f'<i style="--c:var({color})">{escape(name)}</i>' for name, color, _ in chart.points]
    legend = "".join(names) if len(names) > 1 else ""
    points = [[n, c, [[x, t, float(f"{v:.6g}")] for x, t, v in p]] for n, c, p in chart.points]
    data = json.dumps(points, separators=(",", ":")).replace("<", "\\u003c")
    unit_note = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<figure class="{css}"><figcaption>{escape(title)}{unit_note}<span class="legend">{legend}</span></figcaption>'
        f'<div class="plot">{chart.svg}<output></output></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def _marks(rows: Sequence[Row]) -> list[Mark]:
    marks = []
    for row in rows:
        if row["kind"] == "event" and row["event"] in EVENT_MARKS:
            name, color, minor = EVENT_MARKS[row["event"]]
            marks.append(Mark(row["step"], f"{name} at step {row['step']}", color, minor))
    return marks


def _mark_legend(rows: Sequence[Row]) -> str:
    seen = {row["event"] for row in rows if row["kind"] == "event"}
    items = [
        f'<i class="{"tick" if minor else "line"}" style="--c:var({color})">{name}</i>'
        for event, (name, color, minor) in EVENT_MARKS.items()
        if event in seen
    ]
    return f'<p class="legend marks">{"".join(items)}</p>' if items else ""


def _events(rows: Sequence[Row]) -> str:
    events = [row for row in rows if row["kind"] == "event"]
    if not events:
        return ""
    lines = []
    for row in events[-MOST_EVENTS:]:
        name = row["event"].replace("_", " ")
        _, color, _ = EVENT_MARKS.get(row["event"], ("", "--axis", True))
        details = ", ".join(f"{k.replace('_', ' ')} {show(k, v)}" for k, v in row["details"].items())
        lines.append(
            f'<tr><td class="num">{row["step"]:,}</td><td>{_clock(row)}</td>'
            f'<td><i style="--c:var({color})">{escape(name)}</i></td><td>{escape(details)}</td></tr>'
        )
    left = len(events) - MOST_EVENTS
    note = (
        f'<p class="sub">The last {MOST_EVENTS} of {len(events):,}; all are in metrics.jsonl.</p>' if left > 0 else ""
    )
    return (
        f'<section><h2>Events</h2>{note}<div class="scroll"><table class="events">'
        '<thead><tr><th class="num">Step</th><th>Time (UTC)</th><th>Event</th><th>Details</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _samples(text: str) -> str:
    samples = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "text" in row:
            samples.append(row)
    cards = "".join(
        f"<article><small>step {escape(str(row.get('step', '?')))}</small>"
        f"<p><b>{escape(str(row.get('prompt', '')))}</b>{escape(str(row['text']))}</p></article>"
        for row in reversed(samples[-MOST_SAMPLES:])
    )
    return f'<section><h2>Samples</h2><div class="samples">{cards}</div></section>' if cards else ""


def _tables(title: str, values: Mapping[str, Any]) -> str:
    """`values` as tables of name and value: one for the plain entries, one for each nested mapping."""
    blocks = {"": {k: v for k, v in values.items() if not isinstance(v, Mapping)}}
    blocks |= {k: dict(v) for k, v in values.items() if isinstance(v, Mapping)}
    cards = "".join(
        f'<div class="pairs">{f"<h3>{escape(name.replace(chr(95), chr(32)))}</h3>" if name else ""}<table>'
        + "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _flat(block))
        + "</table></div>"
        for name, block in blocks.items()
        if block
    )
    return f'<section><h2>{title}</h2><div class="tables">{cards}</div></section>' if cards else ""


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of every leaf of a nested value; a list of plain values is one leaf."""
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return [(prefix, text or "(empty)")]
    return [pair for name, v in items for pair in _flat(v, f"{prefix}.{name}" if prefix else name)]


def _running_seconds(rows: Sequence[Row]) -> float:
    """Seconds between the first row and the last, without the pauses that ended in a resume."""
    total = 0.0
    for before, after in itertools.pairwise(rows):
        pause = after["kind"] == "event" and after["event"] == "resumed"
        total += 0.0 if pause else max(0.0, after.get("time", 0.0) - before.get("time", 0.0))
    return total


def _finite(rows: Sequence[Row], metric: str) -> list[float]:
    return [value for row in rows if math.isfinite(value := numbers(row).get(metric, math.nan))]


def _clock(row: Row) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row.get("time", 0)))
