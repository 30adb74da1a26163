"""The collectives of a compiled program: what is moved, over which mesh axes, and which runs beside other work.

A collective may stand in the text several times. On TPUs an asynchronous one is in the fusion that starts it, in the
fusions that carry it along while they compute, and in the one that waits for it; it is counted at its start, and the
others name that start.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from llmos_jax.compiler.hlo import Computation, Instruction, Module, leaves

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """kind: one of KINDS; an all-reduce of which each device keeps a slice only is a reduce-scatter.

    bytes: of the full array on one device, without the padding of its layout: the gathered result of an all-gather,
    the unreduced operand of an all-reduce or reduce-scatter, the operand of the others. groups: [groups, devices]
    device numbers; source and target pairs for a permutation. dtype: what is on the wire. channel: not unique.
    """

    kind: str
    bytes: int
    dtype: str
    groups: np.ndarray = field(compare=False, repr=False)
    channel: int | None
    asynchronous: bool
    name: str  # of the instruction that is issued: the start, the fusion, or the collective itself
    op_name: str
    algorithm: str = ""  # what the TPU compiler says of its rings: strategy, colors, physical dimensions

    @property
    def group_size(self) -> int:
        """Devices that take part in one exchange; for a permutation 2."""
        return self.groups.shape[1]

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...] | None:
        """The mesh axes it runs over, as `axes_of`; for a permutation the axes along which the pairs differ."""
        if self.kind != "collective-permute":
            return axes_of(self.groups, mesh_shape)
        coordinates = np.array(np.unravel_index(self.groups, tuple(mesh_shape.values())))
        moves = (coordinates[:, :, 0] != coordinates[:, :, 1]).any(axis=1)
        return tuple(name for name, differ in zip(mesh_shape, moves, strict=True) if differ)


def axes_of(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...] | None:
    """The axes of a mesh that a partition of its devices into groups runs over, in the mesh's order.

    groups: [groups, devices]; device numbers count the mesh's places in row-major order. None where the groups are
    not whole axes. An axis of size 1 is never among them; groups of one device run over ().
    """
    shape = tuple(mesh_shape.values())
    if groups.size != math.prod(shape):
        return None
    first = np.array(np.unravel_index(groups[0], shape))
    picked = tuple(i for i, row in enumerate(first) if (row != row[0]).any())
    rest = tuple(i for i in range(len(shape)) if i not in picked)
    size = math.prod(shape[i] for i in picked)
    expected = np.arange(groups.size).reshape(shape).transpose(rest + picked).reshape(-1, size)
    if groups.shape != expected.shape or {frozenset(g) for g in groups.tolist()} != {
        frozenset(g) for g in expected.tolist()
    }:
        return None
    return tuple(name for i, name in enumerate(mesh_shape) if i in picked)


def replica_groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    """[groups, devices] of a collective, or [pairs, 2] of a permutation, from any of the ways they are written."""
    if pairs := instruction.attribute("source_target_pairs"):
        return np.array(re.findall(r"\d+", pairs), int).reshape(-1, 2)
    found = re.search(
        r"replica_groups=(mesh\[.*?\](?:, device_ids=\([^ ]*\))? \{[^}]*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{[\d,{} ]*\})",
        instruction.attributes,
    )
    text = found[1] if found else "{}"
    if text.startswith("mesh"):
        return _mesh_groups(text, num_devices)
    if text.startswith("["):
        return _iota(text)
    rows = [[int(i) for i in re.findall(r"\d+", row)] for row in re.findall(r"\{([\d, ]+)\}", text)]
    return np.array(rows) if rows else np.arange(num_devices)[None]


def _iota(text: str) -> np.ndarray:
    """ "[8,64]<=[64,8]T(1,0)": count, shape as [64, 8], transpose, reshape to [8, 64]."""
    new, old, order = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text).groups()  # type: ignore[union-attr]
    new, old = ([int(i) for i in part.split(",")] for part in (new, old or new))
    ids = np.arange(math.prod(old)).reshape(old)
    return (ids.transpose([int(i) for i in order.split(",")]) if order else ids).reshape(new)


def _mesh_groups(text: str, num_devices: int) -> np.ndarray:
    """ "mesh['a'=64,'b'=8], device_ids=([8,64]T(1,0)) {'a'}"; an axis may be a part of one: 'a':(2)4."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", text)}
    chosen = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :])
    order = re.search(r"device_ids=\((.*)\) \{", text)
    ids = _iota(order[1]) if order else np.arange(num_devices)
    shape: list[int] = []
    places: dict[str, int] = {}
    for name, size in sizes.items():
        part = next(((int(pre), int(n)) for axis, pre, n in chosen if axis == name and n), None)
        places[name] = len(shape) + (1 if part else 0)
        shape += [part[0], part[1], size // math.prod(part)] if part else [size]
    picked = [places[name] for name, _, _ in chosen]
    rest = [i for i in range(len(shape)) if i not in picked]
    return ids.reshape(shape).transpose(rest + picked).reshape(-1, math.prod(shape[i] for i in picked))


def base_kind(opcode: str) -> str | None:
    """The collective that an opcode is, or starts; None where it is none, or waits for one."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def inner_collective(module: Module, instruction: Instruction) -> tuple[Computation, Instruction] | None:
    """The collective in the computations that a fusion or an asynchronous wrapper calls, and where it is."""
    for name in instruction.calls:
        for inner in module.computations[name]:
            if base_kind(inner.opcode):
                return module.computations[name], inner
            if inner.opcode == "fusion" and (found := inner_collective(module, inner)):
                return found
    return None


def _on_sparse_core(module: Module, update: Instruction) -> tuple[Computation, Instruction] | None:
    """The collective of a "custom-call-update": what its start has prepared, and it sets going (libtpu 0.0.52)."""
    start = module.named.get(update.operands[0]) if update.opcode == "custom-call-update" else None
    return inner_collective(module, start) if start else None


def role(module: Module, instruction: Instruction) -> str | None:
    """ "sync", "start", "carry" (computes while a collective runs through it) or "done"; None: no collective."""
    opcode = instruction.opcode
    if opcode == "custom-call-update":
        return "start" if _on_sparse_core(module, instruction) else None
    if opcode == "custom-call-done":
        return "done" if _on_sparse_core(module, module.named[instruction.operands[0]]) else None
    if opcode.endswith("-done"):
        is_collective = base_kind(opcode.removesuffix("-done")) is not None
        return "done" if is_collective or opcode == "async-done" else None
    if base_kind(opcode):
        return "start" if opcode.endswith("-start") else "sync"
    if opcode not in ("fusion", "async-start", "call"):
        return None
    found = inner_collective(module, instruction)
    if found is None:
        return None
    if opcode == "async-start":
        return "start"
    root = module.computations[instruction.calls[0]].root
    if root.target.startswith("AsyncCollective"):
        return root.target.removeprefix("AsyncCollective").lower()
    return "carry" if "async_collective_fusion_config" in found[1].attributes else "sync"


def collective(module: Module, where: Computation, instruction: Instruction) -> Collective | None:
    """The collective that `instruction` runs or starts; None for what waits for one or carries one along."""
    part = role(module, instruction)
    if part not in ("sync", "start"):
        return None
    home, inner = where, instruction
    if not base_kind(instruction.opcode):
        home, inner = _on_sparse_core(module, instruction) or inner_collective(module, instruction)  # type: ignore[misc]
    kind = base_kind(inner.opcode) or ""
    groups = replica_groups(inner, module.num_devices)
    # The TPU compiler folds conversions into an all-reduce: what travels has the result's type.
    arrays = inner.shapes if kind == "all-reduce" else [s for name in inner.operands for s in leaves(home[name].result)]
    size = sum(shape.bytes for shape in arrays) * (groups.shape[1] if kind == "all-gather" else 1)
    if kind == "all-reduce" and inner is not instruction and _keeps_a_slice(home, inner):
        kind = "reduce-scatter"
    channel = re.search(r"channel_id=(\d+)", inner.attributes)
    algorithm = re.search(r'"(?:strategy|emitter)":"(\w+)","debug":"(.*?)"', instruction.attributes)
    return Collective(
        kind,
        size,
        arrays[0].dtype if arrays else "",
        groups,
        int(channel[1]) if channel else None,
        part == "start",
        instruction.name,
        inner.op_name or instruction.op_name,
        f"{algorithm[1]}: {algorithm[2].replace(chr(92) + 'n', ' ').strip()}" if algorithm else "",
    )


def _keeps_a_slice(where: Computation, reduced: Instruction) -> bool:
    """Whether a reduced array is only sliced by the fusion that it is in: XLA's "all-reduce-scatter"."""
    users = where.users[reduced.name]
    return bool(users) and all(
        user.opcode == "dynamic-slice"
        or (user.opcode in ("get-tuple-element", "bitcast", "reshape", "convert") and _keeps_a_slice(where, user))
        for user in users
    )


def start_of(module: Module, where: Computation, instruction: Instruction) -> str | None:
    """The name of the start that a "done" waits for or a "carry" belongs to, by following its buffers back."""
    if instruction.opcode != "fusion":
        return instruction.operands[0]
    name, index = instruction.operands[_context(module, instruction)], 0
    while True:
        at = where[name]
        if at.opcode == "get-tuple-element":
            name, index = at.operands[0], int(at.attribute("index"))
        elif role(module, at) == "start":
            return name
        elif at.opcode == "fusion" and (operand := aliased_operands(at).get((index,))) is not None:
            name = at.operands[operand]
        else:
            return None


def _context(module: Module, fusion: Instruction) -> int:
    """The operand of an asynchronous fusion that is its collective's input: it is handed through all of them."""
    found = inner_collective(module, fusion)
    assert found is not None
    where, at = found
    for name in at.operands:
        if where[name].opcode == "parameter" and where.name in fusion.calls:
            return int(where[name].text)
    return 0


def aliased_operands(instruction: Instruction) -> dict[tuple[int, ...], int]:
    """Result index -> operand whose buffer it takes over."""
    table = instruction.attribute("output_to_operand_aliasing")
    pairs = re.findall(r"\{([\d, ]*)\}: \((\d+), \{[\d, ]*\}\)", table)
    return {tuple(int(i) for i in index.split(",") if i.strip()): int(number) for index, number in pairs}


def collectives(module: Module, where: Computation) -> Iterator[Collective]:
    """The collectives of one computation, in the order they are issued; not those of the loops in it."""
    for instruction in where:
        if found := collective(module, where, instruction):
            yield found
