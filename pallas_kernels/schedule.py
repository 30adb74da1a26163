"""What the TPU compiler made of a Pallas kernel, read from its own dump; no TPU is needed.

A TPU core issues one VLIW bundle a cycle while nothing stalls, so bundles times trips is a *static* estimate of a
kernel's cycles: stalls on copies from HBM are not in it. It ranks block sizes and compares kernels at equal work.

    [kernel] = schedule("v6e", "package.module:builder", seq_len=1024)
    kernel.cycles(), kernel.hot.bundles, kernel.hot.share("MXU"), kernel.spills

A builder returns (function, abstract arguments). It runs in a process of its own, since the compiler takes its dump
flags from the environment and a kernel with huge blocks may have to be stopped.
"""

import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import blocks
from pallas_kernels.targets import TPUS, compile_for, mesh

TIMEOUT = 120.0  # seconds; a kernel that takes longer to compile is of no use
DELAY_SLOTS = 4  # bundles after a branch that run whichever way it goes
UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL")
_PASSES = "(final|post-ra)"  # all of them would be megabytes a kernel
SAME_PRODUCTS = 0.1  # branches whose MXU work differs by less are one body written twice (masked and not, say)

Slots = dict[str, int]
Number = int | float


class CompileError(RuntimeError):
    """A compile that failed or took too long; the message is the compiler's."""


class Region(NamedTuple):
    """Bundles that run together: a kernel, the body of a loop in it, or what a branch skips."""

    kind: str  # "kernel", "loop" or "branch"
    first: int  # bundle
    last: int  # bundle after the end
    trips: int | None  # of a loop, where its bound is a constant
    own: int  # bundles in no region inside this one
    slots: Slots  # used by these bundles, by unit
    capacity: Slots  # slots of one bundle, by unit
    inside: tuple["Region", ...]

    @property
    def bundles(self) -> int:
        return self.last - self.first

    def walk(self) -> Iterator["Region"]:
        """This region and all inside it, outermost first."""
        yield self
        for region in self.inside:
            yield from region.walk()

    def total(self, unit: str) -> int:
        """Slots of `unit` used here and in all regions inside."""
        return sum(region.slots[unit] for region in self.walk())

    def share(self, unit: str) -> float:
        """Share of the slots of `unit` that these bundles use, regions inside counted."""
        return self.total(unit) / max(1, self.bundles * self.capacity[unit])

    def cycles(self, trips: Mapping[int, Number] | None = None) -> Number:
        """Estimated cycles of one run. See KernelSchedule.cycles."""
        given = trips or {}
        repeat = given.get(self.first, self.trips or 1) if self.kind == "loop" else 1
        return repeat * (self.own + sum(region.cycles(trips) for region in self._taken()))

    def _taken(self) -> list["Region"]:
        branches = [region for region in self.inside if region.kind == "branch" and region.total("MXU")]
        taken = [region for region in self.inside if region.kind == "loop"]
        for branch in sorted(branches, key=lambda region: region.cycles()):
            work = branch.total("MXU")
            if not any(abs(work - one.total("MXU")) <= SAME_PRODUCTS * work for one in taken if one.kind == "branch"):
                taken.append(branch)
        return taken


class KernelSchedule(NamedTuple):
    """The schedule of one Pallas kernel.

    name: of its custom call. vmem: bytes of the scratch, windows and spill slots that the kernel itself allocates.
    """

    name: str
    kernel: Region
    vmem: int

    @property
    def bundles(self) -> int:
        return self.kernel.bundles

    @property
    def spills(self) -> int:
        """Vector registers stored because there were too few, in the program's text."""
        return self.kernel.total("VSTORE:SPILL")

    @property
    def fills(self) -> int:
        return self.kernel.total("VLOAD:FILL")

    @property
    def hot(self) -> Region:
        """The region with most products of its own, of several with as many the cheapest (a body without a mask).

        In a kernel without products it is the longest innermost loop.
        """
        regions = list(self.kernel.walk())
        most = max(region.slots["MXU"] for region in regions)
        if most:
            bodies = [region for region in regions if region.slots["MXU"] >= (1 - SAME_PRODUCTS) * most]
            return min(bodies, key=lambda region: region.bundles)
        loops = [region for region in regions if region.kind == "loop"]
        innermost = [region for region in loops if not any(inner.kind == "loop" for inner in region.inside)]
        return max(innermost, key=lambda region: region.bundles, default=self.kernel)

    @property
    def loops(self) -> list[Region]:
        return [region for region in self.kernel.walk() if region.kind == "loop"]

    def cycles(self, trips: Mapping[int, Number] | None = None) -> Number:
        """Bundles of each loop times its trips.

        A branch without products (the first or the last step of a row of blocks) is not counted; of branches with the
        same products (a body with and one without a mask) only the cheapest is. A loop whose bound is not a constant
        counts once, unless `trips` gives its number under the loop's first bundle.
        """
        return self.kernel.cycles(trips)

    def summary(self) -> dict[str, Any]:
        """Plain figures for a table or for JSON."""
        hot = self.hot
        return {
            "kernel": self.name,
            "bundles": self.bundles,
            "cycles": self.cycles(),
            "hot_bundles": hot.bundles,
            **{f"hot_{unit.lower()}": round(hot.share(unit), 4) for unit in UNITS[:4]},
            "spills": self.spills,
            "fills": self.fills,
            "vmem": self.vmem,
            "unknown_trips": sum(loop.trips is None for loop in self.loops),
        }


class Outcome(NamedTuple):
    """A compile that worked: bytes as XLA counts them, and on a TPU its kernels."""

    memory: dict[str, int]
    kernels: list[KernelSchedule]
    log: str  # what the compiler printed
    asked: list[dict[str, Any]]  # block sizes that were asked for: kernel, key, candidates, chosen
    kind: str = ""  # of chip, as jax names it


def schedule(target: str, builder: str, python: str = sys.executable, **options: Any) -> list[KernelSchedule]:
    """The kernels of `builder(**options)` compiled for a described TPU; see `compile_apart`."""
    return compile_apart(target, builder, options, python=python, dump=True).kernels


def compile_apart(
    target: str,
    builder: str,
    options: Mapping[str, Any],
    *,
    forced: Mapping[str, Mapping[str, int]] | None = None,
    python: str = sys.executable,
    timeout: Number = TIMEOUT,
    dump: bool = False,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Compiles what a builder builds for a described chip, in a process of its own.

    Args:
      target: a key of `targets.TPUS` or `targets.GPUS`.
      builder: "package.module:function" or "path/to/file.py:function"; called with `options`, which have to be JSON,
        it returns (function, abstract arguments).
      forced: block sizes by kernel, see `blocks.forced`.
      python: an interpreter whose environment has the compiler of the target.
      timeout: seconds.
      dump: read the schedule of every Pallas kernel; for TPUs.
      env: further environment variables.

    Raises: CompileError with the compiler's message, or for a compile that took longer than `timeout`.
    """
    request = json.dumps({"target": target, "builder": builder, "options": dict(options), "forced": dict(forced or {})})
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": _python_path(), **(env or {})}
        if dump and target in TPUS:
            flags = (
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_PASSES}"
            )
            variables["LIBTPU_INIT_ARGS"] = f"{variables.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
        command = [python, "-c", "from pallas_kernels.schedule import _worker; _worker()", request]
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise CompileError(f"took longer than {timeout:.0f} s to compile") from None
        if done.returncode:
            raise CompileError(_message(done.stderr))
        answer = json.loads(done.stdout.splitlines()[-1])
        return Outcome(answer["memory"], read(Path(folder)), done.stdout + done.stderr, answer["asked"], answer["kind"])


def _python_path() -> str:
    here = str(Path(__file__).parents[1])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


def _message(stderr: str) -> str:
    """The last exception of a traceback, with the lines that belong to it."""
    lines = stderr.strip().splitlines()
    starts = [at for at, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b", line)]
    return "\n".join(lines[starts[-1] :] if starts else lines[-5:])


def _worker() -> None:
    """One compile as asked for on the command line; answers with a line of JSON."""
    request = json.loads(sys.argv[1])
    with blocks.recorded() as asked, blocks.forced(request["forced"]):
        function, args = load(request["builder"])(**request["options"])
        compiled = compile_for(request["target"], function, *args)
        kind = mesh(request["target"]).devices.flat[0].device_kind
    analysis = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    memory = {name: int(getattr(analysis, f"{name}_size_in_bytes", 0)) for name in names}
    print(json.dumps({"memory": memory, "asked": [one.as_json() for one in asked], "kind": kind}))


def load(builder: str) -> Callable[..., tuple[Callable, tuple]]:
    """The function that "package.module:function" or "path/to/file.py:function" names."""
    place, _, name = builder.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise ValueError(f"builder={builder!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


# Reading the dump. A bundle is a line "0x1f LB: >> { op ;; op }"; each > is a loop around it, LB the start of a body.

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:(L[HBE]|P[BF]|CT))?\s*:\s+(>*)\s*\{(.*)")
_EXIT = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder (%\w+|-?\d+), (%\w+|-?\d+) /\* loop exit test")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)(%p\w+)\) )?target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_ALLOCATION = re.compile(r"#allocation\w+ \[shape = .*?space=vmem, size = (0x[0-9a-f]+|\d+)")


class _Bundle(NamedTuple):
    mark: str
    depth: int
    text: str


def read(folder: Path) -> list[KernelSchedule]:
    """The Pallas kernels of a dump, in the order in which they were compiled."""
    found = []
    for file in sorted(folder.glob("*final_bundles.txt")):
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", file.name)
        if not _is_kernel(folder, stem):
            continue
        [slots] = folder.glob(f"{_escape(stem)}-*-final_hlo-static-per-bundle-utilization.txt")
        allocations = "".join(path.read_text() for path in folder.glob(f"{_escape(stem)}-*-post-ra.txt"))
        name = stem.partition("-")[2]
        found.append(parse(name, file.read_text(), slots.read_text(), allocations))
    return found


def _is_kernel(folder: Path, stem: str) -> bool:
    """Whether the HLO instruction of a dump is a Pallas kernel; "TLP" is the program that calls them all."""
    analyses = [] if stem.endswith("-TLP") else folder.glob(f"{_escape(stem)}-*-schedule-analysis_final_bundles.txt")
    return any('custom_call_target="tpu_custom_call"' in path.read_text() for path in analyses)


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def parse(name: str, bundles_text: str, utilization_text: str, allocations_text: str = "") -> KernelSchedule:
    """A kernel's schedule from the text of its final bundles, of their utilization and of its allocations."""
    bundles = _bundles(bundles_text)
    capacity, used = _utilization(utilization_text, len(bundles))
    spans = sorted([*_loops(bundles), *_branches(bundles)], key=lambda span: (span[1], -span[2], span[0] == "loop"))
    kernel = _tree(("kernel", 0, len(bundles), None), spans, capacity, used)
    vmem = sum(int(size, 0) for size in _ALLOCATION.findall(allocations_text))
    return KernelSchedule(name, kernel, vmem)


def _bundles(text: str) -> list[_Bundle]:
    bundles: list[_Bundle] = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            mark, loops, rest = match.groups()
            empty = rest.startswith("}") and not loops and bundles
            depth = bundles[-1].depth if empty else len(loops)  # an empty bundle does not say where it stands
            bundles.append(_Bundle(mark or "", depth, rest))
        elif bundles:  # an operation's comment may run over several lines
            bundles[-1] = bundles[-1]._replace(text=f"{bundles[-1].text} {line}")
    return bundles


def _utilization(text: str, count: int) -> tuple[Slots, list[Slots]]:
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    used = [dict(zip(names, map(int, line.split()), strict=True)) for line in lines[4:] if line.strip()]
    nothing = dict.fromkeys(names, 0)
    return capacity, (used + [nothing] * count)[:count]  # the exit bundle is not listed


Span = tuple[str, int, int, int | None]


def _loops(bundles: list[_Bundle]) -> Iterator[Span]:
    exits = {match[1]: match for bundle in bundles for match in _EXIT.finditer(bundle.text)}
    for first, bundle in enumerate(bundles):
        if bundle.mark != "LB":
            continue
        last = first + 1
        while last < len(bundles) and bundles[last].depth >= bundle.depth and not _next_loop(bundles[last], bundle):
            last += 1
        while bundles[last - 1].text.startswith("}"):  # empty ones at the end may stand behind the loop
            last -= 1
        trips = None
        for at in range(first, min(last + 1, len(bundles))):  # the branch back may be marked as outside
            for branch in _BRANCH.finditer(bundles[at].text):
                end = min(at + 1 + DELAY_SLOTS, len(bundles))
                if branch[1] and branch[2] in exits and end >= last:  # not that of a loop inside
                    last, trips = end, _trips(exits[branch[2]], bundles)
        yield "loop", first, last, trips


def _next_loop(bundle: _Bundle, current: _Bundle) -> bool:
    return bundle.mark == "LB" and bundle.depth == current.depth


def _trips(test: re.Match, bundles: list[_Bundle]) -> int | None:
    """Of a loop that counts from 0 to a constant; None if the bound is computed."""
    _, counter, bound = test.groups()
    if bound.startswith("%"):
        return None
    step = next((m for b in bundles if (m := re.search(rf"{counter} = sadd\.s32 (\d+), ", b.text))), None)
    return -(-int(bound) // int(step[1] if step else 1))


def _branches(bundles: list[_Bundle]) -> Iterator[Span]:
    places: dict[str, list[int]] = {}
    for at, bundle in enumerate(bundles):
        for region in _REGION.findall(bundle.text):
            places.setdefault(region, []).append(at)
    for at, bundle in enumerate(bundles):
        for _, _, region in _BRANCH.findall(bundle.text):
            first = at + 1 + DELAY_SLOTS
            target = next((place for place in places.get(region, []) if place > at), 0)
            if target > first:
                yield "branch", first, target, None


def _tree(span: Span, spans: list[Span], capacity: Slots, used: list[Slots]) -> Region:
    """The region of `span`, of which `spans` (outer before inner) are inside."""
    kind, first, last, trips = span
    inside, start = [], first
    for at, inner in enumerate(spans):
        if inner[1] < start or inner[1] >= last:
            continue
        cut = (inner[0], inner[1], min(inner[2], last), inner[3])
        inside.append(_tree(cut, [other for other in spans[at + 1 :] if other[2] <= cut[2]], capacity, used))
        start = cut[2]
    own = set(range(first, last)).difference(*(range(region.first, region.last) for region in inside))
    slots = functools.reduce(_add, (used[at] for at in own), dict.fromkeys(capacity, 0))
    return Region(kind, first, last, trips, len(own), slots, capacity, tuple(inside))


def _add(a: Slots, b: Slots) -> Slots:
    return {name: a[name] + b[name] for name in a}
