"""Attention in plain XLA: blocks of queries against the keys they can see, with a backward pass that recomputes.

Memory is linear in the sequence: only the output and the log-sum-exp of a row are kept. With a static `q_offset` the
causal mask and the window cut each block's keys to a static range, so about half of the products are never computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.reference import NEG_INF, mask

BLOCK_Q = 128  # small enough that a block's scores stay in a CPU's cache
product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(q, k, v, *, causal, window, q_offset, q_segment_ids, kv_segment_ids, softcap, scale):
    """See `api.attention`."""
    segments = None if q_segment_ids is None else (q_segment_ids, kv_segment_ids)
    static = isinstance(q_offset, int)
    options = (causal, window, softcap, scale, q_offset if static else None)
    offset = None if static else jnp.broadcast_to(jnp.asarray(q_offset), (q.shape[0],))
    q_BKGTH = _group(q, k.shape[2])
    out_BKGTH = _attention(options, q_BKGTH, k.swapaxes(1, 2), v.swapaxes(1, 2), segments, offset)
    return _ungroup(out_BKGTH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q_BKGTH, k_BKSH, v_BKSH, segments, offset):
    return _forward(options, q_BKGTH, k_BKSH, v_BKSH, segments, offset)[0]


def _forward(options, q, k, v, segments, offset):
    outputs, sums = [], []
    for block in _blocks(options, q.shape[3], k.shape[2]):
        rows, keys = block
        scores, seen, _ = _scores(options, block, q[:, :, :, rows], k[:, :, keys], segments, offset)
        top = jnp.max(jnp.where(seen, scores, NEG_INF), axis=-1, keepdims=True)
        p = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = jnp.sum(p, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1.0, total)
        out = product("bkrs,bksh->bkrh", _join_rows(p).astype(v.dtype), v[:, :, keys])
        outputs.append((_split_rows(out, q.shape[2]) / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out = jnp.concatenate(outputs, axis=3)
    return out, (q, k, v, segments, offset, out, sums)


def _backward(options, residuals, d_out):
    q, k, v, segments, offset, out, sums = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dk = dv = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]), jnp.float32)
    dq = []
    for block, lse in zip(_blocks(options, q.shape[3], k.shape[2]), sums, strict=True):
        rows, keys = block
        q_rows, g_rows = _join_rows(q[:, :, :, rows]), _join_rows(d_out[:, :, :, rows])
        scores, seen, slope = _scores(options, block, q[:, :, :, rows], k[:, :, keys], segments, offset)
        p = jnp.where(seen, jnp.exp(scores - lse), 0.0)
        dp = _split_rows(product("bkrh,bksh->bkrs", g_rows, v[:, :, keys]), q.shape[2])
        ds = _join_rows(p * (dp - delta[:, :, :, rows]) * slope * options[3]).astype(q.dtype)
        p = _join_rows(p)
        # Keys last: the transposed product is the slow one on a CPU, and this form transposes its small operand.
        pad = [(0, 0)] * 3 + [(keys.start, k.shape[2] - keys.stop)]
        dv = dv + jnp.pad(product("bkrs,bkrh->bkhs", p.astype(v.dtype), g_rows), pad)
        dk = dk + jnp.pad(product("bkrs,bkrh->bkhs", ds, q_rows), pad)
        dq.append(_split_rows(product("bkrs,bksh->bkrh", ds, k[:, :, keys]), q.shape[2]).astype(q.dtype))
    return jnp.concatenate(dq, axis=3), dk.swapaxes(2, 3).astype(k.dtype), dv.swapaxes(2, 3).astype(v.dtype), None, None


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


def _scores(options, block, q_BKGTH, k_BKSH, segments, offset):
    """Capped scores [B, K, G, T, S] in float32, which of them count, and the softcap's derivative."""
    causal, window, softcap, scale, static_offset = options
    rows, keys = block
    scores = _split_rows(product("bkrh,bksh->bkrs", _join_rows(q_BKGTH), k_BKSH), q_BKGTH.shape[2]) * scale
    slope: Array | float = 1.0
    if softcap is not None:
        squashed = jnp.tanh(scores / softcap)
        scores, slope = softcap * squashed, 1.0 - squashed**2
    seen = _seen(causal, window, rows, keys, segments, static_offset if offset is None else offset)
    return scores, seen[:, None, None], slope


def _seen(causal, window, rows, keys, segments, offset):
    """Which key of the block a query row sees: bool [B or 1, rows, keys]."""
    q_index = jnp.arange(rows.start, rows.stop) + jnp.reshape(jnp.asarray(offset), (-1, 1))
    q_ids, kv_ids = (None, None) if segments is None else (segments[0][:, rows], segments[1][:, keys])
    kv_index = jnp.arange(keys.start, keys.stop)
    return mask(q_index, kv_index, causal=causal, window=window, q_segment_ids=q_ids, kv_segment_ids=kv_ids)


def _group(x_BTNH: Array, num_kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, G, T, H]: the G query heads that share a key head side by side."""
    b, t, n, h = x_BTNH.shape
    return x_BTNH.reshape(b, t, num_kv_heads, n // num_kv_heads, h).transpose(0, 2, 3, 1, 4)


def _ungroup(x_BKGTH: Array) -> Array:
    b, k, g, t, h = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)


def _join_rows(x_BKGTH: Array) -> Array:
    """Queries that share a key head become rows of one product, [B, K, G T, H]."""
    return x_BKGTH.reshape(*x_BKGTH.shape[:2], -1, x_BKGTH.shape[4])


def _split_rows(x_BKRH: Array, group: int) -> Array:
    return x_BKRH.reshape(*x_BKRH.shape[:2], group, -1, x_BKRH.shape[3])
