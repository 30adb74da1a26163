"""What joins the devices of a mesh axis, and how long a collective over it takes.

Rings and lines of TPU links, GPUs behind a switch, slices over the data centre network. Times are those of "How to
Scale Your Model" (jax-ml.github.io/scaling-book), chapters on sharding and on GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llmos_jax.compiler.chips import DIE_LINKS, Chip


@dataclass(frozen=True)
class Span:
    """The part of one physical axis that a mesh axis runs over: `count` chips, every `stride`-th one."""

    dim: str  # x | y | z | core | switch
    count: int
    stride: int = 1
    ring: bool = False
    bandwidth: float = 0.0  # bytes/s along it into what takes part of a chip, both directions together

    def __str__(self) -> str:
        return (
            f"{self.dim}{self.count}" + (f"/{self.stride}" if self.stride > 1 else "") + (" ring" if self.ring else "")
        )


@dataclass(frozen=True)
class AxisLinks:
    """One mesh axis: `num_slices` groups over the network, of `size / num_slices` devices each that links join."""

    axis: str
    size: int
    spans: tuple[Span, ...]
    bandwidth: float  # bytes/s that an all-gather inside a slice brings into a device; 0 where there is nothing inside
    permute_bandwidth: float  # bytes/s from a device to the next one
    latency: float  # seconds until the farthest device of a slice is reached
    num_slices: int = 1
    dcn_bandwidth: float = 0.0  # bytes/s a device

    @property
    def inside(self) -> int:
        return self.size // self.num_slices

    def seconds(self, kind: str, num_bytes: float) -> float:
        """Time of a collective, latency included; parts inside a slice and between slices one after the other.

        num_bytes: of one device's *whole* array: the result of an all-gather, the argument of a reduce-scatter, the
        argument of the others.
        """
        if self.size == 1 or not num_bytes:
            return 0.0
        if kind == "all-reduce":
            return self.seconds("reduce-scatter", num_bytes) + self.seconds("all-gather", num_bytes)
        inside = self._inside_seconds(kind, num_bytes)
        if self.num_slices == 1:
            return inside
        # Each device fetches its own part of the other slices' data; an all-to-all sends it as it is.
        outside = num_bytes if kind in ("all-to-all", "collective-permute") else num_bytes / self.inside
        share = 1.0 if kind == "collective-permute" else 1 - 1 / self.num_slices
        return inside + outside * share / self.dcn_bandwidth

    def _inside_seconds(self, kind: str, num_bytes: float) -> float:
        n = self.inside
        if n == 1:
            return 0.0
        if kind == "collective-permute":
            return self.latency / n + num_bytes / self.permute_bandwidth
        if kind != "all-to-all":
            return self.latency + num_bytes * (1 - 1 / n) / self.bandwidth
        # Half of the data crosses the middle of a ring or line; the spans work side by side on different parts.
        links = [span for span in self.spans if span.dim in "xyz"]
        devices = n // int(np.prod([span.count for span in links])) if links else 1  # of a chip
        slowest = max((devices * span.count / 4 / span.bandwidth for span in links), default=0.0)
        return self.latency + num_bytes * max(slowest, (1 - 1 / n) / self.bandwidth)

    def __str__(self) -> str:
        inside = " x ".join(map(str, self.spans))
        return " over ".join(filter(None, [inside, f"{self.num_slices} slices" if self.num_slices > 1 else ""]))


def axis_links(mesh: Mesh, chip: Chip, dims: tuple[int, ...]) -> dict[str, AxisLinks]:
    """Of every axis of `mesh`. dims: the slice's chips along each physical axis; () for chips behind a switch."""
    answer = {}
    for i, axis in enumerate(mesh.axis_names):
        group = np.moveaxis(mesh.devices, i, 0).reshape(mesh.devices.shape[i], -1)[:, 0]
        answer[axis] = _links(axis, list(group), chip, dims)
    return answer


def wraps(chip: Chip, dims: Sequence[int], dim: int) -> bool:
    """Whether the chips along physical axis `dim` form a ring (S in chips.py)."""
    if chip.wrap == 16:
        return dims[dim] == 16
    return chip.wrap == 4 and all(size % 4 == 0 for size in dims)


def _slice_of(device: Any, chip: Chip) -> int:
    return device.process_index if chip.platform == "gpu" else getattr(device, "slice_index", 0) or 0


def _links(axis: str, group: list[Any], chip: Chip, dims: tuple[int, ...]) -> AxisLinks:
    num_slices = len({_slice_of(device, chip) for device in group})
    inside = [device for device in group if _slice_of(device, chip) == _slice_of(group[0], chip)]
    dcn = chip.dcn_bandwidth / chip.devices_per_chip
    if not dims or len(inside) == 1:
        switch = (Span("switch", len(inside), bandwidth=chip.link_bandwidth),) if len(inside) > 1 else ()
        rate = chip.link_bandwidth if switch else 0.0
        return AxisLinks(axis, len(group), switch, rate, rate, chip.hop_seconds * len(inside), num_slices, dcn)
    spans, hops = _spans(inside, chip, dims)
    # Both devices of a chip take part: what arrives over the links is for both. Otherwise they share the links.
    links = tuple(span for span in spans if span.dim != "core")
    if len(links) == len(spans) and chip.devices_per_chip > 1:
        spans = links = tuple(replace(span, bandwidth=span.bandwidth / chip.devices_per_chip) for span in links)
    rate = sum(span.bandwidth for span in links or spans)
    step = min(span.bandwidth / (2 if span.ring else 1) for span in spans)
    return AxisLinks(axis, len(group), spans, rate, step, hops * chip.hop_seconds, num_slices, dcn)


def _spans(devices: list[Any], chip: Chip, dims: tuple[int, ...]) -> tuple[tuple[Span, ...], int]:
    """What a group inside one slice runs over, and the hops to its farthest member."""
    places = np.array([[*device.coords[: len(dims)], device.core_on_chip] for device in devices])
    values = [sorted(set(column.tolist())) for column in places.T]
    spans, hops = [], 0
    for d, seen in enumerate(values):
        if len(seen) == 1:
            continue
        if d == len(dims):
            spans.append(Span("core", len(seen), bandwidth=DIE_LINKS * chip.link_bandwidth))
            continue
        stride = seen[1] - seen[0]
        ring = len(seen) * stride == dims[d] and wraps(chip, dims, d)
        # `stride` groups run side by side over the same links.
        rate = (2 if ring else 1) * chip.link_bandwidth / stride
        spans.append(Span("xyz"[d], len(seen), stride, ring, rate))
        hops += dims[d] // 2 if ring else seen[-1] - seen[0]
    if np.prod([len(seen) for seen in values]) != len(devices):
        # Not a box of the torus: taken as a chain over one link, slowed by the longest step between neighbours.
        steps = np.abs(np.diff(places[:, : len(dims)], axis=0)).sum(axis=1)
        far = max(int(steps.max()), 1)
        return (Span("chain", len(devices), far, bandwidth=chip.link_bandwidth / far),), int(steps.sum())
    return tuple(spans), hops
