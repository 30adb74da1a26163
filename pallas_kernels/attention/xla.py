"""Attention in plain XLA: blocks of queries against the keys they can see, with a backward pass that recomputes.

Memory is linear in the sequence: only the output and the log-sum-exp of a row are kept. With a static `q_offset` the
causal mask and the window cut each block's keys to a static range, so about half of the products are never computed.

Scores stand transposed, keys in rows: then every product of the forward and the backward pass but one multiplies
matrices as they lie, and the softmax reduces over rows, which vectorises. On a CPU a few heads are taken at a time,
so that their scores stay in the cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.attention.reference import NEG_INF, mask
from pallas_kernels.attention.residuals import kept
from pallas_kernels.cpu import transpose

BLOCK_Q = 128
MAX_BLOCKS = 32  # a program has every block of queries in it
FEW_QUERIES = 8  # as in decoding: their scores are small, and a product of so few columns is slow
CPU_SCORES = 2**18  # held at once: 1 MiB of a core's cache

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Options(NamedTuple):
    """What a program is made for."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    offset: int | None  # None: it is an array
    return_lse: bool


class Extras(NamedTuple):
    """What a head's scores depend on apart from q and k; the first dimension of each is that of the key heads, C."""

    q_ids: Array | None = None  # [C, T]
    kv_ids: Array | None = None  # [C, S]
    offset: Array | None = None  # [C]
    slopes: Array | None = None  # [C, G]
    bias_at: Array | None = None  # [C]: which row of the bias is its own


def attention(
    q,
    k,
    v,
    *,
    causal,
    window,
    q_offset,
    q_segment_ids,
    kv_segment_ids,
    softcap,
    scale,
    sinks,
    alibi_slopes,
    bias,
    return_lse,
):
    """See `api.attention`."""
    static = isinstance(q_offset, int)
    options = Options(causal, window, softcap, scale, q_offset if static else None, return_lse)
    sinks, slopes = (None if x is None else x.astype(jnp.float32) for x in (sinks, alibi_slopes))
    positions = Extras(q_segment_ids, kv_segment_ids, None if static else jnp.asarray(q_offset))
    if q.shape[1] <= FEW_QUERIES:
        return _decode(options, q, k, v, sinks, bias, positions, slopes)
    heads = q.shape[0], k.shape[2], q.shape[2] // k.shape[2]
    bias, bias_at = (None, None) if bias is None else _rows_of_bias(bias, heads)
    extras = _of_heads(positions, heads)._replace(slopes=_of_sequences(slopes, heads), bias_at=bias_at)
    args = _split_q(q, heads), _split_kv(k), _split_kv(v), _of_sequences(sinks, heads), bias, extras
    if not return_lse:
        return _join_q(_attention(options, *args), q.shape)
    out, lse = _attention(options, *args)
    return _join_q(out, q.shape), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    q, k, v, d_out, lse, delta, *, causal, window, q_offset, q_segment_ids, kv_segment_ids, softcap, scale
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of a block of keys out of many: lse and delta [B, N, T] are those of all the keys of a query.

    delta is the sum of d_out * out over a head less the log-sum-exp's cotangent.
    """
    static = isinstance(q_offset, int)
    options = Options(causal, window, softcap, scale, q_offset if static else None, return_lse=False)
    heads = q.shape[0], k.shape[2], q.shape[2] // k.shape[2]
    extras = _of_heads(Extras(q_segment_ids, kv_segment_ids, None if static else jnp.asarray(q_offset)), heads)
    lse, delta = (x.reshape(-1, heads[2], q.shape[1]) for x in (lse, delta))
    args = _split_q(q, heads), _split_kv(k), _split_kv(v), None, extras, None, lse, _split_q(d_out, heads), delta
    _, (dq, dk, dv, _) = _few_heads_at_a_time(functools.partial(_backward_block, options, None), None, args)
    return _join_q(dq, q.shape), *(x.reshape(q.shape[0], -1, *x.shape[1:]).swapaxes(1, 2) for x in (dk, dv))


def _split_q(q, heads):
    """[B, T, N, H] -> [C, G, T, H]."""
    batch, length, _, head_dim = q.shape
    return (
        q.reshape(batch, length, *heads[1:], head_dim).transpose(0, 2, 3, 1, 4).reshape(-1, heads[2], length, head_dim)
    )


def _join_q(q_CGTH, shape):
    heads = shape[0], -1, *q_CGTH.shape[1:]
    return q_CGTH.reshape(heads).transpose(0, 3, 1, 2, 4).reshape(shape)


def _split_kv(k):
    """[B, S, K, H] -> [C, S, H]."""
    return k.swapaxes(1, 2).reshape(-1, k.shape[1], k.shape[3])


def _of_heads(positions, heads):
    """Of each sequence -> of each of its key heads."""
    batch, num_kv_heads, _ = heads
    offset = None if positions.offset is None else jnp.broadcast_to(positions.offset, (batch,))
    positions = positions._replace(offset=offset)
    return jax.tree.map(lambda x: jnp.repeat(x, num_kv_heads, axis=0), positions)


def _of_sequences(x, heads):
    """[N], of a query head -> [C, G], of each sequence's."""
    return None if x is None else jnp.broadcast_to(x.reshape(1, *heads[1:]), heads).reshape(-1, heads[2])


def _rows_of_bias(bias, heads) -> tuple[Array, Array]:
    """The bias as rows [X, G or 1, T, S], not repeated where it is broadcast, and the row of each key head [C]."""
    batch, num_kv_heads, group = heads
    has_batch, has_heads = bias.shape[0] != 1, bias.shape[1] != 1
    rows = bias.reshape(-1, group if has_heads else 1, *bias.shape[2:])
    sequence, head = jnp.divmod(jnp.arange(batch * num_kv_heads), num_kv_heads)
    per_sequence = num_kv_heads if has_heads else 1
    return rows, (sequence * per_sequence if has_batch else 0 * sequence) + (head if has_heads else 0)


def _decode(options, q, k, v, sinks, bias, positions, slopes):
    """All scores at once, as the reference has them, in float32. sinks, slopes: [N]; bias: [B or 1, N or 1, T, S]."""
    batch, num_queries, num_heads, _ = q.shape
    kv_heads = k.shape[2]
    everything = slice(0, num_queries), slice(0, k.shape[1])
    q_BTKGH = q.reshape(batch, num_queries, kv_heads, -1, q.shape[3])
    scores = product("btkgh,bskh->bkgts", q_BTKGH, k) * options.scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    if slopes is not None:
        distance = _distance(options, *everything, positions.offset)[:, None, None]
        scores = scores + lax.stop_gradient(slopes).reshape(kv_heads, -1, 1, 1) * distance
    if bias is not None:
        scores = scores + bias.reshape(
            bias.shape[0], *(1, 1) if bias.shape[1] == 1 else (kv_heads, -1), *bias.shape[2:]
        )
    seen = _seen(options, *everything, positions)[:, None, None]
    top = jnp.max(jnp.where(seen, scores, NEG_INF), axis=-1, keepdims=True, initial=NEG_INF)
    sink = None if sinks is None else sinks.reshape(kv_heads, -1, 1, 1)
    top = lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))
    p = jnp.exp(jnp.where(seen, scores, NEG_INF) - top) * seen
    total = jnp.sum(p, axis=-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    total = jnp.where(total == 0, 1.0, total)
    out = product("bkgts,bskh->bkgth", p.astype(v.dtype), v) / total
    out = out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
    return (out, (top + jnp.log(total)).reshape(batch, num_heads, num_queries)) if options.return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, sinks, bias, extras):
    """q [C, G, T, H], k and v [C, S, H]: C key heads of all sequences, each with its G query heads. sinks [C, G]."""
    return _forward(options, q, k, v, sinks, bias, extras)[0]


def _forward(options, q, k, v, sinks, bias, extras):
    def block(_, *args):
        return None, _forward_block(options, bias, *args)

    _, (out, lse) = _few_heads_at_a_time(block, None, (q, k, v, sinks, extras))
    out, lse = kept(out, lse)
    return (out, lse) if options.return_lse else out, (q, k, v, sinks, bias, extras, out, lse)


def _backward(options, residuals, d_out):
    q, k, v, sinks, bias, extras, out, lse = residuals
    d_out, d_lse = d_out if options.return_lse else (d_out, None)
    args = (q, k, v, sinks, extras, out, lse, d_out, None if d_lse is None else -d_lse)
    d_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    d_bias, gradients = _few_heads_at_a_time(functools.partial(_backward_block, options, bias), d_bias, args)
    return *gradients, None if bias is None else d_bias.astype(bias.dtype), None


_attention.defvjp(_forward, _backward)


def _few_heads_at_a_time(run, total, args):
    """run(total, *args) -> (total, results), on a CPU over chunks of the first dimension of args and results."""
    heads, group, num_queries, _ = args[0].shape
    fitting = max(1, CPU_SCORES // (min(num_queries, BLOCK_Q) * group * args[1].shape[1]))
    chunk = max(size for size in range(1, heads + 1) if heads % size == 0 and size <= fitting)

    def in_chunks(total, *args):
        split = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), args)
        total, results = lax.scan(lambda total, part: run(total, *part), total, split)
        return total, jax.tree.map(lambda x: x.reshape(heads, *x.shape[2:]), results)

    if chunk == heads:
        return run(total, *args)
    return lax.platform_dependent(total, *args, cpu=in_chunks, default=run)


def _forward_block(options, bias, q, k, v, sinks, extras):
    """Output [C, G, T, H] and log-sum-exp [C, G, T] of the heads given."""
    q_CGHT, v_CHS = transpose(q), transpose(v)
    sink = None if sinks is None else sinks[:, None, :, None]
    outputs, sums = [], []
    for rows, keys in _blocks(options, q.shape[2], k.shape[1]):
        scores, seen, _ = _scores(options, rows, keys, q_CGHT, k, bias, extras)
        top = jnp.max(jnp.where(seen, scores, NEG_INF), axis=1, keepdims=True, initial=NEG_INF)
        top = top if sink is None else jnp.maximum(top, sink)
        p = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = jnp.sum(p, axis=1, keepdims=True)
        total = total if sink is None else total + jnp.exp(sink - top)
        total = jnp.where(total == 0, 1.0, total)
        out = _split(product("chs,csr->chr", v_CHS[:, :, keys], _join(p).astype(v.dtype)), q.shape[1])
        outputs.append((out / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    out_CHGT, lse_C1GT = jnp.concatenate(outputs, axis=3), jnp.concatenate(sums, axis=3)
    return out_CHGT.transpose(0, 2, 3, 1), lse_C1GT[:, 0]


def _backward_block(options, bias, d_bias, q, k, v, sinks, extras, out, lse, d_out, delta):
    """(d_bias with these heads' part added, gradients of q, k, v and sinks of the heads given).

    arXiv:2205.14135, algorithm 4, whole rows of keys at a time. The gradient of a score is p (dp - delta), and that of
    the log-sum-exp adds p d_lse: it only changes delta, to which d_out out is added here where out is given.
    """
    group, num_keys = q.shape[1], k.shape[1]
    if out is not None:
        of_out = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        delta = of_out if delta is None else of_out + delta
    d_sinks = None if sinks is None else -jnp.sum(jnp.exp(sinks[:, :, None] - lse) * delta, axis=2)
    q_CGHT, g_CGHT, k_CHS = transpose(q), transpose(d_out), transpose(k)
    dk = dv = jnp.zeros(k.shape, jnp.float32)
    dq = []
    for rows, keys in _blocks(options, q.shape[2], num_keys):
        scores, seen, slope = _scores(options, rows, keys, q_CGHT, k, bias, extras)
        p = jnp.where(seen, jnp.exp(scores - lse[:, None, :, rows]), 0.0)
        dp = _split(product("csh,chr->csr", v[:, keys], _columns(g_CGHT, rows)), group)
        ds = p * (dp - delta[:, None, :, rows])
        if bias is not None:
            d_bias = _add_to_bias(d_bias, ds, rows, keys, extras.bias_at)
        ds = _join(ds * slope * options.scale).astype(q.dtype)
        p = _join(p).astype(v.dtype)
        pad = [(0, 0), (keys.start, num_keys - keys.stop), (0, 0)]
        dv = dv + jnp.pad(product("csr,crh->csh", p, _rows(d_out, rows)), pad)
        dk = dk + jnp.pad(product("csr,crh->csh", ds, _rows(q, rows)), pad)
        dq.append(_split(product("chs,csr->chr", k_CHS[:, :, keys], ds), group).astype(q.dtype))
    dq_CGTH = jnp.concatenate(dq, axis=3).transpose(0, 2, 3, 1)
    return d_bias, (dq_CGTH, dk.astype(k.dtype), dv.astype(v.dtype), d_sinks)


def _blocks(options, num_queries: int, num_keys: int) -> list[tuple[slice, slice]]:
    """The blocks of query rows, each with the range of keys that any of its rows can see."""
    offset, window = options.offset, options.window
    size = max(BLOCK_Q, -(-num_queries // MAX_BLOCKS))
    blocks = []
    for start in range(0, num_queries, size):
        rows = slice(start, min(start + size, num_queries))
        first, last = 0, num_keys
        if offset is not None and options.causal:
            last = min(max(rows.stop + offset, 1), num_keys)
        if offset is not None and window is not None:
            first = min(max(rows.start + offset - window + 1, 0), last - 1)
        blocks.append((rows, slice(first, last)))
    return blocks


def _scores(options, rows, keys, q_CGHT, k, bias, extras):
    """Scores [C, S, G, R] in float32, which of them count, and the softcap's derivative."""
    scores = _split(product("csh,chr->csr", k[:, keys], _columns(q_CGHT, rows)), q_CGHT.shape[1]) * options.scale
    slope: Array | float = 1.0
    if options.softcap is not None:
        squashed = jnp.tanh(scores / options.softcap)
        scores, slope = options.softcap * squashed, 1.0 - squashed**2
    if extras.slopes is not None:
        distance = _distance(options, rows, keys, extras.offset)
        scores = scores + extras.slopes[:, None, :, None] * distance.swapaxes(1, 2)[:, :, None]
    if bias is not None:
        part_XGRS = bias[:, :, rows, keys]
        part_CGRS = part_XGRS if len(bias) == 1 else part_XGRS[extras.bias_at]
        scores = scores + part_CGRS.transpose(0, 3, 1, 2).astype(jnp.float32)
    return scores, _seen(options, rows, keys, extras).swapaxes(1, 2)[:, :, None], slope


def _add_to_bias(d_bias, ds_CSGR, rows, keys, bias_at):
    """d_bias [X, G or 1, T, S] plus the gradient of a block of scores, summed over what the bias is broadcast in."""
    part_CGRS = ds_CSGR.transpose(0, 2, 3, 1)
    if d_bias.shape[1] == 1:
        part_CGRS = part_CGRS.sum(axis=1, keepdims=True)
    if len(d_bias) == 1:
        return d_bias.at[:, :, rows, keys].add(part_CGRS.sum(axis=0, keepdims=True))
    return d_bias.at[bias_at, :, rows, keys].add(part_CGRS)


def _seen(options, rows, keys, extras):
    """Which key of the block a query row sees: bool [C or 1, rows, keys]."""
    q_ids = None if extras.q_ids is None else extras.q_ids[:, rows]
    kv_ids = None if extras.kv_ids is None else extras.kv_ids[:, keys]
    q_index, kv_index = _indices(options, rows, keys, extras.offset)
    return mask(
        q_index,
        kv_index,
        causal=options.causal,
        window=options.window,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
    )


def _distance(options, rows, keys, offset):
    """How far after the query the key stands: float32 [C or 1, rows, keys]."""
    q_index, kv_index = _indices(options, rows, keys, offset)
    return (kv_index - q_index[:, :, None]).astype(jnp.float32)


def _indices(options, rows, keys, offset):
    """Where the queries [C or 1, rows] and keys [keys] stand among the keys."""
    start = jnp.reshape(jnp.asarray(options.offset if offset is None else offset), (-1, 1))
    return jnp.arange(rows.start, rows.stop) + start, jnp.arange(keys.start, keys.stop)


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
