"""Attention in plain XLA: blocks of queries against the keys they can see, with a backward pass that recomputes.

Memory is linear in the sequence: only the output and the log-sum-exp of a row are kept. With a static `q_offset` the
causal mask and the window cut each block's keys to a static range, so about half of the products are never computed.

Scores stand transposed, keys in rows: then every product of the forward and the backward pass but one multiplies
matrices as they lie, and the softmax reduces over rows, which vectorises. On a CPU a few heads are taken at a time,
so that their scores stay in the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.attention.reference import NEG_INF, mask
from pallas_kernels.cpu import transpose

BLOCK_Q = 128
MAX_BLOCKS = 32  # a program has every block of queries in it
FEW_QUERIES = 8  # as in decoding: their scores are small, and a product of so few columns is slow
CPU_SCORES = 2**18  # held at once: 1 MiB of a core's cache

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(q, k, v, *, causal, window, q_offset, q_segment_ids, kv_segment_ids, softcap, scale):
    """See `api.attention`."""
    batch, num_queries, _, head_dim = q.shape
    num_kv_heads = k.shape[2]
    if num_queries <= FEW_QUERIES:
        everything = slice(0, num_queries), slice(0, k.shape[1])
        seen = _seen(causal, window, *everything, (q_segment_ids, kv_segment_ids), q_offset)
        return _decode(q, k, v, seen, softcap, scale)
    static = isinstance(q_offset, int)
    options = (causal, window, softcap, scale, q_offset if static else None)

    def per_head(x):  # of a sequence -> of each of its key heads
        return None if x is None else jnp.repeat(x, num_kv_heads, axis=0)

    q_CGTH = q.reshape(batch, num_queries, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    k_CSH, v_CSH = (x.swapaxes(1, 2).reshape(-1, x.shape[1], head_dim) for x in (k, v))
    offset = None if static else per_head(jnp.broadcast_to(jnp.asarray(q_offset), (batch,)))
    segments = (per_head(q_segment_ids), per_head(kv_segment_ids))
    out_CGTH = _attention(options, q_CGTH.reshape(-1, *q_CGTH.shape[2:]), k_CSH, v_CSH, segments, offset)
    return out_CGTH.reshape(q_CGTH.shape).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _decode(q, k, v, seen, softcap, scale):
    """All scores at once, as the reference has them, in float32. seen: bool [B or 1, T, S]."""
    q_BTKGH = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = product("btkgh,bskh->bkgts", q_BTKGH, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = seen[:, None, None]
    scores = jnp.where(seen, scores, NEG_INF)
    p = jnp.where(seen, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(p, axis=-1)[..., None]
    out = product("bkgts,bskh->bkgth", p.astype(v.dtype), v) / jnp.where(total == 0, 1.0, total)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, segments, offset):
    """q [C, G, T, H], k and v [C, S, H]: C key heads of all sequences, each with its G query heads."""
    return _forward(options, q, k, v, segments, offset)[0]


def _forward(options, q, k, v, segments, offset):
    args = (q, k, v, segments, offset)
    out, lse = _few_heads_at_a_time(functools.partial(_forward_block, options), args)
    return out, (args, out, lse)


def _backward(options, residuals, d_out):
    (q, k, v, segments, offset), out, lse = residuals
    args = (q, k, v, segments, offset, out, lse, d_out)
    return *_few_heads_at_a_time(functools.partial(_backward_block, options), args), None, None


_attention.defvjp(_forward, _backward)


def _few_heads_at_a_time(run, args):
    """run(*args), on a CPU over chunks of the first dimension."""
    heads, group, num_queries, _ = args[0].shape
    fitting = max(1, CPU_SCORES // (min(num_queries, BLOCK_Q) * group * args[1].shape[1]))
    chunk = max(size for size in range(1, heads + 1) if heads % size == 0 and size <= fitting)

    def in_chunks(*args):
        split = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), args)
        return jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), lax.map(lambda part: run(*part), split))

    return run(*args) if chunk == heads else lax.platform_dependent(*args, cpu=in_chunks, default=run)


def _forward_block(options, q, k, v, segments, offset):
    """Output [C, G, T, H] and log-sum-exp [C, G, T] of the heads given."""
    q_CGHT, v_CHS = transpose(q), transpose(v)
    outputs, sums = [], []
    for rows, keys in _blocks(options, q.shape[2], k.shape[1]):
        scores, seen, _ = _scores(options, rows, keys, q_CGHT, k, segments, offset)
        top = jnp.max(jnp.where(seen, scores, NEG_INF), axis=1, keepdims=True)
        p = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = jnp.sum(p, axis=1, keepdims=True)
        total = jnp.where(total == 0, 1.0, total)
        out = _split(product("chs,csr->chr", v_CHS[:, :, keys], _join(p).astype(v.dtype)), q.shape[1])
        outputs.append((out / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out_CHGT, lse_C1GT = jnp.concatenate(outputs, axis=3), jnp.concatenate(sums, axis=3)
    return out_CHGT.transpose(0, 2, 3, 1), lse_C1GT[:, 0]


def _backward_block(options, q, k, v, segments, offset, out, lse, d_out):
    """Gradients of q, k and v of the heads given (arXiv:2205.14135, algorithm 4, whole rows of keys at a time)."""
    group, num_keys = q.shape[1], k.shape[1]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    q_CGHT, g_CGHT, k_CHS = transpose(q), transpose(d_out), transpose(k)
    dk = dv = jnp.zeros(k.shape, jnp.float32)
    dq = []
    for rows, keys in _blocks(options, q.shape[2], num_keys):
        scores, seen, slope = _scores(options, rows, keys, q_CGHT, k, segments, offset)
        p = jnp.where(seen, jnp.exp(scores - lse[:, None, :, rows]), 0.0)
        dp = _split(product("csh,chr->csr", v[:, keys], _columns(g_CGHT, rows)), group)
        ds = _join(p * (dp - delta[:, None, :, rows]) * slope * options[3]).astype(q.dtype)
        p = _join(p).astype(v.dtype)
        pad = [(0, 0), (keys.start, num_keys - keys.stop), (0, 0)]
        dv = dv + jnp.pad(product("csr,crh->csh", p, _rows(d_out, rows)), pad)
        dk = dk + jnp.pad(product("csr,crh->csh", ds, _rows(q, rows)), pad)
        dq.append(_split(product("chs,csr->chr", k_CHS[:, :, keys], ds), group).astype(q.dtype))
    return jnp.concatenate(dq, axis=3).transpose(0, 2, 3, 1), dk.astype(k.dtype), dv.astype(v.dtype)


def _blocks(options, num_queries: int, num_keys: int) -> list[tuple[slice, slice]]:
    """The blocks of query rows, each with the range of keys that any of its rows can see."""
    causal, window, _, _, offset = options
    size = max(BLOCK_Q, -(-num_queries // MAX_BLOCKS))
    blocks = []
    for start in range(0, num_queries, size):
        rows = slice(start, min(start + size, num_queries))
        first, last = 0, num_keys
        if offset is not None and causal:
            last = min(max(rows.stop + offset, 1), num_keys)
        if offset is not None and window is not None:
            first = min(max(rows.start + offset - window + 1, 0), last - 1)
        blocks.append((rows, slice(first, last)))
    return blocks


def _scores(options, rows, keys, q_CGHT, k, segments, offset):
    """Capped scores [C, S, G, R] in float32, which of them count, and the softcap's derivative."""
    causal, window, softcap, scale, static_offset = options
    scores = _split(product("csh,chr->csr", k[:, keys], _columns(q_CGHT, rows)), q_CGHT.shape[1]) * scale
    slope: Array | float = 1.0
    if softcap is not None:
        squashed = jnp.tanh(scores / softcap)
        scores, slope = softcap * squashed, 1.0 - squashed**2
    seen = _seen(causal, window, rows, keys, segments, static_offset if offset is None else offset)
    return scores, seen.swapaxes(1, 2)[:, :, None], slope


def _seen(causal, window, rows, keys, segments, offset):
    """Which key of the block a query row sees: bool [C or 1, rows, keys]."""
    q_index = jnp.arange(rows.start, rows.stop) + jnp.reshape(jnp.asarray(offset), (-1, 1))
    q_ids, kv_ids = (None if ids is None else ids[:, part] for ids, part in zip(segments, (rows, keys), strict=True))
    kv_index = jnp.arange(keys.start, keys.stop)
    return mask(q_index, kv_index, causal=causal, window=window, q_segment_ids=q_ids, kv_segment_ids=kv_ids)


# The queries of a group share their keys: together they are the rows (or columns) of one product.


def _rows(x_CGTH: Array, rows: slice) -> Array:
    part = x_CGTH[:, :, rows]
    return part.reshape(part.shape[0], -1, part.shape[3])


def _columns(x_CGHT: Array, rows: slice) -> Array:
    part = x_CGHT[..., rows].swapaxes(1, 2)
    return part.reshape(*part.shape[:2], -1)


def _join(x_CSGR: Array) -> Array:
    return x_CSGR.reshape(*x_CSGR.shape[:2], -1)


def _split(x_CSR: Array, group: int) -> Array:
    return x_CSR.reshape(*x_CSR.shape[:2], group, -1)
