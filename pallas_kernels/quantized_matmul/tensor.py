"""Quantised weights: how codes, scales and zero points lie in memory, and how they come from and go back to floats.

Along one axis (that of contraction) a weight is cut into groups; w = (code - zero) * scale, one scale and, if it is
not symmetric, one zero point for each group. Codes are int8, float8_e4m3fn, or int4 two a byte.

The layout is the same for every chip. The axis is padded with zero codes to whole groups and to a multiple of 128, so
that a kernel's blocks divide it. Two int4 neighbours on the axis share a byte, the first in its low half: that is how
a chip packs int4 itself, so a kernel may also read the bytes as int4 or, four rows at a time, as words of eight codes.
Scales and zero points lie [..., groups, other axis] whichever axis is quantised: a vector over the outputs each.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Bits = int | str  # 8, 4 or "fp8"
FP8 = jnp.float8_e4m3fn
ALIGNMENT = 128  # of the padded axis: a TPU's lanes, and two TMA rows of a GPU
_LARGEST: dict[int | str, float] = {8: 127.0, 4: 7.0, "fp8": 448.0}
_TINY = float(jnp.finfo(jnp.float32).tiny)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scales", "zeros"],
    meta_fields=["bits", "group_size", "axis", "size", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """Quantised weights, a pytree; leading dimensions (stacked layers) may be indexed, scanned or mapped over.

    data: codes, of w's shape with `axis` padded, and halved where bits is 4: int8, uint8 (two int4) or float8_e4m3fn.
    scales: float32 [..., groups, other]. zeros: int8 likewise, in the codes' units; None if symmetric.
    bits: 8, 4 or "fp8". group_size: of a group along `axis`; None is one group for all of it.
    axis: -2 or -1. size: w's length along it. dtype: of w, and of what `dequantize` gives.
    """

    data: Any  # jax puts placeholders where arrays are
    scales: Any
    zeros: Any
    bits: Bits
    group_size: int | None
    axis: int
    size: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights that this stands for."""
        shape = list(self.data.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def padded_size(self) -> int:
        """Length of the quantised axis with its padding, in codes."""
        return self.data.shape[self.axis] * (2 if self.bits == 4 else 1)

    @property
    def nbytes(self) -> int:
        """Of all that is stored."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def mT(self) -> "QuantizedTensor":
        """The transposed weights, with their codes moved in memory; scales lie the same either way."""
        return dataclasses.replace(self, data=self.data.mT, axis=-3 - self.axis)


def quantize(
    w: Array, bits: Bits = 8, group_size: int | None = None, symmetric: bool = True, axis: int = -2
) -> QuantizedTensor:
    """Rounds w to the nearest code, with scales from each group's range.

    No weight is off by more than half its scale with integers, by 1/16 of itself or scale / 1024 with fp8.

    Args:
      w: float [..., K, N], at least two dimensions.
      bits: 8 (codes -127..127, or -128..127 with zero points), 4 (-7..7, or -8..7), or "fp8" (float8_e4m3fn).
      group_size: entries along `axis` that share a scale, at least 2 and even; None is all of them.
      symmetric: whether zero is code 0. Otherwise a group's smallest and largest weight (and 0) take the ends of the
        range, and the zero point says which code is 0.
      axis: of the groups, one of the last two: that over which a product with w will sum.
    Raises: ValueError for other arguments.
    """
    axis = axis - w.ndim if axis >= 0 else axis
    if w.ndim < 2 or axis not in (-2, -1):
        raise ValueError(f"quantize takes w [..., K, N] and one of its last two axes, not {w.shape} and axis={axis}")
    if bits not in _LARGEST:
        raise ValueError(f"bits={bits!r} is not 8, 4 or 'fp8'")
    if group_size is not None and (group_size < 2 or group_size % 2):
        raise ValueError(f"group_size={group_size} is not an even number of at least 2")
    if bits == "fp8" and not symmetric:
        raise ValueError("fp8 codes have no zero points: symmetric must be True")
    size = w.shape[axis]
    values = w.astype(jnp.float32) if axis == -2 else w.astype(jnp.float32).mT
    padded = size + -size % math.lcm(ALIGNMENT, group_size or 1)
    values = jnp.pad(values, [(0, 0)] * (w.ndim - 2) + [(0, padded - size), (0, 0)])
    groups = values.reshape(*w.shape[:-2], padded // (group_size or padded), -1, values.shape[-1])
    codes, scales, zeros = _codes(groups, bits, symmetric)
    codes = codes.reshape(values.shape)
    data = pack(codes, -2) if bits == 4 else codes
    return QuantizedTensor(data if axis == -2 else data.mT, scales, zeros, bits, group_size, axis, size, w.dtype)


def _codes(groups: Array, bits: Bits, symmetric: bool) -> tuple[Array, Array, Array | None]:
    """Codes of [..., groups, group, other], with scales and zero points [..., groups, other]."""
    largest = _LARGEST[bits]
    if symmetric:
        scales = jnp.maximum(jnp.max(jnp.abs(groups), axis=-2) / largest, _TINY)
        ratio = jnp.clip(groups / scales[..., None, :], -largest, largest)
        return ratio.astype(FP8) if bits == "fp8" else jnp.round(ratio).astype(jnp.int8), scales, None
    low, high = (jnp.minimum(jnp.min(groups, axis=-2), 0), jnp.maximum(jnp.max(groups, axis=-2), 0))
    scales = jnp.maximum((high - low) / (2 * largest + 1), _TINY)
    zeros = jnp.clip(jnp.round(-low / scales) - largest - 1, -largest - 1, largest)
    codes = jnp.clip(jnp.round(groups / scales[..., None, :]) + zeros[..., None, :], -largest - 1, largest)
    return codes.astype(jnp.int8), scales, zeros.astype(jnp.int8)


def dequantize(w: QuantizedTensor, dtype: Any = None) -> Array:
    """The weights (code - zero) * scale in `dtype`, or in the dtype they had; computed in float32 at least."""
    values = jnp.promote_types(jnp.float32, dtype or w.dtype)
    codes, num_groups = unpacked(w), w.scales.shape[-2]

    def along(by_group):  # [..., groups, other] -> beside the groups of codes
        by_group = by_group.astype(values)
        return by_group[..., None, :] if w.axis == -2 else by_group.mT[..., None]

    at = codes.ndim + w.axis
    grouped = codes.reshape(*codes.shape[:at], num_groups, -1, *codes.shape[at + 1 :]).astype(values)
    if w.zeros is not None:
        grouped = grouped - along(w.zeros)
    result = (grouped * along(w.scales)).astype(dtype or w.dtype).reshape(codes.shape)
    return lax.slice_in_dim(result, 0, w.size, axis=at)


def unpacked(w: QuantizedTensor) -> Array:
    """The codes one by one, of w's shape with its axis padded: int8 or float8_e4m3fn."""
    return unpack(w.data, w.axis) if w.bits == 4 else w.data


def pack(codes: Array, axis: int) -> Array:
    """int8 codes in -8..7 as uint8, neighbours on `axis` (-2 or -1) in one byte, the first in the low half."""
    bits = lax.bitcast_convert_type(codes, jnp.uint8) & 15
    first, second = ((bits[..., at::2, :] if axis == -2 else bits[..., at::2]) for at in (0, 1))
    return first | (second << 4)


def unpack(data: Array, axis: int) -> Array:
    """The int8 codes in -8..7 that `pack` put together."""
    first, second = halves(data)
    at = data.ndim + axis + 1
    shape = list(data.shape)
    shape[axis] *= 2
    return jnp.stack([first, second], axis=at).reshape(shape)


def halves(data: Array) -> tuple[Array, Array]:
    """The int4 codes in the low and in the high half of each byte, as int8."""
    signed = lax.bitcast_convert_type(data, jnp.int8)
    return (signed << 4) >> 4, signed >> 4


def quantize_rows(x: Array, kind: str) -> tuple[Array, Array]:
    """Activations [..., K] as int8 or fp8 codes, with one float32 scale for each row, [..., 1]."""
    largest = _LARGEST[8 if kind == "int8" else "fp8"]
    values = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(values), axis=-1, keepdims=True) / largest, _TINY)
    ratio = values / scales
    if kind == "int8":  # rounding takes what is a little above the largest back to it
        return jnp.round(ratio).astype(jnp.int8), scales
    return jnp.clip(ratio, -largest, largest).astype(FP8), scales
