"""Gradients of attention on TPUs in one pass: five products for a block of queries and keys, nothing kept but the
log-sum-exp (arXiv:2205.14135, algorithm 4).

A step of the grid has a block of keys; it goes through the queries that see them. Queries, their cotangents and the
float32 sum of their gradient stay in VMEM for a whole head, so every gradient is summed in a fixed order. Scores stand
transposed, keys in rows: what belongs to a query is then a row, which broadcasts for free, and the gradient of the
queries, summed transposed too, needs no transpose of the scores. Long sequences of queries are taken in parts whose
sums are added afterwards.

Query heads that share a key head follow each other, and the float32 sums of the gradients of its keys stay in VMEM
until the last of them has been added. Where those of all keys do not fit, every query head writes its own. The heads of
a group then have an axis in front of the positions: whole arrays are added, and nothing changes its layout.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks
from pallas_kernels.attention import tpu_common as common
from pallas_kernels.attention.tpu_common import LANES, LOG2_E, NEG_INF, Options, round_up


class BackwardBlocks(NamedTuple):
    """Sizes of the backward kernel: queries of a body, keys a step, queries held in VMEM."""

    q: int
    kv: int
    q_held: int


def candidates(head_dim: int, num_queries: int, num_keys: int, itemsize: int, vmem: int) -> list[BackwardBlocks]:
    """Sizes that fit, best first: long bodies hide the matrix unit's latency, all queries held save sums of parts."""
    head_dim, fitting = round_up(head_dim, LANES), []
    for q, kv in common.body_sizes(num_queries, num_keys, itemsize):
        room = _room(BackwardBlocks(q, kv, 0), head_dim, itemsize, vmem)
        held = min(room // _of_query(head_dim, itemsize) // q * q, round_up(num_queries, q))
        if held >= q:
            parts = -(-round_up(num_queries, q) // held)
            fitting.append(BackwardBlocks(q, kv, round_up(-(-num_queries // parts), q)))
    return list(dict.fromkeys(fitting))


def sums_group(size: BackwardBlocks, group: int, head_dim: int, num_keys: int, itemsize: int, vmem: int) -> bool:
    """Whether the heads of a group add to common sums of dk and dv: VMEM has room for those of all keys."""
    head_dim = round_up(head_dim, LANES)
    sums = 2 * round_up(num_keys, size.kv) * head_dim * 4
    return group > 1 and sums <= _room(size, head_dim, itemsize, vmem)


def _room(size: BackwardBlocks, head_dim: int, itemsize: int, vmem: int) -> int:
    """Bytes of VMEM left beside a step's scores and keys and the queries held."""
    scores = 4 * size.q * size.kv * 4
    keys = size.kv * head_dim * (4 * itemsize + 6 * 4)
    return int(0.85 * vmem) - scores - keys - size.q_held * _of_query(head_dim, itemsize)


def _of_query(head_dim: int, itemsize: int) -> int:
    """Bytes of VMEM for a query held."""
    return head_dim * (6 * itemsize + 4) + 2 * 2 * 8 * 4  # rows of one use eight sublanes


def backward(options: Options, q, k, v, slopes, offsets, segments, d_out, lse, delta) -> tuple[Array, Array, Array]:
    """Gradients of q [B, T, N, H], k and v [B, S, K, H]; lse and delta are [B, N, T]."""
    num_queries, num_keys, head_dim = q.shape[1], k.shape[1], q.shape[3]
    key = {"head_dim": round_up(head_dim, LANES), "dtype": q.dtype.name, "queries": num_queries, "keys": num_keys}
    sizes = candidates(head_dim, num_queries, num_keys, q.dtype.itemsize, common.vmem_capacity())
    size = blocks.pick("attention.backward", key, sizes)
    grouped = sums_group(size, options.group, head_dim, num_keys, q.dtype.itemsize, common.vmem_capacity())
    whole = size.q_held >= num_queries and (grouped or options.group == 1)  # the kernel's sums are the gradients
    parts = []
    for start in range(0, num_queries, size.q_held):
        part = slice(start, start + size.q_held)
        ids = (segments[0][:, part], segments[1]) if options.segments else segments
        rows = lse[:, :, part], delta[:, :, part]
        dtype = k.dtype if whole else jnp.float32
        share = options._replace(pairs=options.pairs * q[:, part].shape[1] // num_queries)
        arrays = q[:, part], k, v, slopes, offsets + start, ids, d_out[:, part], *rows
        parts.append(_part(share, size, grouped, dtype, *arrays))
    dq = jnp.concatenate([part[0] for part in parts], axis=1)

    def of_keys(at):  # summed over the parts and over what the kernel left of the group
        summands = [part[at][:, g] for part in parts for g in range(part[at].shape[1])]
        return common.unpadded_heads(functools.reduce(jnp.add, summands).astype(k.dtype), k)

    return dq, of_keys(1), of_keys(2)


def _part(
    options: Options, size: BackwardBlocks, grouped, d_kv_dtype, q, k, v, slopes, offsets, segments, d_out, lse, delta
):
    """Of a part of the queries: dq, and dk and dv [B, 1 if grouped else group, S', K * H']."""
    batch, num_queries, num_heads, true_head_dim = q.shape
    num_keys, head_dim = k.shape[1], round_up(true_head_dim, LANES)
    q_length, kv_length = round_up(num_queries, size.q), round_up(num_keys, size.kv)
    num_q, num_kv = q_length // size.q, kv_length // size.kv
    group, num_kv_heads = options.group, k.shape[2]

    def of_q(b, h, g, j, *_):
        return b, 0, h * group + g

    def of_rows(b, h, g, j, *_):
        return b, h * group + g, 0, 0, 0

    def of_kv(b, h, g, j, *_):
        return b, j, h

    def of_d_kv(b, h, g, j, *_):
        if grouped:  # until the last head has the sums the block stays the same, so that nothing is written
            return b, 0, jnp.where(g == group - 1, j, 0), h
        return b, g, j, h

    k_padded = common.padded_heads(k, kv_length)
    arrays = [
        common.padded_heads((q * options.q_factor).astype(q.dtype), q_length),
        common.padded_heads(d_out, q_length),
        common.rows(lse * LOG2_E, q_length, size.q, -NEG_INF),  # weights of queries that are none are zero
        common.rows(delta, q_length, size.q, 0.0),
        k_padded,
        common.padded_heads(v, kv_length),
        common.columns(k_padded, size.kv),
    ]
    in_specs = [
        pl.BlockSpec((1, q_length, head_dim), of_q),
        pl.BlockSpec((1, q_length, head_dim), of_q),
        pl.BlockSpec((1, 1, num_q, 1, size.q), of_rows),
        pl.BlockSpec((1, 1, num_q, 1, size.q), of_rows),
        pl.BlockSpec((1, size.kv, head_dim), of_kv),
        pl.BlockSpec((1, size.kv, head_dim), of_kv),
        pl.BlockSpec((1, 1, head_dim, size.kv), lambda *at: (*of_kv(*at), 0)),
    ]
    if options.segments:
        arrays += [
            common.rows(segments[0], q_length, size.q, -1),
            common.rows(segments[1], kv_length, size.kv, -2),
        ]
        in_specs += [
            pl.BlockSpec((1, num_q, 1, size.q), lambda b, h, g, j, *_: (b, 0, 0, 0)),
            pl.BlockSpec((1, 1, 1, size.kv), lambda b, h, g, j, *_: (b, j, 0, 0)),
        ]
    scalars = [offsets, slopes * LOG2_E]
    if options.segments:
        scalars += [common.ranges(segments[0], q_length, size.q), common.ranges(segments[1], kv_length, size.kv)]
    out_shape = [
        jax.ShapeDtypeStruct((batch, q_length, num_heads * head_dim), q.dtype),
        *[jax.ShapeDtypeStruct((batch, 1 if grouped else group, kv_length, num_kv_heads * head_dim), d_kv_dtype)] * 2,
    ]
    dq, dk, dv = pl.pallas_call(
        functools.partial(_kernel, options, size, grouped, num_q, num_kv),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, num_kv_heads, group, num_kv),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, q_length, head_dim), of_q),
                *[pl.BlockSpec((1, 1, size.kv, head_dim), of_d_kv)] * 2,
            ],
            scratch_shapes=[
                pltpu.VMEM((num_q, head_dim, size.q), jnp.float32),
                *[pltpu.VMEM((num_kv if grouped else 1, size.kv, head_dim), jnp.float32)] * 2,
            ],
        ),
        out_shape=out_shape,
        cost_estimate=common.cost(options, 5, q, *arrays, *out_shape),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if grouped else "parallel", "arbitrary"),
            vmem_limit_bytes=int(0.95 * common.vmem_capacity()),
        ),
        interpret=common.interpret(),
        name="attention_backward",
    )(*scalars, *arrays)
    return common.unpadded_heads(dq, q), dk, dv


def _kernel(options: Options, size: BackwardBlocks, grouped: bool, num_q: int, num_kv: int, offsets, slopes, *refs):
    """A block of keys against all queries held that see it; the queries' gradient is written with the last block."""
    b, kv_head, g, j = (pl.program_id(axis) for axis in range(4))
    h = kv_head * options.group + g
    ranges, refs = (refs[:2], refs[2:]) if options.segments else ((), refs)
    inputs = refs[: 9 if options.segments else 7]
    dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum = refs[len(inputs) :]
    dk_sum, dv_sum = (x.at[j if grouped else 0] for x in (dk_sum, dv_sum))
    sums = dq_sum, dk_sum, dv_sum

    @pl.when(g == 0 if grouped else True)
    def _():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    @pl.when(j == 0)
    def _():
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)

    offset = offsets[b]
    visible = common.visible_queries(options, j * size.kv, offset, num_q * size.q, size.q, size.kv)
    body = functools.partial(_body, options, size, inputs, sums, slopes[h], offset, j * size.kv)
    num_masked = (visible.full_first - visible.first) + (visible.last - visible.full_last)

    @pl.loop(0, visible.last - visible.first if options.segments else num_masked)
    def _(step):
        block = visible.first + step
        if options.segments:
            share, alike = common.relation(ranges, b, block, j)
            alike &= (visible.full_first <= block) & (block < visible.full_last)
            pl.when(alike)(lambda: body(block, masked=False))
            pl.when(share & ~alike)(lambda: body(block, masked=True))
        else:
            skipped = visible.full_last - visible.full_first
            body(jnp.where(block < visible.full_first, block, block + skipped), masked=True)

    if not options.segments:
        pl.loop(visible.full_first, visible.full_last)(functools.partial(body, masked=False))

    @pl.when(g == options.group - 1 if grouped else True)
    def _():
        dk_ref[0, 0] = (dk_sum[...] * options.dk_factor).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(j == num_kv - 1)
    def _():
        @pl.loop(0, num_q)
        def _(i):
            here = pl.ds(pl.multiple_of(i * size.q, size.q), size.q)
            dq_ref[0, here] = (dq_sum[i].T * options.scale).astype(dq_ref.dtype)


def _body(options, size, inputs, sums, slope, offset, kv_first, block, *, masked):
    """A block of queries against the step's keys."""
    q_ref, d_out_ref, lse_ref, delta_ref, k_ref, v_ref, k_columns_ref = inputs[:7]
    dq_sum, dk_sum, dv_sum = sums
    here = pl.ds(pl.multiple_of(block * size.q, size.q), size.q)
    q, d_out, k, v = q_ref[0, here], d_out_ref[0, here], k_ref[0], v_ref[0]
    scores, squashed = common.capped(options, common.dot(k, q, (1, 1)))
    q_first = offset + block * size.q
    if options.alibi:
        scores += slope * common.distances(scores.shape, q_first, kv_first, 1)
    p = jnp.exp2(scores - lse_ref[0, 0, block])
    if masked:  # the weights, not the scores: of a query that sees nothing the log-sum-exp is as low as what is hidden
        ids = (inputs[7][0, block], common.column(inputs[8][0, 0])) if options.segments else None
        p = common.hidden(options, p, q_first, kv_first, 1, ids, 0.0)
    ds = p * (common.dot(v, d_out, (1, 1)) - delta_ref[0, 0, block])
    if squashed is not None:
        ds *= 1.0 - squashed * squashed
    dv_sum[...] += common.dot(p.astype(d_out.dtype), d_out)
    ds = ds.astype(q.dtype)
    dk_sum[...] += common.dot(ds, q)
    dq_sum[block] += common.dot(k_columns_ref[0, 0], ds)
