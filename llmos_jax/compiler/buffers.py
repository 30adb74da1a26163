"""Which buffers of a compiled program are alive at its worst moment, by the names the model gave them.

The compiler says how many bytes a program takes, not for what. The text of the program is in the order in which it
runs, so that is read off: a buffer lives from the instruction that makes it to the last that uses it, and values that
share one (the state of a loop, updates in place, donated arguments) are one buffer. What the compiler adds when it
packs buffers side by side, and its scratch space, are not in the text.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmos_jax.compiler.hlo import HBM, Computation, Instruction, Module, Shape, leaves
from llmos_jax.compiler.hlo_collectives import aliased_operands

Worst = tuple[int, tuple[str, ...], list["Buffer"]]  # bytes, the instructions that run then, the buffers
Value = tuple[str, int]  # of one computation: an instruction's name and which array of its flat result


@dataclass(frozen=True)
class Buffer:
    """Equal buffers that are alive together. bytes: of all of them, padding included. op_name: as the compiler has it."""

    label: str
    shape: str
    bytes: int
    number: int
    op_name: str


@dataclass(frozen=True)
class Peak:
    """The worst moment of a program on one device.

    bytes: arguments and everything else in HBM. argument_bytes: of them, what the caller holds. at: the instructions
    that run then, outermost first. buffers: the largest first.
    """

    bytes: int
    argument_bytes: int
    at: tuple[str, ...]
    buffers: tuple[Buffer, ...]


def peak(module: Module, argument_names: Sequence[str] = ()) -> Peak:
    """argument_names: of the program's flat arguments, in order; without one it is "argument 3"."""
    entry = module.entry
    arguments = [
        _buffer(argument_names[n] if n < len(argument_names) else f"argument {n}", leaf, "")
        for n, parameter in enumerate(entry.parameters)
        for leaf in parameter.shapes
        if leaf.space == HBM
    ]
    held = sum(buffer.bytes for buffer in arguments)
    most, at, alive = _Walk(module, entry, donated=True).worst()
    return Peak(held + most, held, at, tuple(_grouped(arguments + alive)))


def readable(op_name: str) -> str:
    """ "jit(step)/transpose(jvp())/while/body/attention/dot_general" -> "backward / loop / attention".

    The operation itself is named only where no scope is.
    """
    phase = ""
    parts: list[str] = []
    for i, part in enumerate(op_name.split("/")):
        if part == "rematted_computation":
            phase = "recomputation"
        while wrapped := re.fullmatch(r"(\w+)\((.*)\)", part):
            part = wrapped[2]
            if wrapped[1] in ("jvp", "transpose") and phase != "recomputation":
                phase = "backward" if "transpose" in (wrapped[1], phase) or phase == "backward" else "forward"
            elif wrapped[1] == "jit" and i == 0:
                part = ""
        part = "loop" if part == "while" else part
        if part and part not in _PLUMBING and parts[-1:] != [part]:
            parts.append(part)
    if len(parts) > 1 and parts[-2:] != ["loop", parts[-1]]:
        parts.pop()
    return " / ".join(([phase] if phase else []) + parts) or "unnamed"


_PLUMBING = frozenset(("body", "cond", "closed_call", "checkpoint", "remat", "rematted_computation", "shard_map")) | {
    "pallas_call",
    "custom_vjp_call",
    "custom_jvp_call",
    "eval_jaxpr",
}


def _buffer(label: str, shape: Shape, op_name: str) -> Buffer:
    return Buffer(label, f"{shape.dtype}[{','.join(map(str, shape.dims))}]", shape.padded_bytes, 1, op_name)


def _grouped(buffers: Iterable[Buffer]) -> list[Buffer]:
    groups: dict[tuple[str, str, int], list[Buffer]] = {}
    for buffer in buffers:
        groups.setdefault((buffer.label, buffer.shape, buffer.bytes), []).append(buffer)
    merged = [
        Buffer(label, shape, size * len(group), len(group), group[0].op_name)
        for (label, shape, size), group in groups.items()
    ]
    return sorted(merged, key=lambda buffer: -buffer.bytes)


class _Walk:
    """The buffers that one computation makes, and when each is alive.

    What it is given and, unless it is the entry, what it returns belongs to its caller: the state of a loop is one set
    of buffers, which the loop's instruction has outside.
    """

    def __init__(self, module: Module, where: Computation, donated: bool = False):
        self.module, self.where, self.is_entry = module, where, donated
        self.order = {name: i for i, name in enumerate(where.instructions)}
        self.parent: dict[Value, Value] = {}
        self.last: dict[Value, int] = {}  # of a class: the last use known so far
        self.outside: set[Value] = set()
        self.needed = self._last_needed()
        self.class_needed: dict[Value, int] = {}
        for instruction in where:
            self._make(instruction)
        self._hand_over()

    def worst(self) -> Worst:
        """The moment at which most is alive."""
        begin, size, names = self._classes()
        outside = {self._find(value) for value in self.outside}
        own = [c for c in size if c not in outside and size[c].padded_bytes]
        deltas = [0] * (len(self.order) + 1)
        for c in own:
            deltas[begin[c]] += size[c].padded_bytes
            deltas[max(self.last[c], begin[c]) + 1] -= size[c].padded_bytes
        best: Worst = (-1, (), [])
        alive = moment = 0
        nothing: Worst = (0, (), [])
        for position, instruction in enumerate(self.where):
            alive += deltas[position]
            inner = max(
                (_Walk(self.module, called).worst() for called in self._called(instruction)),
                key=lambda w: w[0],
                default=nothing,
            )
            if alive + inner[0] > best[0]:
                best, moment = (alive + inner[0], (instruction.name, *inner[1]), inner[2]), position
        here = [c for c in own if begin[c] <= moment <= max(self.last[c], begin[c])]
        buffers = [_buffer(readable(names[c]), size[c], names[c]) for c in here]
        return best[0], best[1], buffers + best[2]

    def _called(self, instruction: Instruction) -> list[Computation]:
        if instruction.opcode not in ("while", "conditional", "call"):
            return []
        return [self.module.computations[name] for name in instruction.calls]

    def _classes(self) -> tuple[dict[Value, int], dict[Value, Shape], dict[Value, str]]:
        """Of each class: where it begins, its largest array in HBM, and the op_name of what makes it."""
        begin: dict[Value, int] = {}
        size: dict[Value, Shape] = {}
        names: dict[Value, str] = {}
        for instruction in self.where:
            for n, shape in enumerate(instruction.shapes):
                c = self._find((instruction.name, n))
                if c not in begin:
                    begin[c] = self.order[instruction.name]
                if shape.space == HBM and (c not in size or shape.padded_bytes > size[c].padded_bytes):
                    size[c] = shape
                if instruction.opcode == "while" or not names.get(c):  # what fills a stack, rather than its zeros
                    names[c] = self._origin(instruction, n) or names.get(c, "")
        return begin, size, names

    def _origin(self, i: Instruction, n: int) -> str:
        """The op_name of what fills result `n`: of a loop's state, what the loop's body puts there."""
        where = self.where
        if i.opcode == "while":
            where = self.module.body(i)
            i = where[where.root.operands[n]] if n < len(where.root.operands) else i
            if "dynamic_update" in i.op_name:  # a stack of what the layers keep: named by what is put into it
                return _filler(self.module, where, i) or i.op_name
        for _ in range(8):  # a copy is named by what it copies
            if "/" in i.op_name or i.opcode not in (*_NAMES, "copy", "copy-start", "copy-done") or not i.operands:
                break
            i = where[i.operands[0]]
        return i.op_name if "/" in i.op_name else ""

    def _make(self, i: Instruction) -> None:
        """Enters an instruction's results, each into the class of what it shares its buffer with."""
        now = self.order[i.name]
        operands = [[self._find((name, n)) for n in range(len(self.where[name].shapes))] for name in i.operands]
        flat = [value for values in operands for value in values]
        if i.opcode not in ("get-tuple-element", "tuple", "bitcast"):  # what only names a value does not use it
            for value in flat:
                self.last[value] = max(self.last[value], now)
        shared = self._shared(i, operands, flat)
        for n in range(len(i.shapes)):
            value = (i.name, n)
            self.parent[value] = shared.get(n, value)
            self.last.setdefault(value, now)
            c = self._find(value)
            self.class_needed[c] = max(self.class_needed.get(c, 0), self.needed[i.name])
            if i.opcode in ("parameter", "constant"):
                self.outside.add(value)

    def _shared(self, i: Instruction, operands: list[list[Value]], flat: list[Value]) -> dict[int, Value]:
        """Which results take over the buffer of an operand, or are another name for it."""
        match i.opcode:
            case "tuple" | "while" | "opt-barrier" | "bitcast":
                return dict(enumerate(flat))
            case "get-tuple-element":
                parts = self.where[i.operands[0]].result
                index = int(i.attribute("index"))
                first = len(leaves(parts[:index])) if isinstance(parts, tuple) else 0
                return {n: operands[0][first + n] for n in range(len(i.shapes))}
            case "copy-done":
                return {0: operands[0][0]}
            case "copy-start":
                return {1: flat[0]}
            case opcode if opcode.endswith("-start"):  # the operands stand first in the result, as they are
                given = [shape for name in i.operands for shape in self.where[name].shapes]
                return {n: flat[n] for n, (one, two) in enumerate(zip(i.shapes, given, strict=False)) if one == two}
            case opcode if opcode.endswith("-done"):
                start, size = self.where[i.operands[0]].shapes, len(i.shapes)
                at = [n for n in range(len(start) - size + 1) if start[n : n + size] == i.shapes]
                return {n: operands[0][at[-1] + n] for n in range(size)} if at else {}
        return self._in_place(i, operands, flat)

    def _in_place(self, i: Instruction, operands: list[list[Value]], flat: list[Value]) -> dict[int, Value]:
        shared = {index[0] if index else 0: operands[number][0] for index, number in aliased_operands(i).items()}
        if '"aliasing_operands"' in i.attributes:  # the TPU compiler's own table: operands, then results, numbered on
            for group in re.findall(r'"indices":\[([^\]]*)\]', i.attributes.partition('"aliasing_operands"')[2]):
                numbers = sorted(int(number) for number in re.findall(r"\d+", group))
                given = [n for n in numbers if n < len(flat)]
                shared |= {n - len(flat): flat[given[0]] for n in numbers if n >= len(flat) and given}
            return shared
        for n, operand in self._overwritten(i):
            value = operands[operand][0] if operands[operand] else None
            if value and n not in shared and value not in shared.values() and self._ends_here(value, i):
                shared[n] = value
        return shared

    def _overwritten(self, i: Instruction) -> list[tuple[int, int]]:
        """(result, operand) of what may be written over an operand, where the text does not say it: as XLA decides.

        Updates write into what they update; an operation by elements may overwrite an operand of the same shape.
        """
        if i.opcode in ("dynamic-update-slice", "scatter"):
            return [(0, 0)]
        if i.opcode in _BY_ELEMENTS:
            return [(0, n) for n, name in enumerate(i.operands) if self.where[name].result == i.result]
        if i.opcode != "fusion":
            return []
        inner = self.module.computations[i.calls[0]]
        roots = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
        found = []
        for n, name in enumerate(roots):
            at = _seen_through(inner, name)
            if at.opcode in ("dynamic-update-slice", "scatter"):
                target = _seen_through(inner, at.operands[0])
                found += [(n, int(target.text))] if target.opcode == "parameter" else []
            else:
                found += [
                    (n, int(p.text)) for p in inner.parameters if p.result == i.shapes[n] and _by_elements(inner, p)
                ]
        return found

    def _last_needed(self) -> dict[str, int]:
        """Where each instruction's result, or another name for it, is used last."""
        needed: dict[str, int] = {}
        for i in reversed(list(self.where)):
            users = self.where.users[i.name]
            names = [needed[u.name] for u in users if u.opcode in _NAMES or u.opcode.endswith(("-start", "-done"))]
            end = len(self.order) - 1 if i is self.where.root else self.order[i.name]
            needed[i.name] = max([end, *(self.order[u.name] for u in users), *names])
        return needed

    def _ends_here(self, value: Value, i: Instruction) -> bool:
        """Whether nothing after `i` uses the buffer, so that it may be overwritten."""
        if self.is_entry and value in {self._find(v) for v in self.outside}:
            return self._is_donated(value)
        return self.class_needed[value] <= self.order[i.name]

    def _is_donated(self, value: Value) -> bool:
        numbers = set(self.module.aliases.values())
        return any(
            int(p.text) in numbers and self._find((p.name, 0)) == self._find(value) for p in self.where.parameters
        )

    def _hand_over(self) -> None:
        """What is returned lives to the end; it is the caller's, or a donated argument's buffer."""
        root = self.where.root
        end = len(self.order) - 1
        for n in range(len(root.shapes)):
            value = self._find((root.name, n))
            self.last[value] = end
            if not self.is_entry or ((n,) if isinstance(root.result, tuple) else ()) in self.module.aliases:
                self.outside.add(value)

    def _find(self, value: Value) -> Value:
        while (up := self.parent.get(value, value)) != value:
            value = up
        return value


_NAMES = frozenset(("get-tuple-element", "tuple", "bitcast", "while", "opt-barrier"))
# fmt: off
_BY_ELEMENTS = frozenset((
    "abs", "add", "and", "ceil", "clamp", "compare", "convert", "copy", "cosine", "divide", "erf",
    "exponential", "exponential-minus-one", "floor", "is-finite", "log", "log-plus-one", "logistic", "maximum",
    "minimum", "multiply", "negate", "not", "or", "power", "remainder", "rsqrt", "select", "sign", "sine",
    "sqrt", "subtract", "tan", "tanh", "xor",
))
# fmt: on


def _by_elements(where: Computation, parameter: Instruction) -> bool:
    """Whether a fusion computes each element of its result from the same element of this parameter."""
    return all(
        user.opcode == "tuple" or (user.opcode in _BY_ELEMENTS and _by_elements(where, user))
        for user in where.users[parameter.name]
    )


def _seen_through(where: Computation, name: str) -> Instruction:
    at = where[name]
    while at.opcode in ("bitcast", "reshape", "copy", "convert"):
        at = where[at.operands[0]]
    return at


def _filler(module: Module, where: Computation, update: Instruction) -> str:
    """The op_name of the value that an update in place writes, inside of its fusion or outside."""
    at, path = update, [(where, dict[str, str]())]  # the fusions around it, each with what its parameters are outside
    for _ in range(64):  # views and copies between the update and what made it
        here, arguments = path[-1]
        if at.opcode == "fusion":
            inside = module.computations[at.calls[0]]
            path.append((inside, dict(zip((p.name for p in inside.parameters), at.operands, strict=False))))
            at = inside.root
        elif at.opcode == "parameter" and len(path) > 1:
            path.pop()
            at = path[-1][0][arguments[at.name]]
        elif at.opcode == "dynamic-update-slice":
            at = here[at.operands[1]]
        elif "/" in at.op_name and "dynamic_update" not in at.op_name:
            return at.op_name
        elif len(path) == 1 and at.opcode == "get-tuple-element" and where[at.operands[0]].opcode == "parameter":
            at = where[where.root.operands[int(at.attribute("index"))]]  # what the layer before left in the state
        elif at.operands:
            at = here[at.operands[0]]
        else:
            break
    return ""
