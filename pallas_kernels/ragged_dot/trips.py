"""How often each body of a grouped product runs for given sizes of groups, and so the static cycles of a whole call.

Works on the schedules of `schedule.KernelSchedule`: of our kernels, and of the megablox kernels that ship with jax.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels.schedule import KernelSchedule, Region

ALIGNMENT = 16  # as in tpu.py


class Visit(NamedTuple):
    """Rows that a tile and a group share, counted from the tile's first."""

    low: int
    high: int
    first: bool
    last: bool


def routed(rows: int, groups: int) -> list[int]:
    """Sizes of groups when every row picks one at random."""
    return np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups)).tolist()


def visits(sizes: Sequence[int], tile: int) -> Iterator[Visit]:
    start = 0
    for size in sizes:
        end = start + size
        for at in range(start // tile * tile, end, tile):
            low, high = max(start - at, 0), min(end - at, tile)
            yield Visit(low, high, at <= start, at + tile >= end)
        start = end


def cycles(kernel: KernelSchedule, block: Mapping[str, int], sizes: Sequence[int], shape: tuple[int, int]) -> float:
    """Static cycles of a call for groups of these sizes, none empty.

    block: "m", "k", "n" of megablox, or the fields of tpu.RowBlocks or tpu.WeightBlocks. shape: features of the rows
    that are loaded whole, or of the result's rows, and columns of the result.
    """
    costs, around = bodies(kernel)
    of_visit = sum(region.own for region in around)
    rest = [region.bundles for above in around for region in above.inside if not region.total("MXU")]
    sums = "features" in block or "tgmm" in kernel.name
    of_group = sum(rest if "m" in block else rest[-1:]) if sums else 0  # ours clears the sums of empty groups alone
    tile = block.get("tile", block.get("m", 0))
    total = 0.0
    for visit in visits(sizes, tile):
        runs = [costs[0]] if "m" in block else _runs(visit, block["chunk"], costs, sums)
        total += of_visit + sum(runs)
    total += of_group * len(sizes)
    height = block.get("features", block.get("k", shape[0])) if sums else shape[0]
    return total * math.ceil(shape[0] / height) * math.ceil(shape[1] / block.get("columns", block.get("n", 0)))


def _runs(visit: Visit, chunk: int, costs: Sequence[int], sums: bool) -> list[int]:
    """What each body takes that runs in a visit of ours; costs are in the order of the program."""
    left = visit.high - visit.low // ALIGNMENT * ALIGNMENT
    if not sums:  # a body for each quarter of a chunk
        costs = sorted(costs)
        return [costs[-1]] * ((left - 1) // chunk) + [costs[math.ceil(((left - 1) % chunk + 1) / chunk * 4) - 1]]
    unit = _unit(chunk, costs)
    whole = (left + unit - 1) // chunk
    units = max(0, math.ceil((left - whole * chunk) / unit))
    runs = [costs[1]] * whole + [costs[-1]] * units
    if visit.first and runs:  # begins the sums
        runs[0] = costs[0] if whole else costs[-2]
    return runs


def _unit(chunk: int, costs: Sequence[int]) -> int:
    """Rows of the smaller bodies, whose products are as many as their share of a chunk."""
    return chunk if len(costs) == 2 else 128 if costs[1] > 3 * costs[3] else 256


def bodies(kernel: KernelSchedule) -> tuple[list[int], list[Region]]:
    """What a run of each body takes (those with products, in the order of the program), and the regions around them.

    A body in a loop of its own inside a step of the grid takes its share of that loop too; what is around them runs
    once a step.
    """
    costs: list[int] = []
    around: dict[tuple[str, int, int], Region] = {}
    for region, above in _walk(kernel.loops[0]):
        if region.slots["MXU"]:
            inner = next((at for at, outer in enumerate(above) if at and outer.kind == "loop"), len(above))
            costs.append(region.bundles + sum(outer.own for outer in above[inner:]))
            around.update((outer[:3], outer) for outer in above[:inner])
    return costs, list(around.values())


def _walk(region: Region, above: tuple[Region, ...] = ()) -> Iterator[tuple[Region, tuple[Region, ...]]]:
    yield region, above
    for inner in region.inside:
        yield from _walk(inner, (*above, region))
