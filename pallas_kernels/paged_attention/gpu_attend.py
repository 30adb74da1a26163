"""The Hopper kernel of paged attention: a program streams its share of all keys through shared memory.

One warpgroup copies, page by page, several blocks of keys and values ahead, across the borders of items: from the
first block to the last the memory is never idle. Two warpgroups compute; they take the blocks of a unit in turn, each
with a softmax of its own, so that one exponentiates while the other multiplies.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.attention.gpu_tiles import (
    COMPUTE_WARPGROUPS,
    LAYOUT,
    LOG2E,
    NO_KEY,
    WARPGROUP_ROWS,
    Options,
    Place,
    add_products,
    call_kernel,
    drain,
    either_warpgroup,
    factor,
    full,
    lay,
    products,
    scores,
    spread,
    tiles,
)
from pallas_kernels.paged_attention.gpu_plan import Form, Items, Pairs, Plan

WARPGROUPS = COMPUTE_WARPGROUPS
REGISTERS = {64: (232, 40), 128: (232, 40), 256: (240, 24)}  # of a thread that computes, and that copies, by head_dim
COLUMNS = 64  # of values in registers at a time where rows are cleared
SHARED_MEMORY = 225 * 1024  # bytes for tiles, of the 227 KiB that a program may ask for
PROGRAMS = 132  # multiprocessors of an H100 and an H200


class Blocks(NamedTuple):
    """keys: of a block. stages: blocks in shared memory, an even number. queries: items there. programs: of the grid."""

    keys: int
    stages: int
    queries: int
    programs: int


def candidates(head_dim: int, programs: int = PROGRAMS) -> list[Blocks]:
    """What fits shared memory and registers, best first: bytes in flight are what counts."""
    wide = {64: (128, 64), 128: (64,), 256: (64,)}[head_dim]
    sizes = [Blocks(keys, stages, queries, programs) for keys in wide for queries in (2, 1) for stages in (8, 6, 4, 2)]
    return [size for size in sizes if _shared_bytes(size, head_dim) <= SHARED_MEMORY]


def _shared_bytes(size: Blocks, head_dim: int) -> int:
    rows = WARPGROUP_ROWS * (size.queries + WARPGROUPS) + 2 * size.keys * size.stages
    return 2 * head_dim * rows


def attend(form: Form, size: Blocks, options: Options, made: Plan, tables, q, pages) -> tuple[Array, Array]:
    """(out [units, 2, rows, H], log-sum-exp [units, 2, rows]) of each unit's parts; see `gpu_plan`.

    q: of pairs [I * K, rows, H]. pages: [P, K, 2, page_size, H]. What no unit stands for is left as it was.
    """
    kv = pages.reshape(-1, form.piece, form.head_dim)  # pieces of a page: keys, then values
    out_type = (
        jax.ShapeDtypeStruct((form.num_units, WARPGROUPS, form.rows, form.head_dim), q.dtype),
        jax.ShapeDtypeStruct((form.num_units, WARPGROUPS, form.rows), jnp.float32),
    )
    arguments = (made.items, made.pairs, made.share[None], tables, q, kv)
    body = functools.partial(_enter, form, size, options)
    # A row of scores is reduced inside a warp, so that the reductions need none of their usual shared memory.
    return call_kernel(body, options, out_type, {"program": size.programs}, arguments, reduction_scratch_bytes=128)


class _Refs(NamedTuple):
    items: Items
    pairs: Pairs
    share: Any
    tables: Any
    q: Any
    kv: Any
    out: Any
    lse: Any


class _Shared(NamedTuple):
    """Shared memory of a program and its barriers."""

    q: Any  # [queries, 64, H]
    k: Any  # [stages, keys, H]
    v: Any
    out: Any  # [2, 64, H]
    lse: Any  # [2, 64]
    q_here: Any
    here: Any
    q_used: Any
    used: Any


def _enter(form: Form, size: Blocks, options: Options, *references):
    refs = _Refs(*references)
    q_tile = functools.partial(tiles, dtype=refs.q.dtype)
    shared = _Shared(
        q=q_tile((size.queries, WARPGROUP_ROWS, form.head_dim)),
        k=q_tile((size.stages, size.keys, form.head_dim)),
        v=q_tile((size.stages, size.keys, form.head_dim)),
        out=q_tile((WARPGROUPS, WARPGROUP_ROWS, form.head_dim)),
        lse=plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS), jnp.float32),
        q_here=plgpu.Barrier(num_barriers=size.queries),
        here=plgpu.Barrier(num_arrivals=2 * (size.keys // form.piece), num_barriers=size.stages),
        q_used=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=size.queries),
        used=plgpu.Barrier(num_barriers=size.stages),
    )

    def with_memory(shared):
        either_warpgroup(
            lambda warpgroup: _compute(form, size, options, warpgroup, refs, shared),
            lambda: _copy(form, size, refs, shared),
            REGISTERS[form.head_dim],
        )

    pl.run_scoped(with_memory, shared, collective_axes="wg")


class _Unit(NamedTuple):
    """A program's part of a pair: blocks first <= j < end of the item, the first of them the program's block `at`."""

    number: Any
    pair: Any
    head: Any
    item: Items  # scalars
    first: Any
    end: Any
    at: Any


def _unit(form: Form, refs: _Refs, turn) -> _Unit:
    program, share = lax.axis_index("program"), refs.share[0]
    pair = refs.pairs.first[program] + turn
    index = lax.div(pair, jnp.int32(form.kv_heads))
    head = pair - index * form.kv_heads
    item = Items(*(field[index] for field in refs.items))
    line = item.before * form.kv_heads + head * item.blocks - program * share  # of its first block in the share
    first = jnp.maximum(-line, 0)
    return _Unit(pair + program, pair, head, item, first, jnp.minimum(item.blocks, share - line), line + first)


def _number_of_units(refs: _Refs):
    program = lax.axis_index("program")
    return refs.pairs.end[program] - refs.pairs.first[program]


def _copy(form: Form, size: Blocks, refs: _Refs, shared: _Shared):
    """Everything that the program reads, in the order of use, each as soon as its place is free."""
    halves, pieces = form.page_size // form.piece, size.keys // form.piece

    def unit(turn, _):
        mine = _unit(form, refs, turn)
        place = lax.rem(turn, jnp.int32(size.queries))

        @pl.when(turn >= size.queries)
        def _await_place():
            plgpu.barrier_wait(shared.q_used.at[place])

        rows = shared.q.at[place] if form.rows == WARPGROUP_ROWS else shared.q.at[place, pl.ds(0, form.rows)]
        plgpu.copy_gmem_to_smem(refs.q.at[mine.pair], rows, shared.q_here.at[place])
        last = lax.div(mine.item.end - 1, jnp.int32(form.page_size))

        def step(j, _):
            at = mine.at + j - mine.first
            slot = lax.rem(at, jnp.int32(size.stages))
            piece = lax.div(mine.item.first, jnp.int32(form.piece)) + j * pieces
            # Entries after the last page may be anything; its rows are hidden where it stands for them.
            columns = [jnp.minimum(lax.div(piece + i, jnp.int32(halves)), last) for i in range(pieces)]
            found = [refs.tables[mine.item.sequence, column] for column in columns]

            @pl.when(at >= size.stages)
            def _await_place():
                plgpu.barrier_wait(shared.used.at[slot])

            for i, page in enumerate(found):
                half = lax.rem(piece + i, jnp.int32(halves))
                for kv, memory in enumerate((shared.k, shared.v)):
                    source = refs.kv.at[((page * form.kv_heads + mine.head) * 2 + kv) * halves + half]
                    target = memory.at[slot] if pieces == 1 else memory.at[slot, pl.ds(i * form.piece, form.piece)]
                    plgpu.copy_gmem_to_smem(source, target, shared.here.at[slot])

        lax.fori_loop(mine.first, mine.end, step, None)
        return mine.at + mine.end - mine.first

    number = _number_of_units(refs)
    copied = lax.fori_loop(0, number, unit, jnp.int32(0))
    drain((shared.used,), copied, size.stages)
    drain((shared.q_used,), number, size.queries)


def _compute(form: Form, size: Blocks, options: Options, warpgroup, refs: _Refs, shared: _Shared):
    """Every second block of each of the program's units."""
    interpret, shape = options.interpret, (WARPGROUP_ROWS, size.keys)
    out, lse = shared.out.at[warpgroup], shared.lse.at[warpgroup]
    token = lay(lax.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0), LAYOUT.reduce(1), interpret)
    token = lax.div(token, jnp.full_like(token, form.group))
    key = lay(lax.broadcasted_iota(jnp.int32, shape, 1), LAYOUT, interpret)

    def unit(turn, _):
        mine = _unit(form, refs, turn)
        place = lax.rem(turn, jnp.int32(size.queries))
        plgpu.barrier_wait(shared.q_here.at[place])
        position = token + mine.item.position
        limit = jnp.minimum(position + 1, mine.item.end)
        # Its blocks are those whose number in the program is even, or odd: a slot belongs to one warpgroup.
        skip = lax.rem(mine.at + warpgroup, jnp.int32(WARPGROUPS))

        def block(step, carry):
            total, top, sums = carry
            j = mine.first + skip + step * WARPGROUPS
            slot = lax.rem(mine.at + j - mine.first, jnp.int32(size.stages))
            start = mine.item.first + j * size.keys
            plgpu.barrier_wait(shared.here.at[slot])
            _clear_after(mine.item.end - start, shared.v.at[slot], size.keys, interpret)
            [raw] = products((shared.q.at[place], shared.k.at[slot]), interpret=interpret)
            x, _ = scores(options, raw, Place(0, 0, 0), None)
            seen = key < spread(limit - start, shape)
            if form.window is not None:
                seen &= key >= spread(position + (1 - form.window) - start, shape)
            x = jnp.where(seen, x, -jnp.inf)
            above = jnp.maximum(top, jnp.max(x, axis=1) * factor(options))
            shrink = jnp.exp2(top - above)
            p = jnp.exp2(x * factor(options) - spread(above, x.shape))
            total = total * spread(shrink, total.shape)
            sums = sums * shrink + jnp.sum(p, axis=1)
            [total] = add_products([total], (p.astype(refs.q.dtype), shared.v.at[slot]), interpret=interpret)
            plgpu.barrier_arrive(shared.used.at[slot])
            return total, above, sums

        nothing = (
            full((WARPGROUP_ROWS, form.head_dim), 0.0, interpret),
            full((WARPGROUP_ROWS,), NO_KEY * LOG2E, interpret),
            full((WARPGROUP_ROWS,), 0.0, interpret),
        )
        number = lax.div(mine.end - mine.first - skip + WARPGROUPS - 1, jnp.int32(WARPGROUPS))
        total, top, sums = lax.fori_loop(0, number, block, nothing)
        plgpu.barrier_arrive(shared.q_used.at[place])

        sums = jnp.where(sums == 0.0, 1.0, sums)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the unit before
        out[...] = (total * spread(1.0 / sums, total.shape)).astype(refs.q.dtype)
        lse[...] = top * (1 / LOG2E) + jnp.log(sums)
        plgpu.commit_smem()
        kept = pl.ds(0, form.rows)
        plgpu.copy_smem_to_gmem(out.at[kept], refs.out.at[mine.number, warpgroup])
        plgpu.copy_smem_to_gmem(lse.at[kept], refs.lse.at[mine.number, warpgroup])

    lax.fori_loop(0, _number_of_units(refs), unit, None)
    plgpu.wait_smem_to_gmem(0)


def _clear_after(number, values, keys: int, interpret: bool):
    """Zeros for what stands after the end: nobody wrote it, and a weight of 0 times a nan is a nan."""

    @pl.when(number < keys)
    def _():
        for column in range(0, values.shape[1], COLUMNS):
            some = values.at[:, pl.ds(column, COLUMNS)]
            part = lay(some[...], LAYOUT, interpret)
            row = lay(lax.broadcasted_iota(jnp.int32, part.shape, 0), LAYOUT, interpret)
            some[...] = jnp.where(row < number, part, jnp.zeros_like(part))
        plgpu.commit_smem()
