"""A report on a terminal: memory as bars, time as three estimates side by side, traffic, the largest buffers."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from llmos_jax.compiler.report import Report
from llmos_jax.plan.advice import Advice
from llmos_jax.plan.search import Found
from llmos_jax.plan.serving import ServingPlan, lengths

BAR = 48  # characters for the whole of a device's memory
COLORS = {
    "parameters": "blue",
    "optimizer state": "magenta",
    "KV cache": "magenta",
    "temporaries": "yellow",
    "batch": "cyan",
}
ESTIMATES = {
    "analytic": "by formula, from the configuration",
    "roofline": "compiled program, all at peak rates (XLA's cost model x trip counts)",
    "schedule": "compiled program's schedule played through (compiler's estimated cycles)",
}

SOURCES = {"analytic": "by formula", "roofline": "all at peak rates", "schedule": "the compiler's schedule"}


def pages(reports: Sequence[Report]) -> None:
    """A page a program."""
    console = Console(highlight=False)
    for found in reports:
        console.print(_page(found))


def _page(found: Report) -> Group:
    work: list[Group | Text] = [Text(), _work(found)] if found.flops else []
    return Group(_title(found), _memory(found), Text(), _times(found), *work, *_largest(found))


def _title(found: Report) -> Text:
    made = "seen before" if found.from_cache else f"compiled in {found.compile_seconds:.0f} s"
    made = made if found.flops else "not compiled"
    devices = "" if found.num_devices == found.num_chips else f", {found.num_devices} devices"
    return Text.assemble(
        (f"{found.program}", "bold"),
        f" on {found.target} ({found.num_chips} chips{devices}; {_mesh(found)}): ",
        _verdict(found.fits),
        f"; {made}\n",
    )


def _mesh(found: Report) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in found.mesh.items()) or "one device"


def _verdict(fits: bool) -> tuple[str, str]:
    return ("fits", "bold green") if fits else ("does not fit", "bold red")


def _memory(found: Report) -> Group:
    of = "a chip" if found.num_devices == found.num_chips else "a device"
    head = f"memory {of}: {_gib(found.peak_bytes)} of {_gib(found.capacity_bytes)} GiB"
    state = f"{_gib(found.headroom_bytes)} free" if found.fits else f"{_gib(-found.headroom_bytes)} too much"
    bar, legend = Text("  "), Table.grid(padding=(0, 2))
    scale = BAR / max(found.capacity_bytes, found.peak_bytes, 1.0)
    for name, size in found.memory.items():
        color = COLORS.get(name, "white")
        bar.append("█" * round(size * scale), color)
        if size >= 1e-3 * found.peak_bytes:
            legend.add_row("", Text(f"█ {name}", color), f"{_gib(size):>8} GiB", f"{size / found.peak_bytes:5.0%}")
    bar.append("·" * max(BAR - (len(bar.plain) - 2), 0), "dim")
    if found.host_bytes:
        legend.add_row("", "in the host's memory", f"{_gib(found.host_bytes):>8} GiB", "")
    return Group(Text(f"{head} ({state})", "bold"), bar, legend)


def _times(found: Report) -> Group:
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("time", f"a {found.unit}", "core", "communication", "waited for", "MFU", ""):
        rows.add_column(name, justify="left" if name in ("time", "") else "right")
    for name, one in found.estimates.items():
        moved, waited = sum(one.communication.values()), sum(one.exposed.values())
        mfu = f"{one.mfu:.1%}" if one.mfu else ""
        told = [_seconds(value) for value in (one.seconds, one.core, moved, waited)]
        rows.add_row(name, *told, mfu, Text(ESTIMATES[name], "dim"))
    speed = f"{found.tokens_per_second_per_chip:,.0f} tokens/s a chip"
    if found.dollars_per_million_tokens is not None:
        speed += f"; ${found.dollars_per_million_tokens:,.3f} a million tokens"
    if found.dollars_per_run is not None:
        hours = found.main.seconds * found.calls / 3600
        speed += f"; {hours:,.1f} hours and ${found.dollars_per_run:,.0f} for {found.calls:,} {found.unit}s"
    return Group(rows, Text(speed, "bold"))


def _work(found: Report) -> Group:
    again = found.flops / found.useful_flops if found.useful_flops else 0.0
    of = "a chip" if found.num_devices == found.num_chips else "a device"
    head = Text(
        f"work {of}: {found.flops / 1e12:,.2f} TFLOP ({again:.2f} x the useful ones), "
        f"{found.hbm_bytes / 1e9:,.1f} GB of HBM traffic",
        "bold",
    )
    rows = Table.grid(padding=(0, 2))
    main = found.main
    for one in found.traffic[:8]:
        beside = f"{one.asynchronous:,} of {one.number:,} beside other work"
        rows.add_row("", one.kind, f"over {one.axes}", f"{one.bytes / 1e9:,.2f} GB", beside)
    for axes, busy in main.communication.items():
        waited = main.exposed.get(axes, 0.0)
        rows.add_row("", "all", f"over {axes}", _seconds(busy), f"{_seconds(waited)} waited for")
    return Group(head, rows)


def _largest(found: Report) -> list[Group | Text]:
    rows = Table.grid(padding=(0, 2))
    for one in found.buffers:
        times = f"{one['number']} x " if one["number"] > 1 else ""
        rows.add_row("", f"{_gib(one['bytes']):>7} GiB", f"{times}{one['shape']}", one["label"])
    listed: list[Group | Text] = (
        [Text(), Group(Text("largest at the worst moment", "bold"), rows)] if found.buffers else []
    )
    return [*listed, *(Text(note, "dim") for note in found.notes), Text()]


def comparison(reports: Sequence[Report]) -> None:
    """One line a target."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    names = ("target", "chips", "memory", "of", "", "time", "MFU", "tokens/s a chip", "tokens/s", "$/M tokens")
    for name in names:
        rows.add_column(name, justify="left" if name in ("target", "") else "right")
    for one in reports:
        dollars = one.dollars_per_million_tokens
        rows.add_row(
            one.target,
            str(one.num_chips),
            f"{_gib(one.peak_bytes)} GiB",
            _gib(one.capacity_bytes),
            Text("fits", "green") if one.fits else Text("too much", "red"),
            _seconds(one.main.seconds),
            f"{one.main.mfu:.1%}",
            f"{one.tokens_per_second_per_chip:,.0f}",
            f"{one.tokens_per_second_per_chip * one.num_chips:,.0f}",
            "" if dollars is None else f"{dollars:,.3f}",
        )
    Console(highlight=False).print(rows)


def serving(plans: Sequence[ServingPlan]) -> None:
    """A page a target: memory of a decode step, what fits beside the weights, and the speed of the loop."""
    console = Console(highlight=False)
    for one in plans:
        decode = one.reports[0]
        made = sum(found.compile_seconds for found in one.reports)
        title = Text.assemble(
            ("serve", "bold"),
            f" on {decode.target} ({decode.num_chips} chips; {_mesh(decode)}): ",
            _verdict(one.fits),
            f"; programs of {made:,.0f} s of compiling\n",
        )
        console.print(Group(title, _memory(decode), Text(), _sequences(one), Text(), _speeds(one), Text()))


def _sequences(one: ServingPlan) -> Group:
    asked = one.load.prompt + one.load.answer
    head = f"room for {one.room:,} pages of {one.page_size} tokens; the server takes {one.pages:,}"
    rows = Table.grid(padding=(0, 2))
    for length in lengths(asked):
        rows.add_row(
            "", f"{one.sequences(length):,} sequences", f"of {length:,} tokens", "asked for" * (length == asked)
        )
    return Group(Text(head, "bold"), rows)


def _speeds(one: ServingPlan) -> Group:
    load = one.load
    head = f"{load.users} users, prompts of {load.prompt:,} tokens, answers of {load.answer:,}"
    if one.running < load.users:
        head += f"; {one.running} of them at once"
    rows = Table(box=None, pad_edge=False, header_style="bold")
    names = ("time", "decode step", "prompt step", "first token", "between tokens", "tokens/s", "a chip", "")
    for name in names:
        rows.add_column(name, justify="left" if name in ("time", "") else "right", no_wrap=name == "")
    num_chips = one.reports[0].num_chips
    for name, speed in one.speeds.items():
        times = [_seconds(t) for t in (speed.decode, speed.chunk, speed.first_token, speed.between_tokens)]
        rate = speed.tokens_per_second
        rows.add_row(name, *times, f"{rate:,.0f}", f"{rate / num_chips:,.0f}", Text(SOURCES[name], "dim"))
    for found in one.published:
        rate = found.tokens_per_second
        told = Text(f"{found.server}, {found.model}", "dim")
        speeds = (_seconds(found.between_tokens), f"{rate:,.0f}", f"{rate / num_chips:,.0f}")
        rows.add_row("published", "", "", "", *speeds, told)
    dollars = one.dollars_per_million_tokens
    price = "" if dollars is None else f"${dollars:,.3f} a million answered tokens"
    return Group(Text(head, "bold"), rows, Text(price, "bold"))


def advice(target: str, found: Sequence[Advice]) -> None:
    console = Console(highlight=False)
    if not found:
        console.print(f"nothing that is known makes it fit {target}; take more chips, or a smaller model")
        return
    console.print(Text(f"what would make it fit {target}, by formula", "bold"))
    rows = Table.grid(padding=(0, 2))
    for one in found:
        rows.add_row("", f"--set {' '.join(one.settings)}", f"{_gib(one.peak)} GiB", one.cost)
    console.print(rows)


def ranking(found: Found) -> None:
    """What a search compiled, the best first, and the line to set."""
    console = Console(highlight=False)
    console.print(f"{found.scored:,} candidates scored, {found.possible:,} possible, {len(found.tried)} compiled")
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "a step", "formula", "MFU", "memory", "settings"):
        rows.add_column(name, justify="right" if name not in ("", "settings") else "left")
    for one in found.tried:
        if not one.report:
            rows.add_row("not compiled", "", _seconds(one.candidate.seconds), "", "", " ".join(one.candidate.settings))
            continue
        rows.add_row(
            Text("fits", "green") if one.fits else Text("too much", "red"),
            _seconds(one.seconds),
            _seconds(one.candidate.seconds),
            f"{one.report['mfu']:.1%}",
            f"{_gib(one.report['peak_bytes'])} GiB",
            " ".join(one.candidate.settings),
        )
    console.print(rows)
    if found.stopped:
        console.print("stopped; this is the best so far")
    best = found.best
    console.print(
        Text(f"--set {' '.join(best.candidate.settings)}" if best else "nothing that was compiled fits", "bold")
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1e3:,.2f} ms" if value >= 1e-3 else f"{value * 1e6:,.0f} µs"
