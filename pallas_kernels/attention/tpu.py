"""Attention on TPUs: one pass over the keys for a block of queries, with a backward pass of its own.

The forward kernel (online softmax, arXiv:2112.05682, arXiv:2205.14135) has two bodies for a block of keys:

- the careful one masks, and raises the running maximum before it exponentiates. Blocks that a mask touches go first,
  through this one: the causal diagonal among them, where a row's large scores tend to be;
- the fast one, for blocks without a mask, subtracts the maximum as it then stands and only notes by how much scores
  exceed it. So nothing in it waits for a reduction: products, exponentials and sums of all its parts overlap freely.
  Any maximum within the range of float32 gives the same softmax. If a score exceeded it by more than 2**LIMIT, a
  matter of contrived inputs, the keys are gone through again by the careful body.

Scores stand transposed, keys in rows: what belongs to a query is a row, which broadcasts for free; maxima and sums run
over rows; and the product with the values has the weights as its stationary operand, so a head_dim of 128 fills the
matrix unit. Sums stay spread over eight rows until the end. Keys of one head stay in VMEM for all its queries.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, dispatch
from pallas_kernels.attention import tpu_backward
from pallas_kernels.attention import tpu_common as common
from pallas_kernels.attention.reference import visible_pairs
from pallas_kernels.attention.residuals import kept
from pallas_kernels.attention.tpu_common import LANES, LOG2_E, NEG_INF, Options, round_up

SUBLANES = 8
LIMIT = 60.0  # sums of 2**60 and products with values are far from float32's 2**128
NO_TOP = NEG_INF / 2  # before any key: scores that are hidden stay far below it, so their weight is zero
DTYPES = (jnp.bfloat16, jnp.float32)


class ForwardBlocks(NamedTuple):
    """Sizes of the forward kernel: queries a step, keys of a body, keys held in VMEM."""

    q: int
    kv: int
    kv_held: int


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    """Why the TPU kernels do not take a call."""
    q, k, v = (arguments[name] for name in "qkv")
    for x in (q, k, v):
        if x.dtype not in DTYPES:
            return f"takes bfloat16 and float32, not {x.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    if arguments["bias"] is not None:
        return "takes no bias"
    if q.shape[3] > 256:
        return f"takes a head_dim up to 256, not {q.shape[3]}"
    if 0 in q.shape or 0 in k.shape:
        return "takes no empty arrays"
    return None


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
    sinks=None,
    alibi_slopes=None,
    bias=None,
    return_lse=False,
):
    """See `api.attention`; `refuse` says what is not taken."""
    assert bias is None
    options = _options(q, k, causal, window, softcap, scale, q_segment_ids, q_offset)
    options = options._replace(alibi=alibi_slopes is not None, sinks=sinks is not None)
    offsets = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), q.shape[:1])
    nothing = jnp.zeros(q.shape[2], jnp.float32)
    slopes = nothing if alibi_slopes is None else alibi_slopes.astype(jnp.float32)
    sinks = nothing if sinks is None else sinks.astype(jnp.float32)
    out, lse = _attention(options, q, k, v, sinks, slopes, offsets, (q_segment_ids, kv_segment_ids))
    return (out, lse) if return_lse else out


def backward(
    q, k, v, d_out, lse, delta, *, causal, window, q_offset, q_segment_ids, kv_segment_ids, softcap, scale
) -> tuple[Array, Array, Array]:
    """See `xla.backward`: (dq, dk, dv) of a block of keys out of many."""
    options = _options(q, k, causal, window, softcap, scale, q_segment_ids, q_offset)
    offsets = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), q.shape[:1])
    slopes, segments = jnp.zeros(q.shape[2], jnp.float32), (q_segment_ids, kv_segment_ids)
    return tpu_backward.backward(options, q, k, v, slopes, offsets, segments, d_out, lse, delta)


def _options(q, k, causal, window, softcap, scale, q_segment_ids, q_offset) -> Options:
    """Of a call without ALiBi and sinks."""
    return Options(
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        group=q.shape[2] // k.shape[2],
        num_keys=k.shape[1],
        segments=q_segment_ids is not None,
        alibi=False,
        sinks=False,
        pairs=visible_pairs(q.shape[1], k.shape[1], causal, window, q_offset if isinstance(q_offset, int) else None),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q, k, v, sinks, slopes, offsets, segments):
    return forward(options, q, k, v, sinks, slopes, offsets, segments)


def _forward(options, q, k, v, sinks, slopes, offsets, segments):
    out, lse = forward(options, q, k, v, sinks, slopes, offsets, segments)
    out, lse = kept(out, lse)
    return (out, lse), (q, k, v, sinks, slopes, offsets, segments, out, lse)


def _backward(options, residuals, cotangents):
    q, k, v, sinks, slopes, offsets, segments, out, lse = residuals
    d_out, d_lse = cotangents
    delta = head_sums(d_out, out) - d_lse
    dq, dk, dv = tpu_backward.backward(options, q, k, v, slopes, offsets, segments, d_out, lse, delta)
    d_sinks = None
    if options.sinks:
        d_sinks = -jnp.sum(jnp.exp(sinks[:, None] - lse) * delta, axis=(0, 2))
    return dq, dk, dv, d_sinks, None, None, None


_attention.defvjp(_forward, _backward)


def head_sums(x: Array, y: Array) -> Array:
    """Sums over the head dimension of x * y, both [B, T, N, H], in float32, [B, N, T].

    As a product with a matrix of ones: summed as it is written, XLA converts both to float32 and lays them out anew, heads
    apart, because in the kernels' layout a row holds all heads: 7 times the cycles on a v6e, 4 on a v5p, and two such arrays.
    """
    batch, length, num_heads, head_dim = x.shape
    both = x.astype(jnp.float32) * y.astype(jnp.float32)
    rows, heads = (lax.broadcasted_iota(jnp.int32, (num_heads * head_dim, num_heads), dim) for dim in (0, 1))
    ones = (rows // head_dim == heads).astype(jnp.float32)
    return jnp.einsum("fn,btf->bnt", ones, both.reshape(batch, length, -1), precision=lax.Precision.HIGHEST)


def candidates(head_dim: int, num_queries: int, num_keys: int, itemsize: int, vmem: int) -> list[ForwardBlocks]:
    """Sizes that fit, best first: long bodies, all keys held where VMEM allows."""
    head_dim, fitting = round_up(head_dim, LANES), []
    for q, kv in common.body_sizes(num_queries, num_keys, itemsize):
        scores = 4 * q * kv * 4
        queries = q * head_dim * (4 * itemsize + 8)
        room = int(0.75 * vmem) - scores - queries
        held = min(room // (4 * head_dim * itemsize) // kv * kv, round_up(num_keys, kv))
        if held >= kv:
            parts = -(-round_up(num_keys, kv) // held)
            fitting.append(ForwardBlocks(q, kv, round_up(-(-num_keys // parts), kv)))
    return list(dict.fromkeys(fitting))


def forward(options: Options, q, k, v, sinks, slopes, offsets, segments) -> tuple[Array, Array]:
    """out [B, T, N, H] and lse [B, N, T]."""
    batch, num_queries, num_heads, true_head_dim = q.shape
    num_keys, head_dim = k.shape[1], round_up(true_head_dim, LANES)
    key = {"head_dim": head_dim, "dtype": q.dtype.name, "queries": num_queries, "keys": num_keys}
    vmem = common.vmem_capacity()
    sizes = candidates(head_dim, num_queries, num_keys, q.dtype.itemsize, vmem)
    size = blocks.pick("attention.forward", key, sizes)
    q_length, kv_length = round_up(num_queries, size.q), round_up(num_keys, size.kv_held)
    num_q, num_held, per_held = q_length // size.q, kv_length // size.kv_held, size.kv_held // size.kv

    def of_q(b, h, i, j, *_):
        return b, i, h

    def held(b, i, j, offsets):
        first = offsets[b] + i * size.q
        part = common.visible_keys(options, first, first + size.q - 1, size.kv_held)
        return jnp.minimum(jnp.clip(j, part.first, jnp.maximum(part.last - 1, part.first)), num_held - 1)

    def of_kv(b, h, i, j, offsets, *_):
        return b, held(b, i, j, offsets), lax.div(h, jnp.int32(options.group))

    arrays = [
        common.padded_heads((q * options.q_factor).astype(q.dtype), q_length),
        common.padded_heads(k, kv_length),
        common.columns(common.padded_heads(v, kv_length), size.kv),
    ]
    in_specs = [
        pl.BlockSpec((1, size.q, head_dim), of_q),
        pl.BlockSpec((1, size.kv_held, head_dim), of_kv),
        pl.BlockSpec((1, per_held, head_dim, size.kv), lambda *at: (*of_kv(*at), 0)),
    ]
    if options.segments:
        arrays += [
            common.rows(segments[0], q_length, size.q, -1),
            common.rows(segments[1], kv_length, size.kv, -2),
        ]
        in_specs += [
            pl.BlockSpec((1, 1, 1, size.q), lambda b, h, i, j, *_: (b, i, 0, 0)),
            pl.BlockSpec((1, per_held, 1, size.kv), lambda b, h, i, j, o, *_: (b, held(b, i, j, o), 0, 0)),
        ]
    scalars = [offsets, sinks * LOG2_E, slopes * LOG2_E]
    if options.segments:
        scalars += [common.ranges(segments[0], q_length, size.q), common.ranges(segments[1], kv_length, size.kv)]
    state = [pltpu.VMEM((height, size.q), jnp.float32) for height in (1, SUBLANES, head_dim)]
    out_shape = [
        jax.ShapeDtypeStruct((batch, q_length, num_heads * head_dim), q.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, num_q, 1, size.q), jnp.float32),
    ]
    out, lse = pl.pallas_call(
        functools.partial(_kernel, options, size, num_held),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, num_heads, num_q, num_held),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, size.q, head_dim), of_q),
                pl.BlockSpec((1, 1, 1, 1, size.q), lambda b, h, i, j, *_: (b, h, i, 0, 0)),
            ],
            scratch_shapes=state + [pltpu.VMEM((SUBLANES, size.q), jnp.float32)] + (state if num_held > 1 else []),
        ),
        out_shape=out_shape,
        cost_estimate=common.cost(options, 2, q, *arrays, *out_shape),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=int(0.9 * vmem)
        ),
        interpret=common.interpret(),
        name="attention_forward",
    )(*scalars, *arrays)
    return common.unpadded_heads(out, q), lse.reshape(batch, num_heads, q_length)[:, :, :num_queries]


def _kernel(options: Options, size: ForwardBlocks, num_held: int, offsets, sinks, slopes, *refs):
    """A block of queries against the keys held; the state lives in scratch from the first of them to the last."""
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    ranges, refs = (refs[:2], refs[2:]) if options.segments else ((), refs)
    q_ref, k_ref, v_ref = refs[:3]
    ids = refs[3:5] if options.segments else None
    out_ref, lse_ref, *scratch = refs[5 if options.segments else 3 :]
    state, excess_ref, saved = scratch[:3], scratch[3], scratch[4:]
    q_first, per_held = offsets[b] + i * size.q, size.kv_held // size.kv
    visible = common.visible_keys(options, q_first, q_first + size.q - 1, size.kv)
    visible = visible.within(j * per_held, (j + 1) * per_held)
    careful = functools.partial(
        _careful, options, size, q_ref, k_ref, v_ref, ids, state, slopes[h], q_first, j * per_held
    )
    fast = functools.partial(_fast, options, size, q_ref, k_ref, v_ref, state, excess_ref, j * per_held)

    @pl.when(j == 0)
    def _():
        _reset(state)

    for now, held_back in zip(state, saved, strict=False):
        held_back[...] = now[...]

    full_first, full_last = visible.full_first, visible.full_last
    if options.alibi:  # its scores grow towards the diagonal without bound
        full_last = full_first
    else:  # the fast body needs a maximum
        nothing_masked = (full_first == visible.first) & (full_last == visible.last)
        full_first = jnp.where(nothing_masked, jnp.minimum(full_first + 1, full_last), full_first)
    num_careful = (full_first - visible.first) + (visible.last - full_last)

    @pl.loop(0, visible.last - visible.first if options.segments else num_careful)
    def _(step):
        block = visible.first + step
        if options.segments:  # blocks of one segment are for the fast body, those that share none for nobody
            share, alike = common.relation(ranges, b, i, block)
            full = (full_first <= block) & (block < full_last)
            pl.when(share & ~(alike & full))(lambda: careful(block))
        else:
            careful(jnp.where(block < full_first, block, block + full_last - full_first))

    @pl.when(full_first < full_last)
    def _():
        excess_ref[...] = jnp.zeros(excess_ref.shape, jnp.float32)

        @pl.loop(full_first, full_last)
        def _(block):
            if options.segments:
                pl.when(common.relation(ranges, b, i, block)[1])(lambda: fast(block))
            else:
                fast(block)

        @pl.when(jnp.max(excess_ref[...]) > LIMIT)
        def _():
            for now, held_back in zip(state, saved, strict=False):
                now[...] = held_back[...]
            if not saved:  # all keys are held at once: nothing came before
                _reset(state)
            pl.loop(visible.first, visible.last)(careful)

    @pl.when(j == num_held - 1)
    def _():
        _finish(options, state, sinks[h], out_ref, lse_ref)


def _reset(state):
    """The state: maximum of the scores [1, q], sum of the weights [8, q], weighted sum of the values [H, q]."""
    top_ref, sum_ref, out_ref = state
    top_ref[...] = jnp.full(top_ref.shape, NO_TOP)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)


def _careful(options, size, q_ref, k_ref, v_ref, ids, state, slope, q_first, held_first, block):
    """A block of keys, masked, after the running maximum was raised to its own."""
    top_ref, sum_ref, acc_ref = state
    at = block - held_first
    here = pl.ds(pl.multiple_of(at * size.kv, size.kv), size.kv)
    scores, _ = common.capped(options, common.dot(k_ref[0, here], q_ref[0], (1, 1)))
    kv_first = block * size.kv
    if options.alibi:
        scores += slope * common.distances(scores.shape, q_first, kv_first, 1)
    ids = None if ids is None else (ids[0][0, 0], common.column(ids[1][0, at]))
    scores = common.hidden(options, scores, q_first, kv_first, 1, ids, NEG_INF)
    before = top_ref[...]
    top = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
    p = jnp.exp2(scores - top)
    fall = jnp.exp2(before - top)
    top_ref[...] = top
    sum_ref[...] = fall * sum_ref[...] + _narrow(jnp.add, p)
    acc_ref[...] = fall * acc_ref[...] + common.dot(v_ref[0, at], p.astype(v_ref.dtype))


def _fast(options, size, q_ref, k_ref, v_ref, state, excess_ref, held_first, block):
    """A block of keys that every query sees, under the maximum as it stands."""
    top_ref, sum_ref, acc_ref = state
    at = block - held_first
    here = pl.ds(pl.multiple_of(at * size.kv, size.kv), size.kv)
    scores, _ = common.capped(options, common.dot(k_ref[0, here], q_ref[0], (1, 1)))
    over = scores - top_ref[...]
    p = jnp.exp2(over)
    excess_ref[...] = jnp.maximum(excess_ref[...], _narrow(jnp.maximum, over))
    sum_ref[...] += _narrow(jnp.add, p)
    acc_ref[...] += common.dot(v_ref[0, at], p.astype(v_ref.dtype))


def _finish(options, state, sink, out_ref, lse_ref):
    top_ref, sum_ref, acc_ref = state
    top, total = top_ref[...], jnp.sum(sum_ref[...], axis=0, keepdims=True)
    fall = jnp.ones_like(total)
    if options.sinks:
        raised = jnp.maximum(top, sink)
        fall = jnp.exp2(top - raised)
        top, total = raised, fall * total + jnp.exp2(sink - raised)
    total = jnp.where(total == 0.0, 1.0, total)
    out_ref[0] = (acc_ref[...] * (fall / total)).T.astype(out_ref.dtype)
    lse_ref[0, 0, 0] = jnp.where(top == NO_TOP, NEG_INF, top / LOG2_E + jnp.log(total))


def _narrow(combine, x: Array) -> Array:
    """[height, q] -> [SUBLANES, q], whole registers combined in four chains."""
    parts = [x[start : start + SUBLANES] for start in range(0, x.shape[0], SUBLANES)]
    chains = [functools.reduce(combine, parts[start::4]) for start in range(4)]
    return functools.reduce(combine, chains)
