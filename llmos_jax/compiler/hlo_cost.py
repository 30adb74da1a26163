"""What the instructions of a compiled program cost: FLOPs, bytes of HBM, cycles, and the schedule they stand in.

FLOPs are those of matrix products and convolutions (a multiply and an add are two) and what Pallas kernels say of
themselves; elementwise work is left out. Bytes are what an instruction reads from and writes to HBM if nothing stays
in a cache. Loops multiply by their trip counts, which XLA's own `cost_analysis` does not do.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from llmos_jax.compiler.hlo import HBM, OURS, Computation, Instruction, Module, Shape, leaves
from llmos_jax.compiler.hlo_collectives import Collective, base_kind, collective, role, start_of
from llmos_jax.compiler.hlo_loops import trip_count

# Names for values, not work.
_FREE = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id")
)
_CONTROL = frozenset(("while", "conditional", "call"))
_VIEWS = frozenset(("bitcast", "reshape", "copy", "convert", "transpose"))


@dataclass(frozen=True)
class Step:
    """One issued instruction of a schedule.

    kind: "compute", "collective" (nothing else runs meanwhile), "collective-start", "collective-done", "copy-start",
    "copy-done" (an asynchronous copy between memories), or "control" (a loop, branch or call: `calls` holds what runs
    inside). start: for a "done", and for a compute step that carries a collective along, the name of the start.
    cycles: the TPU compiler's estimate, None where it gives none. flops, bytes: of one execution, not of what a
    "control" step calls. trips: of a loop; None where it follows from data.
    """

    instruction: Instruction
    kind: str
    cycles: int | None = None
    flops: float = 0.0
    bytes: float = 0.0
    collective: Collective | None = None
    start: str | None = None
    calls: tuple[Computation, ...] = ()
    trips: int | None = 1

    @property
    def name(self) -> str:
        return self.instruction.name


@dataclass
class Cost:
    """Sums over one execution of a computation and of what it calls.

    collectives: each with how often it is issued. unknown: what could not be counted, in words, with how often.
    """

    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    collectives: list[tuple[Collective, int]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        self.flops += other.flops * times
        self.bytes += other.bytes * times
        self.cycles += other.cycles * times
        self.collectives += [(found, number * times) for found, number in other.collectives]
        for what, number in other.unknown.items():
            self.unknown[what] += number * times


def schedule(module: Module, where: Computation) -> list[Step]:
    """The steps of one computation in the order they are issued; names for values are left out."""
    return [_step(module, where, i) for i in where if i.opcode not in _FREE]


def cost(module: Module, where: Computation | None = None) -> Cost:
    """Of one device and one execution of `where` (the entry where it is not given), loops multiplied out.

    A loop whose trip count follows from data is counted once and named in `unknown`; of a conditional the branch with
    the most FLOPs is taken.
    """
    total = Cost()
    total.add(_cost(module, where or module.entry, {}))
    return total


def count(module: Module, mesh_shape: Mapping[str, int], where: Computation | None = None) -> Counter:
    """(kind, mesh axes) -> how many collectives, of one computation alone: loops in it are not entered."""
    steps = schedule(module, where or module.entry)
    found = (step.collective for step in steps if step.collective)
    return Counter((one.kind, one.axes(mesh_shape)) for one in found)


def loops(module: Module, where: Computation | None = None) -> Iterator[tuple[Instruction, Computation, int | None]]:
    """Every loop that runs, outer ones first: the instruction, its body, its trip count."""
    for step in schedule(module, where or module.entry):
        if step.instruction.opcode == "while":
            yield step.instruction, step.calls[0], step.trips
        for inner in step.calls:
            yield from loops(module, inner)


def _cost(module: Module, where: Computation, known: dict[str, Cost]) -> Cost:
    if where.name in known:
        return known[where.name]
    total = Cost()
    for step in schedule(module, where):
        total.flops += step.flops
        total.bytes += step.bytes
        total.cycles += step.cycles or 0
        if step.collective:
            total.collectives.append((step.collective, 1))
        if _is_opaque(step.instruction):
            total.unknown[f"FLOPs of the kernel {step.instruction.kernel}"] += 1
        inner = [_cost(module, called, known) for called in step.calls]
        if step.instruction.opcode == "conditional":
            total.add(max(inner, key=lambda branch: (branch.flops, branch.bytes)))
        elif inner:
            if step.trips is None:
                total.unknown[f"trips of the loop {step.name}"] += 1
            total.add(inner[0], 1 if step.trips is None else step.trips)
    known[where.name] = total
    return total


def _is_opaque(instruction: Instruction) -> bool:
    """Whether it is a kernel that does not say what it costs."""
    kernels = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton", "triton", f"{OURS}paged_attention")
    return instruction.target.startswith(kernels) and instruction.number("flops") is None


def _step(module: Module, where: Computation, i: Instruction) -> Step:
    if i.opcode in _CONTROL:
        names = (module.body(i).name,) if i.opcode == "while" else i.calls
        trips = trip_count(module, i) if i.opcode == "while" else 1
        return Step(i, "control", calls=tuple(module.computations[name] for name in names), trips=trips)
    part = role(module, i)
    flops, moved, cycles = flops_of(module, where, i), hbm_bytes(module, where, i), i.number("estimated_cycles")
    if part in ("sync", "start"):
        kind = "collective" if part == "sync" else "collective-start"
        return Step(i, kind, cycles, flops, moved, collective(module, where, i))
    if part == "done":
        return Step(i, "collective-done", cycles, start=start_of(module, where, i))
    if part == "carry":
        return Step(i, "compute", cycles, flops, moved, start=start_of(module, where, i))
    if i.opcode in ("copy-start", "async-start") or i.opcode.endswith("slice-start"):
        return Step(i, "copy-start", cycles, flops, moved)
    if i.opcode.endswith("-done"):
        return Step(i, "copy-done", cycles, start=i.operands[0])
    return Step(i, "compute", cycles, flops, moved)


# ---------------------------------------------------------------------------------------------------------- FLOPs


def flops_of(module: Module, where: Computation, i: Instruction) -> float:
    """Of one instruction, with everything fused into it; 0 for loops and calls."""
    match i.opcode:
        case "dot":
            return 2.0 * leaves(i.result)[0].size * _contracted(where, i)
        case "convolution":
            return 2.0 * _products(where, i)
        case "fusion" | "async-start":
            inner = [module.computations[name] for name in i.calls]
            return sum(flops_of(module, c, j) for c in inner for j in c)
        case "custom-call":
            return _custom_flops(where, i)
    return 0.0


def _contracted(where: Computation, dot: Instruction) -> int:
    left = leaves(where[dot.operands[0]].result)[0]
    return math.prod(left.dims[d] for d in _numbers(dot.attribute("lhs_contracting_dims")))


def _products(where: Computation, i: Instruction) -> int:
    """Multiplications of a convolution that do not meet padding or holes, as XLA's HloCostAnalysis counts them.

    A product with batch dimensions becomes a convolution on TPUs, with a window over a dimension that is dilated so
    that each position meets one element: counting the window's size would count it squared.
    """
    lhs, rhs = (leaves(where[name].result)[0].dims for name in i.operands[:2])
    labels, out = re.split(r"->", i.attribute("dim_labels"))
    lhs_labels, rhs_labels = labels.split("_")
    window = _window(i.attribute("window"), sum(label.isdigit() for label in lhs_labels))
    result = leaves(i.result)[0].dims
    valid = 1
    for label in (label for label in lhs_labels if label.isdigit()):
        dims = lhs[lhs_labels.index(label)], rhs[rhs_labels.index(label)], result[out.index(label)]
        valid *= _valid_positions(*dims, *window[int(label)])
    batch = lhs[lhs_labels.index("b")] // int(i.attribute("batch_group_count") or 1)
    return valid * batch * rhs[rhs_labels.index("i")] * rhs[rhs_labels.index("o")]


def _window(text: str, spatial: int) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, input dilation, window dilation) of each spatial dimension."""
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", text))

    def values(key: str, default: str) -> list[int]:
        return [int(re.match(r"-?\d+", part)[0]) for part in fields.get(key, "x".join([default] * spatial)).split("x")]  # type: ignore[index]

    if not spatial:
        return []
    keys = (("stride", "1"), ("pad", "0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    return list(zip(*(values(key, default) for key, default in keys), strict=True))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _valid_positions(size: int, window: int, out: int, stride: int, low: int, dilate: int, spread: int) -> int:
    """Pairs of an output place and a window place that meet an element of the input."""
    at = np.arange(out)[None, :] * stride - low
    total = 0
    for begin in range(0, window, 512):
        place = at + np.arange(begin, min(window, begin + 512))[:, None] * spread
        total += int(((place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)).sum())
    return total


def _custom_flops(where: Computation, i: Instruction) -> float:
    """What a kernel's cost estimate says; of a library's matrix product, from its dimensions."""
    if (said := i.number("flops")) is not None:
        return float(said)
    if not re.search(r"gemm|matmul|\$dot", i.target):
        return 0.0
    if i.target.startswith(OURS):  # [M, K] and [K, N], however they lie
        sides = [where[name].result for name in i.operands[:2]]
        return 2.0 * math.sqrt(math.prod(float(leaves(x)[0].size) for x in (*sides, i.result)))
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    left, result = leaves(where[i.operands[0]].result)[0], leaves(i.result)[0]
    inner = math.prod(left.dims[d] for d in _numbers(dims[1])) if dims else left.dims[-1]
    return 2.0 * result.size * inner


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# ------------------------------------------------------------------------------------------------------------ bytes


def hbm_bytes(module: Module, where: Computation, i: Instruction) -> float:
    """Read from and written to HBM by one execution; 0 for loops and calls, and for what waits.

    A fusion that slices a stacked array reads the slice, one that updates it in place writes the update. What a fusion
    only hands on (a collective that runs through it) is not counted.
    """
    if i.opcode in _FREE or i.opcode in _CONTROL or i.opcode.endswith("-done"):
        return 0.0
    if i.target and (said := i.number("bytes_accessed")) is not None:
        return float(said)
    if i.opcode in ("fusion", "fusion-start"):
        return _fusion_bytes(module, where, i)
    operands = [leaf for name in i.operands for leaf in leaves(where[name].result)]
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return _in_hbm(i.shapes) + (_in_hbm(i.shapes) if operands and operands[0].space == HBM else 0.0)
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return _in_hbm(i.shapes[:1]) and 2.0 * operands[1 if i.opcode == "dynamic-update-slice" else -1].bytes
    if i.opcode.endswith("-start"):
        return _started_bytes(i, operands)
    return _in_hbm(operands) + _in_hbm(i.shapes)


def _in_hbm(shapes) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.space == HBM))


def _started_bytes(i: Instruction, operands: list[Shape]) -> float:
    """A start's result holds its operands beside its results, but for an all-reduce: those are not written."""
    if i.opcode == "all-reduce-start":
        return _in_hbm(operands) + _in_hbm(i.shapes)
    results = Counter(shape for shape in i.shapes if shape.dims)
    results.subtract(operands)
    return _in_hbm(operands) + _in_hbm(shape for shape, number in results.items() for _ in range(max(number, 0)))


def _fusion_bytes(module: Module, where: Computation, i: Instruction) -> float:
    inner = module.computations[i.calls[0]]
    shapes, total = i.shapes, 0.0
    if i.opcode == "fusion-start":  # on a stream of its own, on GPUs: the operands stand before the results
        shapes = shapes[sum(len(leaves(where[name].result)) for name in i.operands) :]
    for number, name in enumerate(i.operands):
        if leaves(where[name].result)[0].space == HBM:
            total += _read(module, inner, inner.parameters[number].name)
    roots = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    for name, shape in zip(roots, shapes, strict=False):
        total += _written(module, inner, name) if shape.space == HBM else 0.0
    return total


def _read(module: Module, where: Computation, name: str) -> float:
    """Bytes of a fusion's parameter that it needs: slices where all it does with it is to slice it."""
    whole, total = float(sum(leaf.bytes for leaf in where[name].shapes)), 0.0
    for user in where.users[name]:
        match user.opcode:
            case "dynamic-slice" | "slice" | "gather" if user.operands[0] == name:
                total += user.shapes[0].bytes
            case "dynamic-update-slice" if user.operands[0] == name:
                pass  # written in place
            case "tuple":
                pass  # handed on
            case "bitcast" | "reshape":
                total += _read(module, where, user.name)
            case "fusion":
                inner = module.computations[user.calls[0]]
                if all(i.opcode in ("parameter", "bitcast", "reshape") for i in inner):
                    total += _read(module, where, user.name)  # another name for it
                    continue
                total += max(
                    _read(module, inner, inner.parameters[n].name) for n, o in enumerate(user.operands) if o == name
                )
            case opcode if base_kind(opcode):
                total += whole if "async_collective_fusion_config" not in user.attributes else 0.0
            case "custom-call" if user.target.startswith("AsyncCollective"):
                pass
            case _:
                return whole
    return min(total, whole)


def _written(module: Module, where: Computation, name: str) -> float:
    at = where[name]
    while at.opcode in _VIEWS and where[at.operands[0]].opcode in (*_VIEWS, "dynamic-update-slice", "scatter"):
        at = where[at.operands[0]]
    match at.opcode:
        case "dynamic-update-slice":
            return float(sum(leaf.bytes for leaf in where[at.operands[1]].shapes))
        case "scatter":
            return float(sum(leaf.bytes for leaf in where[at.operands[-1]].shapes))
        case "parameter":
            return 0.0
        case "fusion":
            inner = module.computations[at.calls[0]]
            return _written(module, inner, inner.root.name)
        case _ if base_kind(at.opcode) and "async_collective_fusion_config" in at.attributes:
            return 0.0
    return _in_hbm(where[name].shapes)
