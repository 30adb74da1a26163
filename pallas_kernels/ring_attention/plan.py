"""What a device computes at each step of the ring: pieces of its queries against pieces of the keys at hand.

At step s device i holds the keys of device (i - s) mod P. All of it is arithmetic on chunk numbers, so nothing that a
mask empties is ever computed, and a piece that no mask cuts is computed without one.
"""

from typing import NamedTuple

from jax import Array

from pallas_kernels.ring_attention.order import Order


class Piece(NamedTuple):
    """Attention of a device's queries to keys, both as slices of what it holds."""

    queries: slice
    keys: slice
    causal: bool = False
    window: int | None = None
    offset: int | Array = 0  # of the first query among the keys
    when: bool | Array = True


class Plan(NamedTuple):
    """parts: number of devices. length: of the sequence that each one holds."""

    order: Order
    parts: int
    length: int
    causal: bool
    window: int | None

    @property
    def num_steps(self) -> int:
        """After so many no device has anything left to see."""
        if self.order == "contiguous" and self.causal and self.window is not None:
            return min(self.parts, 1 + (self.window + self.length - 2) // self.length)
        return self.parts

    @property
    def all_steps_alike(self) -> bool:
        """Whether `pieces` takes a step that is not known while tracing, other than the first."""
        return self.window is None

    def pieces(self, device: int | Array, step: int | Array) -> list[Piece]:
        """The pieces of a step, of which those with `when` are computed."""
        whole = slice(0, self.length)
        if self.window is None and not self.causal:
            return [Piece(whole, whole)]
        return self._contiguous(device, step) if self.order == "contiguous" else self._zigzag(device, step)

    def _contiguous(self, device, step) -> list[Piece]:
        whole = slice(0, self.length)
        if _is_first(step):
            return [Piece(whole, whole, self.causal, self.window)]
        behind = self._behind(whole, whole, step * self.length, device >= step)
        return behind if self.causal else [*behind, Piece(whole, whole, when=device < step)]

    def _zigzag(self, device, step) -> list[Piece]:
        half = self.length // 2
        whole, early, late = slice(0, self.length), slice(0, half), slice(half, self.length)
        wrapped, unwrapped = device < step, device >= step  # whether the keys come from a later device or an earlier
        if self.window is None:
            if _is_first(step):
                return [Piece(whole, whole, causal=True)]
            return [Piece(whole, early, when=unwrapped), Piece(late, whole, when=wrapped)]
        source = (device - step) % self.parts
        across = self._behind(late, early, (2 * self.parts - 1 - device - source) * half, True)
        if not self.causal:
            across.append(Piece(early, late))
        if _is_first(step):
            return [Piece(part, part, self.causal, self.window) for part in (early, late)] + across
        found = self._behind(early, early, step * half, unwrapped)
        found += self._behind(late, late, (self.parts - step) * half, wrapped)
        if not self.causal:
            found += [Piece(late, late, when=unwrapped), Piece(early, early, when=wrapped)]
        return found + across

    def _behind(self, queries, keys, distance, when) -> list[Piece]:
        """Keys that stand `distance` before equally many queries, as far as the window reaches."""
        if self.window is None:
            return [Piece(queries, keys, when=when)]
        size = keys.stop - keys.start
        if not isinstance(distance, int):
            return [Piece(queries, keys, False, self.window, distance, when & (distance - size + 1 < self.window))]
        if distance - size + 1 >= self.window:
            return []
        if distance + size <= self.window:
            return [Piece(queries, keys, when=when)]
        return [Piece(queries, keys, False, self.window, distance, when)]


def _is_first(step: int | Array) -> bool:
    return isinstance(step, int) and step == 0
