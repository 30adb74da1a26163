"""The definition of paged attention, as plain as it can be written; the truth in tests."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

NEG_INF = -1e30  # not -inf: a row without any key must give zeros, not nan


class KVPages(NamedTuple):
    """The pool of keys and values that all sequences share; a pytree.

    A page holds, for each head, a matrix of keys and one of values, as they enter a matrix product: it is one
    contiguous copy, and nothing has to be rearranged. The heads (dimension 1) can be sharded.

    data: keys at [:, :, 0], values at [:, :, 1].
      uint16 stands for the bits of bfloat16: a CPU's compiler turns a whole pool of bfloat16 into float32 and back to
      write one token into it.
    scales: of a quantised pool (int8, float8), a channel (keys have a few large ones, arXiv:2402.02750): stored are
      key[k] / scales[k, 0] and value[k] / scales[k, 1]. None for a pool in floating point, and where an implementation
      sees it. They are fixed for the life of the pool.
    """

    data: Shaped[Array, "P K 2 page_size H"]
    scales: Float[Array, "K 2 H"] | None = None


class Located(NamedTuple):
    """Where each of the M new tokens belongs."""

    sequence: Int[Array, "M"]
    position: Int[Array, "M"]  # in its sequence
    real: Bool[Array, "M"]  # of a sequence, not padding


def locate(num_tokens: int, lengths: Int[Array, "R"], starts: Int[Array, "R+1"], num_sequences) -> Located:
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.arange(lengths.shape[0])[:, None]
    inside = (token >= starts[:-1, None]) & (token < starts[1:, None]) & (row < num_sequences)
    sequence = jnp.argmax(inside, axis=0).astype(jnp.int32)
    position = lengths[sequence] - starts[sequence + 1] + token
    return Located(sequence, position, inside.any(axis=0))


def stored(x: Float[Array, "M K H"], dtype) -> Shaped[Array, "M K H"]:
    """x as the pool stores it: rounded to the nearest (ties to even) and kept in the range of a quantised `dtype`."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype)
    if dtype.itemsize > 1:
        return x.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        top = float(jnp.iinfo(dtype).max)
        return jnp.clip(jnp.round(x), -top, top).astype(dtype)
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -top, top).astype(dtype)


def values(data: Shaped[Array, "*any"]) -> Shaped[Array, "*any"]:
    """What is stored, as numbers."""
    return lax.bitcast_convert_type(data, jnp.bfloat16) if data.dtype == jnp.uint16 else data


def write(k_new, v_new, pages: KVPages, block_tables, at: Located) -> KVPages:
    """The pool with the new tokens in it."""
    num_pages, _, _, page_size, _ = pages.data.shape
    page = jnp.where(at.real, block_tables[at.sequence, at.position // page_size], num_pages)  # past the end: dropped
    data = pages.data
    for kv, new in enumerate((k_new, v_new)):
        data = data.at[page, :, kv, at.position % page_size].set(stored(new, data.dtype), mode="drop")
    return pages._replace(data=data)


def attend(q, pages, block_tables, at, *, causal, window, softcap, sinks, scale, kv_lengths):
    """(out [M, N, H], log-sum-exp [M, N]); a token sees at most the first kv_lengths[sequence] keys."""
    _, _, _, _page_size, head_dim = pages.data.shape
    group = q.shape[1] // pages.data.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    kv = values(pages.data)[block_tables].astype(dtype)  # [R, pages, K, 2, page_size, H]
    kv = kv.transpose(3, 0, 1, 4, 2, 5).reshape(2, block_tables.shape[0], -1, pages.data.shape[1], head_dim)
    k, v = jnp.repeat(kv, group, axis=3)[:, at.sequence]  # [M, S, N, H]
    distance = at.position[:, None] - jnp.arange(k.shape[1])
    seen = at.real[:, None] & (jnp.arange(k.shape[1]) < kv_lengths[at.sequence][:, None])
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    scores = jnp.einsum("mnh,msnh->mns", q.astype(dtype), k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, None], scores, NEG_INF)
    sink = jnp.full((q.shape[1], 1), NEG_INF, dtype) if sinks is None else sinks[:, None].astype(dtype)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights = jnp.where(seen[:, None], jnp.exp(scores - top), 0)
    total = weights.sum(axis=-1, keepdims=True) + jnp.where(sink > NEG_INF, jnp.exp(sink - top), 0)
    v = jnp.where(seen[:, :, None, None], v, 0)  # what nobody wrote may be nan
    out = jnp.einsum("mns,msnh->mnh", weights / jnp.where(total == 0, 1, total), v)
    lse = jnp.where(total == 0, NEG_INF, top + jnp.log(jnp.where(total == 0, 1, total)))[..., 0]
    out = jnp.where(at.real[:, None, None], out, 0)
    return out.astype(q.dtype), jnp.where(at.real[:, None], lse, NEG_INF)


def paged_attention(q, k_new, v_new, pages, block_tables, lengths, starts, num_sequences, *, prefix, **options):
    """See `api.paged_attention`; `prefix` is None or (page numbers [C], number of keys in them)."""
    if prefix is not None:
        block_tables, lengths = with_prefix(pages, block_tables, lengths, *prefix)
    at = locate(q.shape[0], lengths, starts, num_sequences)
    pages = write(k_new, v_new, pages, block_tables, at)
    return attend(q, pages, block_tables, at, causal=True, kv_lengths=lengths, **options)[0], pages


def with_prefix(pages, block_tables, lengths, prefix_table, prefix_length):
    """Tables and lengths as they are without a shared prefix: its (whole) pages stand before those of a sequence."""
    used = prefix_length // pages.data.shape[3]
    rows, _own = block_tables.shape
    joined = jnp.concatenate([jnp.broadcast_to(prefix_table, (rows, prefix_table.shape[0])), block_tables], axis=1)
    column = jnp.arange(joined.shape[1])
    unused = prefix_table.shape[0] - used
    column = jnp.where(column < used, column, jnp.minimum(column + unused, joined.shape[1] - 1))
    return joined[:, column], lengths + prefix_length


def merge(out_a, lse_a, out_b, lse_b) -> Array:
    """Attention over the keys of both parts, from that over each (arXiv:2501.01005, section 2.2)."""
    top = jnp.maximum(lse_a, lse_b)
    a, b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    a, b = (jnp.where(lse > NEG_INF, x, 0)[..., None] for x, lse in ((a, lse_a), (b, lse_b)))
    total = jnp.where(a + b == 0, 1, a + b)
    return (out_a.astype(a.dtype) * (a / total) + out_b.astype(b.dtype) * (b / total)).astype(out_a.dtype)
