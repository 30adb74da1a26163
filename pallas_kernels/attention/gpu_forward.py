"""Flash attention for Hopper GPUs (arXiv:2205.14135, arXiv:2407.08608), in Pallas Mosaic GPU.

A thread block has three warpgroups. One copies blocks of keys and values to shared memory by TMA, a few ahead of their
use. Two compute, each 64 queries of a head: they take turns, so that one exponentiates its scores while the other's
products run on the tensor cores. Blocks that the mask empties are not visited, and only those that it cuts are masked.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import blocks
from pallas_kernels.attention import gpu_backward
from pallas_kernels.attention.gpu_tiles import (
    COMPUTE_WARPGROUPS,
    LOG2E,
    NO_KEY,
    ROWS,
    SHARED_MEMORY,
    WARPGROUP_ROWS,
    Options,
    Place,
    add_products,
    call_kernel,
    drain,
    either_warpgroup,
    factor,
    full,
    hide,
    load,
    padded,
    products,
    scores,
    span_of_keys,
    spread,
    tiles,
    walk,
)
from pallas_kernels.attention.residuals import kept


class Blocks(NamedTuple):
    """Sizes of the forward kernel. keys: of a block. steps: blocks of keys and of values in shared memory at a time."""

    keys: int
    steps: int


def candidates(head_dim: int) -> list[Blocks]:
    """Sizes that fit shared memory and registers, best first.

    A thread keeps head_dim / 2 numbers of the output and keys / 2 of the scores, and the scores once more in half
    precision, in 240 registers. Larger blocks synchronise less often; two steps hide the copies.
    """
    widths = {64: (128, 64), 128: (128, 64), 256: (64,)}[head_dim]
    sizes = [Blocks(keys, steps) for keys in widths for steps in (2, 3, 4)]
    return [size for size in sizes if 2 * head_dim * (ROWS + 2 * size.keys * size.steps) <= SHARED_MEMORY]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(options: Options, q, k, v, sinks, slopes, ids):
    """(out [B, T, N, H], lse [B, N, T up to a whole block]) for T and S that are multiples of 8."""
    return forward(options, q, k, v, sinks, slopes, ids)


def _forward(options, q, k, v, sinks, slopes, ids):
    out, lse = forward(options, q, k, v, sinks, slopes, ids)
    out, lse = kept(out, lse)
    return (out, lse), (q, k, v, sinks, slopes, ids, out, lse)


def _backward(options, residuals, cotangents):
    d_q, d_k, d_v, d_sinks = gpu_backward.backward(options, *residuals, *cotangents)
    return d_q, d_k, d_v, d_sinks, None, None


run.defvjp(_forward, _backward)


def forward(options: Options, q, k, v, sinks, slopes, ids) -> tuple[Array, Array]:
    batch, num_queries, num_heads, head_dim = q.shape
    key = {"head_dim": head_dim, "causal": options.causal, "window": options.window is not None}
    size = blocks.pick("attention.forward", key, candidates(head_dim))
    num_tiles = pl.cdiv(num_queries, ROWS)
    if ids is not None:  # TMA needs rows of whole 16 bytes; keys past the last are hidden whatever their segment
        ids = padded(ids[0], ROWS), padded(ids[1], size.keys)
    out_type = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, num_tiles * ROWS), jnp.float32),
    )
    group = num_heads // k.shape[2]
    body = functools.partial(_enter, options, size, num_tiles, group)
    # Heads are the fastest index: blocks that run together share keys. The longest rows of a causal mask go first.
    grid = {"batch": batch, "tile": num_tiles, "head": num_heads}
    return call_kernel(body, options, out_type, grid, (q, k, v, sinks, slopes, ids))


class _Shared(NamedTuple):
    """Shared memory of a thread block and its barriers."""

    q: Any  # [2, 64, H]; the output leaves through it too
    k: Any  # [steps, keys, H]
    v: Any
    lse: Any  # [2, 64]
    q_ids: Any
    kv_ids: Any
    q_here: Any
    k_here: Any
    v_here: Any
    k_used: Any
    v_used: Any
    turn: Any


def _enter(options: Options, size: Blocks, num_tiles: int, group: int, q, k, v, sinks, slopes, ids, out, lse):
    head_dim, segments = q.shape[3], options.segments
    here = functools.partial(plgpu.Barrier, num_arrivals=1 + segments)
    used = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=size.steps)
    shared = _Shared(
        q=tiles((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, head_dim), q.dtype),
        k=tiles((size.steps, size.keys, head_dim), k.dtype),
        v=tiles((size.steps, size.keys, head_dim), v.dtype),
        lse=plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
        q_ids=plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.int32) if segments else None,
        kv_ids=plgpu.SMEM((size.steps, size.keys), jnp.int32) if segments else None,
        q_here=here(num_barriers=COMPUTE_WARPGROUPS),
        k_here=here(num_barriers=size.steps),
        v_here=plgpu.Barrier(num_barriers=size.steps),
        k_used=used,
        v_used=used,
        turn=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
    )
    refs = (q, k, v, sinks, slopes, ids, out, lse)

    def with_memory(shared):
        _thread_block(options, size, num_tiles, group, refs, shared)

    pl.run_scoped(with_memory, shared, collective_axes="wg")


def _thread_block(options: Options, size: Blocks, num_tiles: int, group: int, refs, shared: _Shared):
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    start = (num_tiles - 1 - lax.axis_index("tile")) * ROWS
    span = span_of_keys(options, start, ROWS, size.keys)
    either_warpgroup(
        lambda warpgroup: _compute(options, size, span, batch, head, start, warpgroup, refs, shared),
        lambda: _copy(size, span, batch, lax.div(head, jnp.int32(group)), refs, shared),
    )


def _copy(size: Blocks, span, batch, key_head, refs, shared: _Shared):
    """Keys and values of the span, in the order of use, each as soon as its place is free."""
    _, k, v, _, _, ids, _, _ = refs

    def step(j, _):
        slot = lax.rem(j - span.first, jnp.int32(size.steps))
        rows = pl.ds(j * size.keys, size.keys)
        again = j - span.first >= size.steps

        @pl.when(again)
        def _await_k_place():
            plgpu.barrier_wait(shared.k_used.at[slot])

        plgpu.copy_gmem_to_smem(k.at[batch, rows, key_head], shared.k.at[slot], shared.k_here.at[slot])
        if ids is not None:
            plgpu.copy_gmem_to_smem(ids[1].at[batch, rows], shared.kv_ids.at[slot], shared.k_here.at[slot])

        @pl.when(again)
        def _await_v_place():
            plgpu.barrier_wait(shared.v_used.at[slot])

        plgpu.copy_gmem_to_smem(v.at[batch, rows, key_head], shared.v.at[slot], shared.v_here.at[slot])

    lax.fori_loop(span.first, span.end, step, None)
    drain((shared.k_used, shared.v_used), span.end - span.first, size.steps)


def _compute(options: Options, size: Blocks, span, batch, head, tile_start, warpgroup, refs, shared: _Shared):
    """The output of 64 queries: a warpgroup's part."""
    q, _, _, sinks, slopes, ids, out, lse = refs
    interpret, head_dim = options.interpret, q.shape[3]
    start = tile_start + warpgroup * WARPGROUP_ROWS
    rows = pl.ds(start, WARPGROUP_ROWS)
    mine = _Shared(
        *(
            x.at[warpgroup] if name in ("q", "lse", "q_ids", "q_here") and x is not None else x
            for name, x in shared._asdict().items()
        )
    )
    plgpu.copy_gmem_to_smem(q.at[batch, rows, head], mine.q, mine.q_here)
    if ids is not None:
        plgpu.copy_gmem_to_smem(ids[0].at[batch, rows], mine.q_ids, mine.q_here)
    plgpu.barrier_wait(mine.q_here)
    q_ids = None if ids is None else load(mine.q_ids, 0, interpret)
    slope = None if slopes is None else slopes[head]

    def take_turn():
        plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(shared.turn)

    def block(j, carry, masked: bool):
        total, top, sums = carry
        slot = lax.rem(j - span.first, jnp.int32(size.steps))
        [raw] = products((mine.q, shared.k.at[slot]), meanwhile=take_turn, interpret=interpret)
        block_ids = None if q_ids is None else (q_ids, load(shared.kv_ids.at[slot], 1, interpret))
        plgpu.barrier_arrive(shared.k_used.at[slot])
        place = Place(start + options.offset, j * size.keys, 0)
        x, _ = scores(options, raw, place, slope)
        if masked:
            x = hide(options, x, place, block_ids, bool(options.num_keys % size.keys))
        above = jnp.maximum(top, jnp.max(x, axis=1) * factor(options))
        shrink = jnp.exp2(top - above)
        p = jnp.exp2(x * factor(options) - spread(above, x.shape))
        total = total * spread(shrink, total.shape)
        sums = sums * shrink + jnp.sum(p, axis=1)
        p_half = p.astype(q.dtype)
        if not interpret:  # the other warpgroup's turn begins when all of this is done, not before
            total, sums, above, p_half = lax.optimization_barrier((total, sums, above, p_half))
        plgpu.barrier_arrive(shared.turn)
        plgpu.barrier_wait(shared.v_here.at[slot])
        plgpu.barrier_wait(shared.turn)

        def await_next():  # while the product runs
            @pl.when(j + 1 < span.end)
            def _await():
                plgpu.barrier_wait(shared.k_here.at[lax.rem(j + 1 - span.first, jnp.int32(size.steps))])

        [total] = add_products([total], (p_half, shared.v.at[slot]), meanwhile=await_next, interpret=interpret)
        plgpu.barrier_arrive(shared.v_used.at[slot])
        return total, above, sums

    @pl.when(span.first < span.end)
    def _await_first():
        plgpu.barrier_wait(shared.k_here.at[0])

    pl.when(warpgroup == 1)(take_turn)
    nothing = (
        full((WARPGROUP_ROWS, head_dim), 0.0, interpret),
        full((WARPGROUP_ROWS,), NO_KEY * LOG2E, interpret),
        full((WARPGROUP_ROWS,), 0.0, interpret),
    )
    own = span.part(span_of_keys(options, start, WARPGROUP_ROWS, size.keys))
    total, top, sums = walk(own, block, nothing)
    pl.when(warpgroup == 0)(take_turn)

    if sinks is not None:
        sink = sinks[head] * LOG2E
        above = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - above)
        total, top, sums = total * spread(shrink, total.shape), above, sums * shrink + jnp.exp2(sink - above)
    sums = jnp.where(sums == 0.0, 1.0, sums)
    mine.q[...] = (total * spread(1.0 / sums, total.shape)).astype(q.dtype)
    mine.lse[...] = top * (1 / LOG2E) + jnp.log(sums)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mine.q, out.at[batch, rows, head])
    plgpu.copy_smem_to_gmem(mine.lse, lse.at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)
