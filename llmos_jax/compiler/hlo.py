"""The optimized HLO text of a compiled program (`compiled.as_text()`), read into computations and instructions.

The text is what the compiler will run: after partitioning, fusion and scheduling, with the instructions of every
computation in the order they are issued. It differs between TPU, GPU and CPU, and this reads all three. Nothing is
counted here: see `hlo_cost.py`.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmos_jax.config import UserError

HBM = 0  # memory space S(0), which the text leaves out; on TPUs 1 is VMEM, 2 semaphores, 4 and 6 scalar memory
HOST = 5
OURS = "pallas_kernels."  # before the operation, in the target of a call out of a CPU's program
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclass(frozen=True, slots=True)
class Shape:
    """One array. tiles: the first tile of a TPU layout, such as (8, 128), else empty."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[int, ...] = ()
    space: int = HBM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return (self.size * _bits(self.dtype) + 7) // 8

    @property
    def padded_bytes(self) -> int:
        """Bytes that the array takes in memory: the minor dimensions are rounded up to whole tiles."""
        dims = [self.dims[i] for i in reversed(self.minor_to_major or tuple(reversed(range(len(self.dims)))))]
        dims = [1] * (len(self.tiles) - len(dims)) + dims
        for i, tile in enumerate(reversed(self.tiles), start=1):
            dims[-i] = -(-dims[-i] // tile) * tile
        return (math.prod(dims) * _bits(self.dtype) + 7) // 8


Result = Shape | tuple["Result", ...]  # a tuple's elements may be tuples


def leaves(result: Result) -> tuple[Shape, ...]:
    """The arrays of a result, flat."""
    return (result,) if isinstance(result, Shape) else tuple(leaf for part in result for leaf in leaves(part))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. attributes: the raw text behind the operands. text: what stands between the parentheses."""

    name: str
    opcode: str
    result: Result
    operands: tuple[str, ...]
    text: str = field(repr=False)
    attributes: str = field(repr=False)
    is_root: bool = False

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return leaves(self.result)

    @property
    def op_name(self) -> str:
        """Where the model made it, as jax names it: "jit(step)/transpose(jvp())/while/body/..."; may be empty."""
        return self._quoted("op_name")

    @property
    def target(self) -> str:
        """`custom_call_target` of a custom call."""
        return self._quoted("custom_call_target")

    @property
    def kernel(self) -> str:
        """The operation's name: a Pallas kernel's instruction is called so, a call out of the program has it as target."""
        ours = self.target.startswith(OURS)
        return self.target.removeprefix(OURS) if ours else self.name.rstrip(".0123456789")

    @property
    def calls(self) -> tuple[str, ...]:
        """The computations it runs, in the text's order: fusions, loops, branches, reducers."""
        return _called(self.attributes)

    def attribute(self, key: str) -> str:
        """The value of `key=value` up to the next top-level comma; "" where there is none."""
        found = re.search(rf"(?:^|[ ,]){key}=", self.attributes)
        return _balanced(self.attributes, found.end()) if found else ""

    def number(self, key: str) -> int | None:
        """The number behind `"key":"123"`, `"key":123` or `key = 123` in the backend's configuration."""
        found = re.search(rf'\b{key}(?:":"?| = )(-?\d+)', self.attributes)
        return int(found[1]) if found else None

    def _quoted(self, key: str) -> str:
        found = re.search(rf'{key}="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Instructions in the order they are issued."""

    name: str
    instructions: dict[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self if i.is_root), next(reversed(self.instructions.values())))

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        return tuple(sorted((i for i in self if i.opcode == "parameter"), key=lambda i: int(i.text)))

    @functools.cached_property
    def users(self) -> dict[str, tuple[Instruction, ...]]:
        """Of each instruction, the instructions that take it as an operand."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return {name: tuple(users) for name, users in found.items()}


@dataclass(frozen=True)
class Module:
    """A program. header: the first line, with aliases and the layout of the arguments."""

    name: str
    header: str = field(repr=False)
    computations: dict[str, Computation] = field(repr=False)
    entry: Computation = field(repr=False)
    tables: dict[str, dict[int, str]] = field(repr=False, default_factory=dict)

    @functools.cached_property
    def named(self) -> dict[str, Instruction]:
        """Every instruction; their names are unique in a module."""
        return {
            name: found
            for computation in self.computations.values()
            for name, found in computation.instructions.items()
        }

    @functools.cached_property
    def num_devices(self) -> int:
        sizes = (re.search(rf"{key}=(\d+)", self.header) for key in ("num_partitions", "replica_count"))
        return math.prod(int(found[1]) for found in sizes if found)

    @functools.cached_property
    def aliases(self) -> dict[tuple[int, ...], int]:
        """Result index -> number of the parameter whose buffer it takes over (donated arguments)."""
        table = _balanced(self.header, found.end()) if (found := re.search("input_output_alias=", self.header)) else ""
        pairs = re.findall(r"\{([\d, ]*)\}: \((\d+), \{\}", table)
        return {tuple(int(i) for i in index.split(",") if i.strip()): int(number) for index, number in pairs}

    @functools.cached_property
    def callers(self) -> dict[str, tuple[Computation, Instruction]]:
        """Of each computation, the last instruction that calls it and where that is."""
        return {name: (c, i) for c in self.computations.values() for i in c for name in i.calls}

    def body(self, loop: Instruction) -> Computation:
        return self.computations[loop.attribute("body").lstrip("%")]

    def condition(self, loop: Instruction) -> Computation:
        return self.computations[loop.attribute("condition").lstrip("%")]

    def source(self, instruction: Instruction) -> str:
        """ "file.py:12" of the line that made it, or ""."""
        if file := instruction._quoted("source_file"):
            line = re.search(r"source_line=(\d+)", instruction.attributes)
            return f"{file}:{line[1] if line else '?'}"
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        location = self._row("StackFrames", frame[1] if frame else "", "file_location_id")
        file_id = self._row("FileLocations", location, "file_name_id")
        name = self.tables.get("FileNames", {}).get(int(file_id or 0), "").strip('"')
        return f"{name}:{self._row('FileLocations', location, 'line')}" if name else ""

    def _row(self, table: str, number: str, key: str) -> str:
        found = re.search(rf"\b{key}=(\d+)", self.tables.get(table, {}).get(int(number or 0), ""))
        return found[1] if found else ""


def parse(text: str) -> Module:
    """The text of a compiled module. Raises UserError where it is not one."""
    header, _, _ = text.partition("\n")
    if not header.startswith("HloModule"):
        raise UserError("this is not the text of a compiled module; pass what `compiled.as_text()` returns")
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, rows = "", {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines()[1:]:
        if line.startswith("  "):
            if instruction := _instruction(line):
                current[instruction.name] = instruction
        elif opening := _OPENING.match(line):
            current = {}
            computations[opening[2]] = Computation(opening[2], current)
            entry = opening[2] if opening[1] else entry
        elif line[:1].isdigit():
            number, _, row = line.partition(" ")
            rows[int(number)] = row
        elif line.isalpha():  # FileNames, FunctionNames, FileLocations, StackFrames
            rows = tables.setdefault(line, {})
    if not entry:
        raise UserError("the module's text has no ENTRY computation; pass what `compiled.as_text()` returns")
    name = header.removeprefix("HloModule ").split(",")[0].strip()
    return Module(name, header, computations, computations[entry], tables)


_OPENING = re.compile(r"(ENTRY )?%?([\w.\-]+)\s.*\{$")
_NAMED = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" *([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=?]*)\](?:\{([^}]*)\})?")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{}]|,')
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|(?:branch|called)_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


def _instruction(line: str) -> Instruction | None:
    named = _NAMED.match(line)
    if not named:
        return None
    end = _closing(line, named.end()) if line[named.end()] == "(" else line.index(" ", named.end())
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inner = line[opcode.end() : close - 1]
    operands = () if opcode[1] in ("constant", "parameter") else tuple(_OPERAND.findall(inner))
    result = _result(line[named.end() : end])
    return Instruction(named[2], opcode[1], result, operands, inner, line[close:].lstrip(", "), bool(named[1]))


def _closing(line: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _BRACKET.finditer(line, start):
        depth += (found[0] == "(") - (found[0] == ")")
        if depth == 0 and found[0] == ")":
            return found.end()
    raise UserError(f"the module's text has an instruction with an open parenthesis: {line.strip()[:120]}")


def _balanced(text: str, start: int) -> str:
    """From `start` up to a comma or a closing bracket that is not inside of brackets or quotes."""
    depth = 0
    for found in _BRACKET.finditer(text, start):
        token = found[0]
        if depth == 0 and token in ",)]}":
            return text[start : found.start()]
        depth += (token in "([{") - (token in ")]}")
    return text[start:].strip()


@functools.lru_cache(maxsize=1 << 14)
def _result(text: str) -> Result:
    if not text.startswith("("):
        return _array(text)
    parts, start = [], 1
    while start < len(text) - 1:
        part = _balanced(text, start)
        start += len(part) + 1
        if part := re.sub(r"/\*.*?\*/", "", part).strip():
            parts.append(_result(part))
    return tuple(parts)


@functools.lru_cache(maxsize=1 << 14)
def _array(text: str) -> Shape:
    found = _ARRAY.match(text)
    if not found:
        return Shape("opaque", ())
    order, _, rest = (found[3] or "").partition(":")
    tiles, space = re.search(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
    return Shape(
        found[1],
        tuple(int(d.strip("<=?") or 0) for d in found[2].split(",") if d),
        tuple(int(d) for d in order.split(",") if d.isdigit()),
        tuple(int(t) for t in tiles[1].split(",")) if tiles else (),
        int(space[1]) if space else HBM,
    )


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s4, c64
    return int(found[0]) if found else 8


@functools.lru_cache(maxsize=1 << 14)
def _called(attributes: str) -> tuple[str, ...]:
    # Behind the metadata stand long configurations, and kernels in them, which call nothing.
    names = (found[1] for found in _CALLED.finditer(attributes.partition("backend_config=")[0]))
    return tuple(name.strip("% {}") for group in names for name in group.split(","))
