"""Line charts as SVG: numbers in, text out. Colours come from CSS variables, so a page decides how they look."""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

GAP = math.nan  # a value that breaks a line

# Variables of the light and the dark theme; a page or a stand-alone chart puts them on :root or on its svg.
LIGHT = (
    "--surface:#fff;--page:#f6f7f9;--ink:#14181f;--ink-2:#565f6d;--grid:#e6e9ee;--axis:#b9c0ca;--line-1:#2563c9;"
    "--line-2:#d9601a;--good:#1d7f47;--warn:#a86500;--bad:#c62f3b;--note:#7446c4"
)
DARK = (
    "--surface:#181b21;--page:#0f1115;--ink:#eceff4;--ink-2:#a2acba;--grid:#272c35;--axis:#4a525f;--line-1:#6ea3f5;"
    "--line-2:#f2935a;--good:#4cbf80;--warn:#e0a33a;--bad:#f0707a;--note:#b294f0"
)
STYLE = """
.chart text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink-2)}
.chart .grid{stroke:var(--grid);stroke-width:1}.chart .axis{stroke:var(--axis);stroke-width:1}
.chart path,.chart polyline{fill:none;stroke-linejoin:round;stroke-linecap:round;vector-effect:non-scaling-stroke}
.chart .mark{stroke-width:1;stroke-dasharray:3 3}.chart .cursor{stroke:var(--ink-2);stroke-width:1}
"""

_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 14, 34  # margins of the plot in pixels


@dataclass(frozen=True)
class Series:
    """One line. `steps` ascend; a value that is not finite is a gap, shown by a cross at the foot of the plot."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    color: str = "--line-1"
    faint: bool = False  # drawn behind, as the noise around a smoothed line
    dots: bool = False  # each point is shown


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step. A `minor` one is a tick on the axis, others cross the plot."""

    step: int
    label: str
    color: str
    minor: bool = False


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Chart:
    """A drawn chart: the SVG, and the points as drawn for a read-out: (name, color, [x pixel, step, value])."""

    svg: str
    points: list[tuple[str, str, list[tuple[float, int, float]]]]


def draw(
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    *,
    label: str,
    width: int = 560,
    height: int = 220,
    from_zero: bool = False,
    style: str = "",
) -> Chart:
    """Draws `series` over their steps; a value axis that spans more than two decades is logarithmic.

    label: what the chart shows, for a screen reader. from_zero: the value axis starts at 0. style: CSS for an SVG that
    stands alone; it then has its own legend.
    """
    plot_w, plot_h = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    drawn = [thin(s, plot_w) for s in series]
    finite = [v for s in drawn for v in s.values if math.isfinite(v)]
    x_axis = step_axis([step for s in drawn for step in s.steps], max(2, plot_w // 90))
    y_axis = value_axis(finite, max(2, plot_h // 36), from_zero)

    def x(step: float) -> float:
        return round(_LEFT + x_axis.place(step) * plot_w, 1)

    def y(value: float) -> float:
        return round(_TOP + (1 - y_axis.place(value)) * plot_h, 1)

    foot = _TOP + plot_h
    parts = [_grid(y_axis, y, width), _steps(x_axis, x, foot, width)]
    parts += _marks([m for m in marks if x_axis.low <= m.step <= x_axis.high], x, foot)
    for s in drawn:
        parts += _line(s, x, y, foot)
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{foot}" visibility="hidden"/>')
    css = f"<style>{style}</style>{_legend(drawn, width)}" if style else ""
    svg = (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{css}{"".join(parts)}</svg>'
    )
    readable = [s for s in drawn if not s.faint] or drawn
    points = [
        (s.name, s.color, [(x(t), t, v) for t, v in zip(s.steps, s.values, strict=True) if math.isfinite(v)])
        for s in readable
    ]
    return Chart(svg, points)


def standalone_style() -> str:
    """CSS for an SVG outside a page, in the reader's light or dark theme."""
    return (
        f"svg.chart{{{LIGHT};background:var(--surface)}}@media(prefers-color-scheme:dark){{svg.chart{{{DARK}}}}}{STYLE}"
    )


def smooth(values: Sequence[float], span: float) -> list[float]:
    """A moving average over about `span` values on either side, by exponential weights in both directions, so that it
    does not lag. Gaps stay gaps and do not count."""
    forward = _average(values, span)
    backward = _average(values[::-1], span)[::-1]
    return [(a + b) / 2 for a, b in zip(forward, backward, strict=True)]


def thin(series: Series, columns: int) -> Series:
    """`series` with at most five points a column of pixels: its ends, its lowest and highest, and one gap."""
    if len(series.steps) <= 2 * columns:
        return series
    first, last = series.steps[0], series.steps[-1]
    chosen: list[int] = []
    begin = 0
    for column in range(columns):
        end = bisect.bisect_right(series.steps, first + (last - first) * (column + 1) / columns)
        bucket = range(begin, end)
        finite = [i for i in bucket if math.isfinite(series.values[i])]
        keep = {bucket[0], bucket[-1]} if bucket else set()
        if finite:
            keep |= {min(finite, key=series.values.__getitem__), max(finite, key=series.values.__getitem__)}
        keep |= set([i for i in bucket if not math.isfinite(series.values[i])][:1])
        chosen += sorted(keep)
        begin = end
    return Series(
        series.name,
        [series.steps[i] for i in chosen],
        [series.values[i] for i in chosen],
        series.color,
        series.faint,
        series.dots,
    )


def step_axis(steps: Sequence[int], most: int) -> Axis:
    """An axis that spans `steps` exactly, with at most `most` whole ticks."""
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    if low == high:
        low, high = low - 1, high + 1
        ticks: tuple[float, ...] = (low + 1,)
    else:
        ticks = _linear_ticks(low, high, most, whole=True)
    return Axis(low, high, ticks, tick_labels(ticks))


def value_axis(values: Sequence[float], most: int, from_zero: bool = False) -> Axis:
    """An axis with room around `values`: logarithmic where they are positive and span more than two decades."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high / low > 100 and not from_zero:
        low, high = low / 1.3, high * 1.3
        ticks = _log_ticks(low, high, most)
        return Axis(low, high, ticks, tick_labels(ticks, log=True), log=True)
    if from_zero:
        low = min(low, 0.0)
    if high - low < 1e-9 * max(abs(low), abs(high)) or high == low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if from_zero and low == 0 else low - pad), high + pad
    margin = 0.06 * (high - low)
    low, high = (low if from_zero and low == 0 else low - margin), high + margin
    ticks = _linear_ticks(low, high, most)
    return Axis(low, high, ticks, tick_labels(ticks))


def tick_labels(ticks: Sequence[float], log: bool = False) -> tuple[str, ...]:
    """Labels for `ticks` with one suffix and just the decimals that tell neighbours apart."""
    if log:
        return tuple(_short(t) for t in ticks)
    unit, suffix = _unit(max((abs(t) for t in ticks), default=0.0))
    gap = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=ticks[0] if ticks else 1.0) / unit
    decimals = next((d for d in range(7) if abs(gap * 10**d - round(gap * 10**d)) < 1e-6), 6)
    return tuple("0" if t == 0 else f"{t / unit:.{decimals}f}{suffix}" for t in ticks)


def _unit(top: float) -> tuple[float, str]:
    """(size, suffix) of the unit to write numbers up to `top` in."""
    if 0 < top < 1e-2:
        exponent = math.floor(math.log10(top) + 1e-9)
        return 10.0**exponent, f"e{exponent}"
    for limit, unit, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if top >= limit:
            return unit, suffix
    return 1.0, ""


def _average(values: Sequence[float], span: float) -> list[float]:
    decay, total, weight = 1 - 1 / max(1.0, span), 0.0, 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(total / weight if math.isfinite(value) else GAP)
    return result


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _linear_ticks(low: float, high: float, most: int, whole: bool = False) -> tuple[float, ...]:
    rough = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(rough))
    size = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
    if whole:
        size = max(1.0, size)
    count = range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)
    return tuple(float(f"{i * size:.12g}") for i in count)


def _log_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    """The powers of ten between `low` and `high`, every n-th if there are many; at least two decades are given."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return tuple(10.0**e for e in powers[:: math.ceil(len(powers) / most)])


def _legend(series: Sequence[Series], width: int) -> str:
    # Spaces, not dx: browsers leave shifts out of account when they align the end of a text.
    names = "".join(
        f'&#8195;<tspan style="fill:var({s.color})">— {escape(s.name)}</tspan>' for s in series if not s.faint
    )
    return f'<text x="{width - _RIGHT}" y="{_TOP + 12}" text-anchor="end">{names}</text>'


def _grid(axis: Axis, y, width: int) -> str:
    return "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(t)}" y2="{y(t)}"/>'
        f'<text x="{_LEFT - 8}" y="{y(t) + 3.5}" text-anchor="end">{label}</text>'
        for t, label in zip(axis.ticks, axis.labels, strict=True)
    )


def _steps(axis: Axis, x, foot: float, width: int) -> str:
    labels = "".join(
        f'<line class="axis" x1="{x(t)}" x2="{x(t)}" y1="{foot}" y2="{foot + 4}"/>'
        f'<text x="{x(t)}" y="{foot + 17}" text-anchor="middle">{label}</text>'
        for t, label in zip(axis.ticks, axis.labels, strict=True)
    )
    line = f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{foot}" y2="{foot}"/>'
    return f'{line}{labels}<text x="{(_LEFT + width - _RIGHT) / 2}" y="{foot + 31}" text-anchor="middle">step</text>'


def _marks(marks: Sequence[Mark], x, foot: float) -> list[str]:
    parts, drawn = [], set()
    for mark in marks:
        place = (mark.color, mark.minor, round(x(mark.step) / (3 if mark.minor else 6)))
        if place in drawn:  # one line for what lies in the same pixels
            continue
        drawn.add(place)
        top, css = (foot - 6, "tick") if mark.minor else (_TOP, "mark")
        parts.append(
            f'<line class="{css}" style="stroke:var({mark.color})" x1="{x(mark.step)}" x2="{x(mark.step)}" '
            f'y1="{top}" y2="{foot}"><title>{escape(mark.label)}</title></line>'
        )
    return parts


def _line(series: Series, x, y, foot: float) -> list[str]:
    """The line as one path with a new start after each gap, single points as dots, and a cross for each gap."""
    color = f"stroke:var({series.color})"
    runs: list[list[str]] = [[]]
    parts = []
    for step, value in zip(series.steps, series.values, strict=True):
        if math.isfinite(value):
            runs[-1].append(f"{x(step)},{y(value)}")
            continue
        runs.append([])
        if not series.faint:
            parts.append(
                f'<path style="stroke:var(--bad);stroke-width:1.5" d="M{x(step) - 3},{foot - 9}l6,6m0,-6l-6,6">'
                f"<title>{escape(series.name)} is not finite at step {step}</title></path>"
            )
    paths = "".join("M" + "L".join(run) for run in runs if len(run) > 1)
    if paths:
        look = "stroke-width:1;opacity:.32" if series.faint else "stroke-width:1.8"
        parts.append(f'<path style="{color};{look}" d="{paths}"/>')
    dots = [p for run in runs if series.dots or len(run) == 1 for p in run]
    if not series.faint or not paths:
        for place in dots if len(dots) <= 120 else []:
            cx, cy = place.split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" style="fill:var({series.color});stroke:var(--surface)"/>')
    return parts
