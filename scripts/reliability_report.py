"""The report of the reliability check: tables and a plot."""

import collections
import os
import time
from typing import Any

from scripts.reliability_checks import Check
from scripts.reliability_run import Run


def outcomes_table(run: Run) -> str:
    columns = ("answered", "refused", "busy", "left", "hung", "wrong")
    lines = ["| requests | number | full answer | proper error | 429 | left | hung | wrong |", "|" + " --- |" * 8]
    totals = collections.Counter[str]()
    for kind, counts in sorted(run.outcomes.items()):
        totals += counts
        lines.append(_row(kind, counts.total(), *(counts[name] for name in columns)))
    lines.append(_row("**all**", totals.total(), *(totals[name] for name in columns)))
    return "\n".join(lines)


def checks_table(checks: list[Check]) -> str:
    lines = ["| check | | found |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(_row(one.name, "yes" if one.passed else "**NO**", one.detail) for one in checks)])


def _row(*cells: Any) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"


def report(run: Run, checks: list[Check], figures: dict[str, str], command: str) -> str:
    parts = [f"`{command}`, {os.cpu_count()} CPU cores shared by server and clients, {time.strftime('%Y-%m-%d')}."]
    parts += [checks_table(checks), outcomes_table(run)]
    parts.append("\n".join(["| figure | |", "| --- | --- |", *(_row(*item) for item in figures.items())]))
    return "\n\n".join(parts)


def plot(run: Run) -> str:
    """Resident memory over time, with a mark for each kill."""
    from llmos_jax.runtime import charts

    seconds = [round(one.at) for one in run.samples]
    series = [
        charts.Series("HTTP process", seconds, [one.server / 2**20 for one in run.samples]),
        charts.Series("engine", seconds, [one.worker / 2**20 or charts.GAP for one in run.samples], "--line-2"),
    ]
    marks = [charts.Mark(round(at), "kill -9", "--bad") for at in run.kills]
    label = "Resident memory in MiB over seconds; dashed lines: kill -9"
    chart = charts.draw(series, marks, label=label, from_zero=True, style=charts.standalone_style())
    return chart.svg.replace(">step</text>", ">MiB over seconds; dashed: kill -9</text>")
