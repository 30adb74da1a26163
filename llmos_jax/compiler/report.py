"""What a compiled program takes on a target: bytes of a device, work, traffic, time and money. Plain data, JSON-able.

Three estimates of time stand side by side. "analytic": by formula, from the configuration alone. "roofline": the compiled
program, every instruction at the chip's peaks (XLA's cost model, loops multiplied out). "schedule": the compiled program's
schedule played through with the TPU compiler's own estimated cycles, and with achievable shares of peak where it gives
none. In the last two, what overlaps is what the compiler scheduled to overlap.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from llmos_jax.compiler import buffers, hlo, hlo_cost
from llmos_jax.compiler.interconnect import AxisLinks
from llmos_jax.compiler.program import Executable, OutOfMemory, Program
from llmos_jax.compiler.target import Target
from llmos_jax.compiler.timing import Timing, timing

MAIN = ("schedule", "analytic")  # the estimate that speed and money are told from: the first that there is
NUM_BUFFERS = 12


@dataclass(frozen=True)
class Work:
    """What one call of a program does for its user.

    parts: for each argument of the program, what its bytes are called; a dict names the fields of a NamedTuple.
    kernels: FLOPs and HBM bytes, on one device, of one call of each kernel whose work follows from data, by its name.
    """

    tokens: int  # over all devices
    useful_flops: float  # over all devices, no recomputation (roofline.py)
    parts: tuple[str | Mapping[str, str], ...]
    calls: int = 1  # of a whole run
    unit: str = "step"
    kernels: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one call. communication and exposed: by mesh axes ("fsdp", "data+fsdp", "host"), all of it and what is
    waited for."""

    seconds: float
    core: float
    communication: dict[str, float]
    exposed: dict[str, float]
    mfu: float


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes. bytes: of a device, of the whole (gathered, unreduced) arrays."""

    kind: str
    axes: str
    number: int
    bytes: float
    asynchronous: int  # of `number`


@dataclass(frozen=True)
class Report:
    """Of one program on one device of a target, unless said otherwise. Bytes and seconds."""

    program: str
    target: str
    mesh: dict[str, int]
    num_devices: int
    num_chips: int
    memory: dict[str, float]  # by part; "temporaries" and "code" among them
    peak_bytes: float
    capacity_bytes: float
    useful_flops: float
    estimates: dict[str, Estimate]
    tokens: int
    calls: int
    unit: str
    tokens_per_second_per_chip: float
    dollars_per_million_tokens: float | None
    dollars_per_run: float | None
    # Of the compiled program; nothing where the compiler refused it:
    host_bytes: float = 0.0
    flops: float = 0.0  # of products and kernels, recomputation included
    hbm_bytes: float = 0.0
    traffic: list[Traffic] = field(default_factory=list)
    compile_seconds: float = 0.0
    from_cache: bool = False
    buffers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.capacity_bytes

    @property
    def headroom_bytes(self) -> float:
        return self.capacity_bytes - self.peak_bytes

    @property
    def main(self) -> Estimate:
        return _main(self.estimates)

    def as_dict(self) -> dict[str, Any]:
        derived = {
            "fits": self.fits,
            "headroom_bytes": self.headroom_bytes,
            "step_seconds": self.main.seconds,
            "mfu": self.main.mfu,
        }
        return asdict(self) | derived


def report(
    program: Program,
    executable: Executable,
    target: Target,
    links: Mapping[str, AxisLinks],
    work: Work,
    analytic: Mapping[str, Any] | None = None,
) -> Report:
    """links: of the target's devices in the program's mesh. analytic: the fields of an Estimate, where there is a
    formula."""
    module = _told(hlo.parse(executable.hlo), work.kernels)
    mesh = dict(program.mesh.shape)
    total = hlo_cost.cost(module)
    useful, peak = work.useful_flops / target.num_devices, _useful_peak(program, target)
    estimates = {"analytic": Estimate(**analytic)} if analytic else {}
    for name, roofline in (("roofline", True), ("schedule", False)):
        found = timing(module, target.chip, links, mesh, roofline=roofline)
        estimates[name] = _estimate(found, useful, peak)
    held, arguments = executable.memory, list(_arguments(program, work))
    memory = _memory(arguments, held.argument) | {
        "temporaries": float(max(held.peak - held.argument, 0)),  # and results that take no argument's place
        "code": float(held.code),
    }
    alive = buffers.peak(module, [label for label, _ in arguments])
    compiled = {
        "host_bytes": float(held.host),
        "flops": total.flops,
        "hbm_bytes": total.bytes,
        "traffic": _traffic(total, mesh),
        "compile_seconds": executable.stored.compile_seconds if executable.stored else executable.compile_seconds,
        "from_cache": executable.from_cache,
        "buffers": [asdict(buffer) for buffer in alive.buffers[:NUM_BUFFERS]],
        "notes": [f"{what}: not counted, {number} times" for what, number in total.unknown.items()],
    }
    return _report(program, target, work, memory, estimates, compiled)


def _told(module: hlo.Module, kernels: Mapping[str, tuple[float, float]]) -> hlo.Module:
    """`module` as if its kernels of these names said their FLOPs and bytes themselves."""
    if not kernels:
        return module

    def one(i: hlo.Instruction) -> hlo.Instruction:
        found = kernels.get(i.kernel) if i.target else None
        if found is None:
            return i
        said = f'{i.attributes} "flops":"{found[0]:.0f}" "bytes_accessed":"{found[1]:.0f}"'
        return replace(i, attributes=said)

    computations = {
        name: replace(found, instructions={i.name: one(i) for i in found})
        for name, found in module.computations.items()
    }
    return replace(module, computations=computations, entry=computations[module.entry.name])


def refused(
    program: Program, problem: OutOfMemory, target: Target, work: Work, analytic: Mapping[str, Any] | None = None
) -> Report:
    """Of a program that the compiler finds no place for: its memory, and what the formula says of the rest."""
    memory = _memory(_arguments(program, work), None) | {"temporaries": problem.temporaries}
    estimates = {"analytic": Estimate(**analytic)} if analytic else {}
    notes = ["the compiler refused it for its temporaries: there is no schedule, and time is by formula"]
    return _report(program, target, work, memory, estimates, {"notes": notes})


def _report(
    program: Program,
    target: Target,
    work: Work,
    memory: dict[str, float],
    estimates: dict[str, Estimate],
    compiled: dict[str, Any],
) -> Report:
    seconds = _main(estimates).seconds
    rate, price = work.tokens / seconds if seconds else 0.0, target.price
    return Report(
        program=program.name,
        target=target.name,
        mesh={axis: size for axis, size in program.mesh.shape.items() if size > 1},
        num_devices=target.num_devices,
        num_chips=target.num_chips,
        memory=memory,
        peak_bytes=sum(memory.values()),
        capacity_bytes=target.chip.usable_bytes,
        useful_flops=work.useful_flops / target.num_devices,
        estimates=estimates,
        tokens=work.tokens,
        calls=work.calls,
        unit=work.unit,
        tokens_per_second_per_chip=rate / target.num_chips,
        dollars_per_million_tokens=price / 3600 / rate * 1e6 if price and rate else None,
        dollars_per_run=price / 3600 * seconds * work.calls if price and work.calls > 1 else None,
        **compiled,
    )


def _main(estimates: Mapping[str, Estimate]) -> Estimate:
    return next((estimates[name] for name in MAIN if name in estimates), Estimate(0.0, 0.0, {}, {}, 0.0))


def _useful_peak(program: Program, target: Target) -> float:
    """Peak FLOP/s of the dtype that the program computes in, taken from its configuration."""
    dtypes = [dtype for value in program.static if (dtype := _dtype(value))]
    return target.chip.peak_flops(dtypes[0] if dtypes else "bfloat16")


def _dtype(static: Any) -> str:
    return getattr(getattr(static, "model", static), "dtype", "")


def _estimate(found: Timing, useful: float, peak: float) -> Estimate:
    mfu = useful / found.seconds / peak if found.seconds and peak else 0.0
    return Estimate(found.seconds, found.core, _named(found.busy), _named(found.exposed), mfu)


def _named(by_axes: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    return {"+".join(axes) or "none": seconds for axes, seconds in by_axes.items() if seconds > 0}


def _traffic(total: hlo_cost.Cost, mesh: Mapping[str, int]) -> list[Traffic]:
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for found, number in total.collectives:
        axes = found.axes(mesh)
        if axes == ():  # a device alone
            continue
        row = sums[found.kind, "+".join(axes) if axes is not None else "some devices"]
        row[0] += number
        row[1] += found.bytes * number
        row[2] += number if found.asynchronous else 0
    rows = [Traffic(kind, axes, int(n), size, int(beside)) for (kind, axes), (n, size, beside) in sums.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def _memory(arguments: Iterable[tuple[str, float]], stated: int | None) -> dict[str, float]:
    """The arguments' bytes by part. stated: what the compiler counts for all of them; tiles make arrays larger."""
    parts: dict[str, float] = defaultdict(float)
    for label, size in arguments:
        parts[label.partition(": ")[0]] += size
    total = sum(parts.values())
    scale = stated / total if stated is not None and total else 1.0
    return {name: size * scale for name, size in parts.items()}


def _arguments(program: Program, work: Work) -> Iterable[tuple[str, float]]:
    """("part: path", bytes on a device) of each array among the arguments, in the order of the flat program."""
    for argument, part in zip(program.args, work.parts, strict=True):
        for path, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]:
            first = getattr(path[0], "name", "") if path else ""
            name = part if isinstance(part, str) else part.get(first, "other")
            on_device = leaf.sharding is None or leaf.sharding.memory_kind in (None, "device", "unpinned_host")
            shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
            size = math.prod(shape) * leaf.dtype.itemsize if on_device else 0
            yield f"{name}: {_path(path)}", float(size)


def _path(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return " ".join(parts[1:] if len(parts) > 1 else parts)
