"""Attention in plain XLA: blocks of queries against the keys they can see, with a backward pass that recomputes.

Memory is linear in the sequence: only the output and the log-sum-exp of a row are kept. With a static `q_offset` the
causal mask and the window cut each block's keys to a static range, so about half of the products are never computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.reference import NEG_INF, mask

BLOCK_Q = 256


def attention(q, k, v, *, causal, window, q_offset, q_segment_ids, kv_segment_ids, softcap, scale):
    """See `api.attention`."""
    segments = None if q_segment_ids is None else (q_segment_ids, kv_segment_ids)
    static = isinstance(q_offset, int)
    options = (causal, window, softcap, scale, q_offset if static else None)
    offset = None if static else jnp.broadcast_to(jnp.asarray(q_offset), (q.shape[0],))
    return _attention(options, q, k, v, segments, offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, segments, offset):
    return _forward(options, q, k, v, segments, offset)[0]


def _forward(options, q, k, v, segments, offset):
    k_BKSH, v_BKSH = _heads_first(k), _heads_first(v)
    outputs, sums = [], []
    for block in _blocks(options, q.shape[1], k.shape[1]):
        rows, keys = block
        q_block = _group(q[:, rows], k.shape[2])
        p, lse, _ = _weights(options, block, q_block, k_BKSH[:, :, keys], segments, offset)
        out = jnp.einsum("bkrs,bksh->bkrh", p.astype(v.dtype), v_BKSH[:, :, keys], preferred_element_type=jnp.float32)
        outputs.append(_ungroup(out.astype(q.dtype), q.shape[2]))
        sums.append(lse)
    out = jnp.concatenate(outputs, axis=1)
    return out, (q, k, v, segments, offset, out, sums)


def _backward(options, residuals, d_out):
    q, k, v, segments, offset, out, sums = residuals
    k_BKSH, v_BKSH = _heads_first(k), _heads_first(v)
    dk, dv = (jnp.zeros(k_BKSH.shape, jnp.float32) for _ in range(2))
    dq = []
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for block, lse in zip(_blocks(options, q.shape[1], k.shape[1]), sums, strict=True):
        rows, keys = block
        q_block, g_block, delta_block = (_group(x[:, rows], k.shape[2]) for x in (q, d_out, delta))
        k_block, v_block = k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        p, _, slope = _weights(options, block, q_block, k_block, segments, offset, lse)
        dv = dv.at[:, :, keys].add(product("bkrs,bkrh->bksh", p.astype(v.dtype), g_block))
        dp = product("bkrh,bksh->bkrs", g_block, v_block)
        ds = (p * (dp - delta_block) * slope * options[3]).astype(q.dtype)
        dk = dk.at[:, :, keys].add(product("bkrs,bkrh->bksh", ds, q_block))
        dq.append(_ungroup(product("bkrs,bksh->bkrh", ds, k_block).astype(q.dtype), q.shape[2]))
    return jnp.concatenate(dq, axis=1), _heads_first(dk).astype(k.dtype), _heads_first(dv).astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)


def _blocks(options, num_queries: int, num_keys: int) -> list[tuple[slice, slice]]:
    """The blocks of query rows, each with the range of keys that any of its rows can see."""
    causal, window, _, _, offset = options
    blocks = []
    for start in range(0, num_queries, BLOCK_Q):
        rows = slice(start, min(start + BLOCK_Q, num_queries))
        first, last = 0, num_keys
        if offset is not None and causal:
            last = min(max(rows.stop + offset, 1), num_keys)
        if offset is not None and window is not None:
            first = min(max(rows.start + offset - window + 1, 0), last - 1)
        blocks.append((rows, slice(first, last)))
    return blocks


def _weights(options, block, q_BKRH, k_BKSH, segments, offset, lse=None):
    """Softmax weights [B, K, R, S] in float32, their log-sum-exp, and the softcap's derivative; R is (group, row)."""
    causal, window, softcap, scale, static_offset = options
    rows, keys = block
    scores = jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32) * scale
    slope: Array | float = 1.0
    if softcap is not None:
        squashed = jnp.tanh(scores / softcap)
        scores, slope = softcap * squashed, 1.0 - squashed**2
    seen = _seen(causal, window, rows, keys, segments, static_offset if offset is None else offset)
    group = q_BKRH.shape[2] // (rows.stop - rows.start)
    seen = jnp.tile(seen, (1, group, 1))[:, None]
    if lse is None:
        scores = jnp.where(seen, scores, NEG_INF)
        top = jnp.max(scores, axis=-1, keepdims=True)
        p = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = jnp.sum(p, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1.0, total)
        return p / total, top + jnp.log(total), slope
    return jnp.where(seen, jnp.exp(scores - lse), 0.0), lse, slope


def _seen(causal, window, rows, keys, segments, offset):
    """Which key of the block a query row sees: bool [B or 1, rows, keys]."""
    q_index = jnp.arange(rows.start, rows.stop) + jnp.reshape(jnp.asarray(offset), (-1, 1))
    q_ids, kv_ids = (None, None) if segments is None else (segments[0][:, rows], segments[1][:, keys])
    kv_index = jnp.arange(keys.start, keys.stop)
    return mask(q_index, kv_index, causal=causal, window=window, q_segment_ids=q_ids, kv_segment_ids=kv_ids)


def _heads_first(x: Array) -> Array:
    return jnp.swapaxes(x, 1, 2)


def _group(x_BTNH: Array, num_kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, (N/K) T, H]: the queries that share a key head become rows of one product."""
    b, t, n, h = x_BTNH.shape
    x = x_BTNH.reshape(b, t, num_kv_heads, n // num_kv_heads, h)
    return x.transpose(0, 2, 3, 1, 4).reshape(b, num_kv_heads, -1, h)


def _ungroup(x_BKRH: Array, num_heads: int) -> Array:
    b, k, r, h = x_BKRH.shape
    x = x_BKRH.reshape(b, k, num_heads // k, -1, h)
    return x.transpose(0, 3, 1, 2, 4).reshape(b, -1, num_heads, h)
