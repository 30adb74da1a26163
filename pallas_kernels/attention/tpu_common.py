"""What the forward and the backward TPU kernel of attention share: options, ranges of visible blocks, masks, layout.

Arrays reach the kernels as [B, T, N * H], heads side by side in the lanes, so that nothing is transposed in memory; a
head is a slice of whole lane tiles. What belongs to positions (segment ids, log-sum-exp) comes in rows, [.., 1, size].
Scores are in base 2: the factor log2(e) sits in the scaled queries, and exp2 is what the chip computes.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

LANES = 128
LOG2_E = math.log2(math.e)
NEG_INF = -1e30
DEFAULT_VMEM = 64 * 2**20  # where there is no chip to ask
Index = int | Array


class Options(NamedTuple):
    """What a kernel is specialised for."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    group: int  # query heads of a key head
    num_keys: int
    segments: bool
    alibi: bool
    sinks: bool
    pairs: int = 0  # of query and key that a sequence's masks leave, for the cost estimates alone

    @property
    def q_factor(self) -> float:
        """What the queries are multiplied by before the kernel; see `scores`."""
        return self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap

    @property
    def dk_factor(self) -> float:
        """What products of score gradients and scaled queries are multiplied by: scale / q_factor."""
        return 1 / LOG2_E if self.softcap is None else self.softcap


def cost(options: Options, products: int, q: Array, *arrays: Any) -> pl.CostEstimate:
    """Of a kernel with `products` matrix products a pair, that reads and writes `arrays`."""
    batch, _, num_heads, head_dim = q.shape
    pairs = options.pairs * num_heads * batch
    moved = sum(a.size * a.dtype.itemsize for a in arrays)
    return pl.CostEstimate(flops=2 * products * pairs * head_dim, transcendentals=pairs, bytes_accessed=moved)


class Visible(NamedTuple):
    """Blocks [first, last) of which something is seen; in [full_first, full_last) everything is."""

    first: Index
    full_first: Index
    full_last: Index
    last: Index

    def within(self, start: Index, stop: Index) -> "Visible":
        return Visible(*(jnp.clip(edge, start, stop) for edge in self))


def visible_keys(options: Options, q_first: Index, q_last: Index, size: int) -> Visible:
    """Blocks of `size` keys that the queries at positions q_first..q_last see."""
    num_blocks = -(-options.num_keys // size)
    first, last = jnp.int32(0), jnp.int32(num_blocks)
    full_first, full_last = first, jnp.int32(options.num_keys // size)
    if options.causal:
        last = _blocks(q_last + size, size, num_blocks)
        full_last = jnp.minimum(full_last, _blocks(q_first + 1, size, num_blocks))
    if options.window is not None:
        first = _blocks(q_first - options.window + 1, size, num_blocks)
        # One key later than need be: then every query has seen a key before the first full block.
        full_first = _blocks(q_last - options.window + 1 + size, size, num_blocks)
    return _ordered(options, first, full_first, full_last, last)


def visible_queries(
    options: Options, kv_first: Index, offset: Index, num_queries: int, size: int, keys: int
) -> Visible:
    """Blocks of `size` queries, the first at position `offset`, that see any of `keys` keys from kv_first on."""
    num_blocks = -(-num_queries // size)
    first, last = jnp.int32(0), jnp.int32(num_blocks)
    full_first, full_last = first, last
    kv_last = kv_first + keys - 1
    if options.causal:
        first = _blocks(kv_first - offset, size, num_blocks)
        full_first = _blocks(kv_last - offset + size - 1, size, num_blocks)
    if options.window is not None:
        end = jnp.minimum(kv_last, options.num_keys - 1) + options.window - offset  # the first that sees none of them
        last = _blocks(end + size - 1, size, num_blocks)
        full_last = _blocks(kv_first + options.window - offset, size, num_blocks)
    full_last = jnp.where(kv_last < options.num_keys, full_last, first)
    return _ordered(options, first, full_first, full_last, last)


def _blocks(position: Index, size: int, limit: int) -> Array:
    """How many whole blocks end at or before `position`, at most `limit`."""
    return jnp.minimum(lax.div(jnp.maximum(jnp.int32(position), 0), jnp.int32(size)), limit)


def _ordered(options: Options, first: Array, full_first: Array, full_last: Array, last: Array) -> Visible:
    last = jnp.maximum(first, last)
    if options.segments and not options.causal:  # on the diagonal every query sees a key; here nothing says so
        return Visible(first, last, last, last)
    full_first = jnp.clip(full_first, first, last)
    return Visible(first, full_first, jnp.clip(full_last, full_first, last), last)


def hidden(
    options: Options, scores: Array, q_first: Index, kv_first: Index, q_axis: int, ids: Any, value: float
) -> Array:
    """Scores with `value` in place of those that do not count; the first one is of query q_first and key kv_first.

    ids: segment ids of the queries and of the keys, each along its axis; None without segments.
    """
    kv_axis, shape = 1 - q_axis, scores.shape
    distance = lax.broadcasted_iota(jnp.int32, shape, q_axis) - lax.broadcasted_iota(jnp.int32, shape, kv_axis)
    shift = q_first - kv_first  # of the true distance: kept apart, so that the rest is constant
    conditions = []
    if options.causal:
        conditions.append(distance >= -shift)
    if options.window is not None:
        conditions.append(distance < options.window - shift)
    if options.num_keys % shape[kv_axis]:
        conditions.append(lax.broadcasted_iota(jnp.int32, shape, kv_axis) < options.num_keys - kv_first)
    if ids is not None:
        conditions.append(ids[0] == ids[1])
    return jnp.where(functools.reduce(jnp.logical_and, conditions), scores, value) if conditions else scores


def distances(shape: tuple[int, ...], q_first: Index, kv_first: Index, q_axis: int) -> Array:
    """How far each key stands behind each query, in float32."""
    index = [lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (q_axis, 1 - q_axis)]
    return (index[1] - index[0] + (kv_first - q_first)).astype(jnp.float32)


def capped(options: Options, products: Array) -> tuple[Array, Array | None]:
    """Scores in base 2 from products of scaled queries and keys, and the tanh that capped them."""
    if options.softcap is None:
        return products, None
    squashed = jnp.tanh(products)
    return squashed * (options.softcap * LOG2_E), squashed


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Product in float32; float32 operands are multiplied in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def column(row: Array) -> Array:
    """[1, n] -> [n, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def padded_heads(x: Array, length: int) -> Array:
    """[B, T, N, H] -> [B, length, N * H'], zeros behind, H' a multiple of the lanes."""
    batch, now, _, head_dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, length - now), (0, 0), (0, round_up(head_dim, LANES) - head_dim)))
    return x.reshape(batch, length, -1)


def columns(x: Array, size: int) -> Array:
    """Padded heads [B, T, N * H'] -> [B, T / size, N * H', size]: blocks of positions, transposed."""
    return x.reshape(x.shape[0], -1, size, x.shape[2]).swapaxes(2, 3)


def unpadded_heads(x: Array, like: jax.ShapeDtypeStruct | Array) -> Array:
    """The inverse of `padded_heads`."""
    batch, length, heads, head_dim = like.shape
    return x.reshape(batch, -1, heads, round_up(head_dim, LANES))[:, :length, :, :head_dim]


def rows(x: Array, length: int, size: int, value: Any) -> Array:
    """[.., T] -> [.., length / size, 1, size], `value` behind."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=value)
    return x.reshape(*x.shape[:-1], length // size, 1, size)


def ranges(ids: Array, length: int, size: int) -> Array:
    """Smallest and largest of the segment ids [B, T] in each block, [B, length / size, 2]; padding counts as -1."""
    blocks_of_ids = rows(ids, length, size, -1)[:, :, 0]
    return jnp.stack([jnp.min(blocks_of_ids, axis=-1), jnp.max(blocks_of_ids, axis=-1)], axis=-1).astype(jnp.int32)


def relation(ranges: Any, b: Index, q_block: Index, kv_block: Index) -> tuple[Array, Array]:
    """Whether a block of queries and one of keys may share a segment, and whether all of both are of one segment."""
    q_ranges, kv_ranges = ranges
    q_low, q_high = q_ranges[b, q_block, 0], q_ranges[b, q_block, 1]
    kv_low, kv_high = kv_ranges[b, kv_block, 0], kv_ranges[b, kv_block, 1]
    share = (q_low <= kv_high) & (kv_low <= q_high)
    return share, (q_low == kv_high) & (kv_low == q_high) & (q_low == q_high)


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def body_sizes(num_queries: int, num_keys: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Queries and keys of a body to be tried, best first."""
    for q, kv in (1024, 1024), (512, 1024), (1024, 512), (512, 512), (256, 512), (256, 256), (128, 128):
        if itemsize == 4 and q * kv > 512 * 512:  # products in full precision make bodies six times as long
            continue
        yield min(q, round_up(num_queries, LANES)), min(kv, round_up(num_keys, LANES))


def vmem_capacity() -> int:
    """Bytes of a core's VMEM."""
    return DEFAULT_VMEM if dispatch.interpreted() else pltpu.get_tpu_info().vmem_capacity_bytes


def interpret() -> Any:
    """How `pallas_call` is to interpret a kernel; False on a chip."""
    return dispatch.interpreted()
