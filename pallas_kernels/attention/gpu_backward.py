"""The gradients of attention for Hopper GPUs, in Pallas Mosaic GPU (arXiv:2205.14135, algorithm 4).

Two kernels, each of which owns what it sums, so that the result is the same in every run: one goes over the keys for
the gradient of 64 queries a warpgroup, one over the queries of all heads of a group for the gradients of 64 keys. Both
recompute the scores. A step has two rounds of products with the exponential between them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import blocks
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
    span_of_queries,
    spread,
    tiles,
    walk,
)


class Blocks(NamedTuple):
    """Sizes of a backward kernel. columns: keys (or queries) of a block gone over. steps: blocks in shared memory."""

    columns: int
    steps: int


def candidates(head_dim: int, resident: int) -> list[Blocks]:
    """Sizes that fit shared memory, best first; wider blocks would not fit the registers.

    resident: rows of a thread block, which stay in shared memory while the columns pass.
    """
    widths = {64: (128, 64), 128: (64,), 256: (64,)}[head_dim]  # a product sums over multiples of 64
    sizes = [Blocks(columns, steps) for columns in widths for steps in (2, 3, 4, 1)]
    return [size for size in sizes if 4 * head_dim * (resident + size.columns * size.steps) <= SHARED_MEMORY]


def split(head_dim: int) -> bool:
    """Whether the gradients of k and v are one warpgroup's each, of the same keys: registers do not hold both."""
    return head_dim > 128


def backward(options: Options, q, k, v, sinks, slopes, ids, out, lse, d_out, d_lse) -> tuple:
    """Gradients of q, k, v and sinks (None without), from those of out [B, T, N, H] and lse [B, N, T or more]."""
    num_queries = q.shape[1]
    delta = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)
    delta = padded(delta, ROWS, axis=2) - d_lse
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks[:, None] - lse) * delta
        d_sinks = -jnp.sum(share[:, :, : options.num_queries], axis=(0, 2))
    # A query that sees no key, or is none, has e^(score - lse) = 0 whatever its score is.
    counts = (lse > NO_KEY / 2) & (jnp.arange(lse.shape[2]) < options.num_queries)
    lse = jnp.where(counts, lse * LOG2E, -NO_KEY)
    key = {"head_dim": q.shape[3], "causal": options.causal, "window": options.window is not None}
    rows_k = WARPGROUP_ROWS if split(q.shape[3]) else ROWS
    size_q = blocks.pick("attention.backward_q", key, candidates(q.shape[3], ROWS))
    size_kv = blocks.pick("attention.backward_kv", key, candidates(q.shape[3], rows_k))
    if ids is not None:
        ids = padded(ids[0], ROWS), padded(ids[1], ROWS)
    arguments = (q, k, v, d_out, lse, delta, slopes, ids)
    group = q.shape[2] // k.shape[2]
    grid_q = {"batch": q.shape[0], "tile": pl.cdiv(num_queries, ROWS), "head": q.shape[2]}
    grid_kv = {"batch": k.shape[0], "tile": pl.cdiv(k.shape[1], rows_k), "head": k.shape[2]}
    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))
    of_queries = functools.partial(_enter, _OfQueries, options, size_q, grid_q["tile"], group)
    of_keys = functools.partial(_enter, _OfKeys, options, size_kv, grid_kv["tile"], group)
    [d_q] = call_kernel(of_queries, options, (like_q,), grid_q, arguments)
    d_k, d_v = call_kernel(of_keys, options, (like_k, like_k), grid_kv, arguments)
    return d_q, d_k, d_v, d_sinks


class _Inputs(NamedTuple):
    """References to the arguments in global memory."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any
    d_out: Any
    lse: Any  # [B, N, T up to a whole block], in units of log 2
    delta: Any  # the same: the sum over H of out d_out, less the gradient of lse
    slopes: Any
    ids: Any


class _Shared(NamedTuple):
    """Shared memory of a thread block and its barriers.

    Rows stay: those of queries are q and d_out, those of keys k and v. Columns, of the other two, pass by. lse and
    delta, one number a query, are with the queries.
    """

    row_a: Any  # [2, 64, H]: q or k
    row_b: Any  # d_out or v
    row_ids: Any
    column_a: Any  # [steps, columns, H]: k or q
    column_b: Any  # v or d_out
    column_ids: Any
    lse: Any
    delta: Any
    rows_here: Any
    a_here: Any
    b_here: Any
    used: Any
    done: Any


def _enter(kernel, options: Options, size: Blocks, num_tiles: int, group: int, *refs):
    inputs, outputs = _Inputs(*refs[:8]), refs[8:]
    head_dim, dtype, segments = inputs.q.shape[3], inputs.q.dtype, options.segments
    row_tiles = 1 if kernel is _OfKeys and split(head_dim) else COMPUTE_WARPGROUPS
    row, column = (row_tiles, WARPGROUP_ROWS), (size.steps, size.columns)
    of_query = row if kernel is _OfQueries else column
    shared = _Shared(
        row_a=tiles((*row, head_dim), dtype),
        row_b=tiles((*row, head_dim), dtype),
        row_ids=plgpu.SMEM(row, jnp.int32) if segments else None,
        column_a=tiles((*column, head_dim), dtype),
        column_b=tiles((*column, head_dim), dtype),
        column_ids=plgpu.SMEM(column, jnp.int32) if segments else None,
        lse=plgpu.SMEM(of_query, jnp.float32),
        delta=plgpu.SMEM(of_query, jnp.float32),
        rows_here=plgpu.Barrier(num_arrivals=kernel.ROW_COPIES + segments, num_barriers=row_tiles),
        a_here=plgpu.Barrier(num_arrivals=kernel.COLUMN_COPIES + segments, num_barriers=size.steps),
        b_here=plgpu.Barrier(num_arrivals=kernel.COLUMN_COPIES, num_barriers=size.steps),
        used=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=size.steps),
        done=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
    )

    def run(shared):
        program = kernel(options, size, num_tiles, group, inputs, outputs, shared)
        either_warpgroup(program.compute, program.copy)

    pl.run_scoped(run, shared, collective_axes="wg")


class _Program:
    """What both kernels have: their arguments, and where the thread block stands."""

    def __init__(self, options: Options, size: Blocks, num_tiles: int, group: int, inputs, outputs, shared):
        self.options, self.size, self.group = options, size, group
        self.inputs, self.outputs, self.shared = inputs, outputs, shared
        self.interpret, self.head_dim = options.interpret, inputs.q.shape[3]
        self.batch, self.head, self.tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
        self.num_tiles = num_tiles

    def slot(self, index):
        return lax.rem(index, jnp.int32(self.size.steps))

    def copy_columns(self, num_blocks, copies_of):
        """Fills the slots in the order of use; copies_of(index) gives (source, place, barrier), each of the slot."""

        def step(index, _):
            slot = self.slot(index)

            @pl.when(index >= self.size.steps)
            def _await_place():
                plgpu.barrier_wait(self.shared.used.at[slot])

            for source, place, barrier in copies_of(index):
                plgpu.copy_gmem_to_smem(source, place.at[slot], barrier.at[slot])

        lax.fori_loop(0, num_blocks, step, None)
        drain((self.shared.used,), num_blocks, self.size.steps)

    def copy_rows(self, tile, *copies):
        for source, place in copies:
            plgpu.copy_gmem_to_smem(source, place.at[tile], self.shared.rows_here.at[tile])

    def probabilities(self, raw, lse, place: Place, slope, ids, masked: bool, end_of_keys: bool):
        """Of [rows, columns], and softcap's derivative. lse: spread over the tile."""
        x, derivative = scores(self.options, raw, place, slope)
        if masked:
            x = hide(self.options, x, place, ids, end_of_keys)
        return jnp.exp2(x * factor(self.options) - lse), derivative

    def store(self, tile, start, head, *results):
        """results: (sums in registers, shared memory to leave through, where to)."""
        for value, place, _ in results:
            place.at[tile][...] = value.astype(self.inputs.q.dtype)
        plgpu.commit_smem()
        for _, place, target in results:
            plgpu.copy_smem_to_gmem(place.at[tile], target.at[self.batch, pl.ds(start, WARPGROUP_ROWS), head])
        plgpu.wait_smem_to_gmem(0)


def _of_scores(p, d_p, delta, derivative) -> Array:
    """The gradient of the scores, from that of the probabilities."""
    d_x = p * (d_p - delta)
    return d_x if derivative is None else d_x * derivative


class _OfQueries(_Program):
    """The gradient of q: rows are queries of one head, columns keys."""

    ROW_COPIES, COLUMN_COPIES = 4, 1

    def __init__(self, *args):
        super().__init__(*args)
        self.start = (self.num_tiles - 1 - self.tile) * ROWS  # the longest rows of a causal mask first
        self.span = span_of_keys(self.options, self.start, ROWS, self.size.columns)

    def copy(self):
        inputs, shared, columns = self.inputs, self.shared, self.size.columns
        head = lax.div(self.head, jnp.int32(self.group))

        def copies_of(index):
            keys = pl.ds((self.span.first + index) * columns, columns)
            yield inputs.k.at[self.batch, keys, head], shared.column_a, shared.a_here
            if inputs.ids is not None:
                yield inputs.ids[1].at[self.batch, keys], shared.column_ids, shared.a_here
            yield inputs.v.at[self.batch, keys, head], shared.column_b, shared.b_here

        self.copy_columns(self.span.end - self.span.first, copies_of)

    def compute(self, warpgroup):
        options, inputs, shared, interpret = self.options, self.inputs, self.shared, self.interpret
        start = self.start + warpgroup * WARPGROUP_ROWS
        rows, here = pl.ds(start, WARPGROUP_ROWS), (self.batch, self.head)
        copies = [
            (inputs.q.at[self.batch, rows, self.head], shared.row_a),
            (inputs.d_out.at[self.batch, rows, self.head], shared.row_b),
            (inputs.lse.at[*here, rows], shared.lse),
            (inputs.delta.at[*here, rows], shared.delta),
        ]
        if inputs.ids is not None:
            copies.append((inputs.ids[0].at[self.batch, rows], shared.row_ids))
        self.copy_rows(warpgroup, *copies)
        plgpu.barrier_wait(shared.rows_here.at[warpgroup])
        lse, delta = (load(x.at[warpgroup], 0, interpret) for x in (shared.lse, shared.delta))
        ids = None if inputs.ids is None else load(shared.row_ids.at[warpgroup], 0, interpret)
        slope = None if inputs.slopes is None else inputs.slopes[self.head]
        q, d_out = shared.row_a.at[warpgroup], shared.row_b.at[warpgroup]

        def block(j, d_q, masked: bool):
            slot = self.slot(j - self.span.first)
            plgpu.barrier_wait(shared.a_here.at[slot])
            plgpu.barrier_wait(shared.b_here.at[slot])
            k, v = shared.column_a.at[slot], shared.column_b.at[slot]
            raw, d_p = products((q, k), (d_out, v), interpret=interpret)
            pair = None if ids is None else (ids, load(shared.column_ids.at[slot], 1, interpret))
            place = Place(start + options.offset, j * self.size.columns, 0)
            place = Place(start + options.offset, j * self.size.columns, 0)
            past = bool(options.num_keys % self.size.columns)
            p, derivative = self.probabilities(raw, spread(lse, raw.shape), place, slope, pair, masked, past)
            d_x = _of_scores(p, d_p, spread(delta, raw.shape), derivative)
            [d_q] = add_products([d_q], (d_x.astype(inputs.q.dtype), k), interpret=interpret)
            plgpu.barrier_arrive(shared.used.at[slot])
            return d_q

        own = self.span.part(span_of_keys(options, start, WARPGROUP_ROWS, self.size.columns))
        d_q = walk(own, block, full((WARPGROUP_ROWS, self.head_dim), 0.0, interpret))
        self.store(warpgroup, start, self.head, (d_q * options.scale, shared.row_a, self.outputs[0]))


class _OfKeys(_Program):
    """The gradients of k and v: rows are keys of one key head, columns the queries of each of its heads in turn."""

    ROW_COPIES, COLUMN_COPIES = 2, 2

    def __init__(self, *args):
        super().__init__(*args)
        self.split = split(self.head_dim)
        rows = WARPGROUP_ROWS if self.split else ROWS
        self.start = self.tile * rows  # the first keys are seen by most queries
        self.span = span_of_queries(self.options, self.start, rows, self.size.columns)
        self.num_blocks = self.span.end - self.span.first  # of each head

    def copy(self):
        inputs, shared, columns = self.inputs, self.shared, self.size.columns

        def copies_of(index):
            head = self.head * self.group + lax.div(index, self.num_blocks)
            queries = pl.ds((self.span.first + lax.rem(index, self.num_blocks)) * columns, columns)
            yield inputs.q.at[self.batch, queries, head], shared.column_a, shared.a_here
            yield inputs.lse.at[self.batch, head, queries], shared.lse, shared.a_here
            if inputs.ids is not None:
                yield inputs.ids[0].at[self.batch, queries], shared.column_ids, shared.a_here
            yield inputs.d_out.at[self.batch, queries, head], shared.column_b, shared.b_here
            yield inputs.delta.at[self.batch, head, queries], shared.delta, shared.b_here

        self.copy_columns(self.num_blocks * self.group, copies_of)

    def compute(self, warpgroup):
        if not self.split:
            start = self.start + warpgroup * WARPGROUP_ROWS
            self.copy_keys(warpgroup, start)
            plgpu.barrier_wait(self.shared.rows_here.at[warpgroup])
            self.store(warpgroup, start, self.head, *self.sums(warpgroup, start, of_k=True, of_v=True))
            return
        pl.when(warpgroup == 0)(lambda: self.copy_keys(0, self.start))
        plgpu.barrier_wait(self.shared.rows_here.at[0])
        for index, which in enumerate(({"of_k": True}, {"of_v": True})):

            @pl.when(warpgroup == index)
            def _one_gradient(which=which):
                results = self.sums(0, self.start, **which)
                plgpu.barrier_arrive(self.shared.done)  # a result leaves through memory that both read
                plgpu.barrier_wait(self.shared.done)
                self.store(0, self.start, self.head, *results)

    def copy_keys(self, tile, start):
        inputs, shared, rows = self.inputs, self.shared, pl.ds(start, WARPGROUP_ROWS)
        copies = [
            (inputs.k.at[self.batch, rows, self.head], shared.row_a),
            (inputs.v.at[self.batch, rows, self.head], shared.row_b),
        ]
        if inputs.ids is not None:
            copies.append((inputs.ids[1].at[self.batch, rows], shared.row_ids))
        self.copy_rows(tile, *copies)

    def sums(self, tile, start, of_k: bool = False, of_v: bool = False) -> list[tuple]:
        """The gradients of 64 keys that are asked for, as `store` takes them."""
        options, inputs, shared, interpret = self.options, self.inputs, self.shared, self.interpret
        dtype, k, v = inputs.q.dtype, shared.row_a.at[tile], shared.row_b.at[tile]
        ids = None if inputs.ids is None else load(shared.row_ids.at[tile], 0, interpret)
        own = self.span.part(span_of_queries(options, start, WARPGROUP_ROWS, self.size.columns))

        def of_head(head, sums):
            slope = None if inputs.slopes is None else inputs.slopes[self.head * self.group + head]

            def block(j, sums, masked: bool):
                slot = self.slot(head * self.num_blocks + j - self.span.first)
                plgpu.barrier_wait(shared.a_here.at[slot])
                plgpu.barrier_wait(shared.b_here.at[slot])
                q, d_out = shared.column_a.at[slot], shared.column_b.at[slot]
                raw, *d_p = products((k, q), *([(v, d_out)] if of_k else []), interpret=interpret)
                pair = None if ids is None else (load(shared.column_ids.at[slot], 1, interpret), ids)
                lse = spread(load(shared.lse.at[slot], 1, interpret), raw.shape, 1)
                place = Place(j * self.size.columns + options.offset, start, 1)
                p, derivative = self.probabilities(raw, lse, place, slope, pair, masked, False)
                pairs = []
                if of_k:
                    delta = spread(load(shared.delta.at[slot], 1, interpret), raw.shape, 1)
                    pairs.append((_of_scores(p, d_p[0], delta, derivative).astype(dtype), q))
                if of_v:
                    pairs.append((p.astype(dtype), d_out))
                sums = add_products(sums, *pairs, interpret=interpret)
                plgpu.barrier_arrive(shared.used.at[slot])
                return sums

            return walk(own, block, sums)

        nothing = full((WARPGROUP_ROWS, self.head_dim), 0.0, interpret)
        sums = list(lax.fori_loop(0, self.group, of_head, (nothing,) * (of_k + of_v)))
        d_k, d_v = self.outputs
        results = [(sums.pop(0) * options.scale, shared.row_a, d_k)] if of_k else []
        return results + ([(sums.pop(0), shared.row_b, d_v)] if of_v else [])
