"""How long a compiled program takes on a target: its schedule played through, instruction by instruction.

The compiler has put the instructions in the order they are issued, so what overlaps is known and need not be assumed. The
walk keeps a clock of the core, one for each mesh axis's links and one for the host's link: a collective that is started
runs beside the instructions up to the one that waits for it, and only what is left then is waited for.

What an instruction takes: the TPU compiler's own estimated cycles where it gives them; otherwise, and for kernels, the
longer of its arithmetic at an achievable share of peak and its bytes of HBM. Nothing is known of what contends for HBM
between the core and the links, of slow devices, or of time between steps.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmos_jax.compiler.chips import MEMORY_SHARE, Chip
from llmos_jax.compiler.hlo import HOST, Computation, Module
from llmos_jax.compiler.hlo_cost import Step, schedule
from llmos_jax.compiler.interconnect import AxisLinks

Axes = tuple[str, ...]
HOST_LINK: Axes = ("host",)
HBM_LINK: Axes = ("HBM",)  # copies from HBM that were started ahead of their use


@dataclass
class Timing:
    """Seconds of one execution on one device.

    core: the core is busy. busy: a link is, by mesh axes ("host": copies to and from the host's memory, "HBM": copies
    onto the chip). exposed: the part of it that the core waits for. cycles: the compiler's own estimate alone, in
    seconds, of the instructions that have one; uncounted: how many instructions were timed by a formula, by name.
    """

    seconds: float = 0.0
    core: float = 0.0
    busy: defaultdict[Axes, float] = field(default_factory=lambda: defaultdict(float))
    exposed: defaultdict[Axes, float] = field(default_factory=lambda: defaultdict(float))
    cycles: float = 0.0
    uncounted: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Timing", times: int = 1) -> None:
        self.seconds += other.seconds * times
        self.core += other.core * times
        self.cycles += other.cycles * times
        for axes, seconds in other.busy.items():
            self.busy[axes] += seconds * times
        for axes, seconds in other.exposed.items():
            self.exposed[axes] += seconds * times
        for name, number in other.uncounted.items():
            self.uncounted[name] += number * times


def timing(
    module: Module,
    chip: Chip,
    links: Mapping[str, AxisLinks],
    mesh_shape: Mapping[str, int],
    *,
    roofline: bool = False,
) -> Timing:
    """Of one execution of `module` on a device of `chip`, whose mesh is `mesh_shape` (axis -> size, in order).

    links: what joins the devices of each axis (`Target.axis_links`). roofline: every instruction takes what XLA's cost
    model says, its FLOPs and bytes at the chip's peaks, and the compiler's cycles are left aside: a bound from below.
    A loop whose trips follow from data counts once.
    """
    return _Player(module, chip, links, mesh_shape, roofline).play(module.entry)


class _Player:
    def __init__(
        self,
        module: Module,
        chip: Chip,
        links: Mapping[str, AxisLinks],
        mesh_shape: Mapping[str, int],
        roofline: bool,
    ):
        self.module, self.chip, self.links, self.mesh_shape = module, chip, links, mesh_shape
        self.roofline = roofline
        self.known: dict[str, Timing] = {}

    def play(self, where: Computation) -> Timing:
        """One execution of a computation; what it starts is waited for before it ends."""
        if where.name in self.known:
            return self.known[where.name]
        total = Timing()
        free: defaultdict[Axes, float] = defaultdict(float)  # when each link has done what was asked of it
        running: dict[str, tuple[Axes, float]] = {}  # what was started: its link, and when it is done
        for step in schedule(self.module, where):
            if step.kind == "control":
                self._enter(total, step)
            elif step.kind in ("collective", "collective-start", "copy-start"):
                copy = step.kind == "copy-start"
                link, seconds = self._copy_seconds(step) if copy else self._collective_seconds(step)
                total.busy[link] += seconds
                free[link] = max(total.seconds, free[link]) + seconds
                running[step.name] = (link, free[link])
                if step.kind == "collective":
                    self._wait(total, *running.pop(step.name))
            elif step.kind in ("collective-done", "copy-done"):
                if step.start in running:
                    self._wait(total, *running.pop(step.start))
            elif step.kind == "compute":
                self._compute(total, step)
        for link, done in running.values():
            self._wait(total, link, done)
        self.known[where.name] = total
        return total

    def _enter(self, total: Timing, step: Step) -> None:
        inner = [self.play(called) for called in step.calls]
        if inner:
            total.add(max(inner, key=lambda one: one.seconds), 1 if step.trips is None else step.trips)

    def _wait(self, total: Timing, axes: Axes, done: float) -> None:
        late = max(0.0, done - total.seconds)
        total.exposed[axes] += late
        total.seconds += late

    def _compute(self, total: Timing, step: Step) -> None:
        if step.cycles is not None and self.chip.clock_hz and not self.roofline:
            seconds = step.cycles / self.chip.clock_hz
            total.cycles += seconds
        else:
            seconds = self._by_formula(step)
            if step.flops or step.bytes > 2**20:
                total.uncounted[step.instruction.kernel] += 1
        total.core += seconds
        total.seconds += seconds

    def _by_formula(self, step: Step) -> float:
        chip = self.chip
        shapes = step.instruction.shapes
        peak = chip.peak_flops(_jax_name(shapes[0].dtype) if shapes else "bfloat16")
        share = chip.attention_share if "attention" in step.name else chip.matmul_share
        arithmetic = step.flops / peak if peak else 0.0
        memory = step.bytes / chip.memory_bandwidth if chip.memory_bandwidth else 0.0
        return max(arithmetic, memory) if self.roofline else max(arithmetic / share, memory / MEMORY_SHARE)

    def _collective_seconds(self, step: Step) -> tuple[Axes, float]:
        """Axes, and seconds. An exchange over several axes goes over one after the other, on what the ones before left."""
        found = step.collective
        assert found is not None
        axes = found.axes(self.mesh_shape)
        if axes is None:  # groups that are no whole axes: the slowest links that could be meant
            axes = tuple(name for name, size in self.mesh_shape.items() if size > 1)
            worst = max((self.links[a].seconds(found.kind, found.bytes) for a in axes), default=0.0)
            return axes, worst
        seconds, size = 0.0, float(found.bytes)
        for axis in axes:
            seconds += self.links[axis].seconds(found.kind, size)
            if found.kind in ("all-gather", "reduce-scatter", "all-reduce"):
                size /= self.mesh_shape[axis]
        return axes, seconds

    def _copy_seconds(self, step: Step) -> tuple[Axes, float]:
        """Between the host and the device, or between HBM and what is on the chip: ahead of time, by engines of its own."""
        if any(shape.space == HOST for shape in step.instruction.shapes):
            return HOST_LINK, step.bytes / self.chip.host_bandwidth if self.chip.host_bandwidth else 0.0
        rate = self.chip.memory_bandwidth * (1.0 if self.roofline else MEMORY_SHARE)
        return HBM_LINK, step.bytes / rate if rate else 0.0


def _jax_name(dtype: str) -> str:
    names = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "s8": "int8", "s32": "int8"}
    return "float8" if dtype.startswith("f8") else names.get(dtype, dtype)
