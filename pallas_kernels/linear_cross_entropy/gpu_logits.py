"""The kernel of the fused loss on Hopper GPUs: tiles of logits, and of each tile what the softmax needs of it.

A tile is 128 tokens by a block of the vocabulary. For every token it leaves the largest logit, the sum of exponentials
below it and the label's logit if it is here, [blocks of the vocabulary, tokens]: no tile depends on another, so that
every core takes as many, in an order that reads few different blocks of x and w at a time. Where gradients are wanted
the exponentials are written too, in half precision and relative to the tile's own largest, which loses nothing.

A thread block has three warpgroups: one copies blocks of x and w by TMA, a few steps ahead; two multiply 64 rows each.
Thread blocks go in pairs that share a block of w: each reads half of it from the L2 cache, for both.
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
    ROWS,
    WARPGROUP_ROWS,
    drain,
    either_warpgroup,
    lay,
    load,
    spread,
    tiles,
)

NUM_CORES = 132
REGISTERS = (232, 40)  # of a thread that computes, and one that copies and finds the places of tiles
PIECE = 64  # columns whose exponentials are in registers beside a tile's logits
SCRATCH_BYTES = 1024  # for reductions; those along a row need none, and the default leaves no room for four stages
SHARED_BYTES = 227 * 1024 - SCRATCH_BYTES - 2048  # the rest is labels and barriers


class Blocks(NamedTuple):
    """Sizes of the kernel.

    columns: of a tile. step: features of a step. stages: steps in shared memory. cluster: thread blocks that share w.
    group: clusters of rows that pass by a block of w before the next. lead: steps that one computing warpgroup is ahead
    of the other, so that the tensor cores are busy while it takes exponentials. store: columns of a tile of exponentials
    in shared memory.
    """

    columns: int
    step: int
    stages: int
    cluster: int
    group: int
    lead: int
    store: int

    @property
    def rows(self) -> int:
        """Of a cluster."""
        return ROWS * self.cluster

    def shared_bytes(self, size: int, exponentials: bool) -> int:
        return size * ((ROWS + self.columns) * self.step * self.stages + ROWS * self.store * exponentials)


class Options(NamedTuple):
    """What the kernel is specialised to. vocab counts without padding."""

    transposed: bool
    softcap: float | None
    vocab: int
    exponentials: bool
    interpret: bool


class Statistics(NamedTuple):
    """Of each block of the vocabulary and token, [blocks, M] in float32; exponentials are [M, blocks * columns].

    References, in the kernel.
    """

    top: Any  # the largest logit, in units of log 2
    total: Any  # sum of exponentials relative to it
    picked: Any  # the label's logit, or 0 where it is in another block
    exponentials: Any  # or None; relative to top, with softcap's derivative in them


def candidates(num_rows: int, size: int, exponentials: bool) -> list[Blocks]:
    """Blocks that fit shared memory, best first: pairs that share w, wide tiles, and as many stages as there is room.

    A step that a warpgroup is ahead is held in shared memory until the other has done it: three stages leave none.
    """
    found = []
    for columns in (256, 128):
        for cluster in (2, 1) if num_rows > ROWS else (1,):
            for group in (16 // cluster, 32 // cluster, 8 // cluster):
                for store in (columns, columns // 2) if exponentials else (columns,):
                    sizes = (Blocks(columns, 128 // size, n, cluster, group, 0, store) for n in (6, 5, 4, 3, 2))
                    for one in [one for one in sizes if one.shared_bytes(size, exponentials) <= SHARED_BYTES][:2]:
                        leads = (1, 2, 0) if one.stages >= 4 else (0, 1)
                        found += [one._replace(lead=lead) for lead in leads]
    return found


def statistics(options: Options, block: Blocks, x: Array, w: Array, labels: Array) -> Statistics:
    """x has a multiple of block.rows rows, w a multiple of `alignment` columns; where interpreted, of block.columns."""
    num_rows, num_vocab = x.shape[0], pl.cdiv(options.vocab, block.columns)
    column = jax.ShapeDtypeStruct((num_vocab, num_rows), jnp.float32)
    out_type = [column, column, column]
    if options.exponentials:
        out_type.append(jax.ShapeDtypeStruct((num_rows, num_vocab * block.columns), x.dtype))
    grid = _Grid(block, num_rows // block.rows, num_vocab, x.shape[1] // block.step)
    pairs: dict[str, Any] = {"cluster": (block.cluster,), "cluster_names": ("peer",)} if block.cluster > 1 else {}
    kernel = plgpu.kernel(
        functools.partial(_enter, options, grid),
        out_type=tuple(out_type),
        grid=(grid.programs,),
        grid_names=("program",),
        **pairs,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=SCRATCH_BYTES,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        **({"interpret": _interpreter()} if options.interpret else {}),
    )
    top, total, picked, *exponentials = kernel(x, w, labels)
    return Statistics(top, total, picked, exponentials[0] if exponentials else None)


def alignment(options: Options, block: Blocks) -> int:
    """What the columns of w have to be a multiple of: TMA's tiles, and all of a block in the interpreter's copies."""
    return block.columns if options.interpret else 8 if options.transposed else block.step


class _Grid(NamedTuple):
    """The tiles of all clusters, and their order."""

    block: Blocks
    num_rows: int  # clusters of rows
    num_vocab: int
    num_steps: int  # of a tile

    @property
    def programs(self) -> int:
        return min(self.num_rows * self.num_vocab, NUM_CORES // self.block.cluster)

    def count(self, program) -> Any:
        """How many tiles a program has."""
        return lax.div(self.num_rows * self.num_vocab - 1 - program, self.programs) + 1

    def place(self, program, i) -> tuple[Any, Any]:
        """(cluster of rows, block of the vocabulary) of a program's i-th tile."""
        at, whole = program + i * self.programs, self.block.group * self.num_vocab
        group, at = lax.div(at, whole), lax.rem(at, whole)
        height = jnp.minimum(self.num_rows - group * self.block.group, self.block.group)
        return group * self.block.group + lax.rem(at, height), lax.div(at, height)

    def first_row(self, cluster) -> Any:
        """Of this thread block's, in a cluster of rows."""
        return cluster * self.block.rows + (lax.axis_index("peer") * ROWS if self.block.cluster > 1 else 0)


class _Shared(NamedTuple):
    """Shared memory of a thread block and its barriers."""

    x: Any  # [stages, ROWS, step]
    w: Any  # [stages, step, columns], or transposed
    out: Any  # [ROWS, store]
    labels: Any  # [2, 64]
    here: Any
    used: Any
    labels_here: Any
    ahead: Any


def _enter(options: Options, grid: _Grid, x, w, labels, top, total, picked, *exponentials):
    block = grid.block
    of_w = (block.columns, block.step) if options.transposed else (block.step, block.columns)
    used: Any
    if block.cluster > 1:
        used = plgpu.ClusterBarrier(
            collective_axes=("peer",), num_arrivals=COMPUTE_WARPGROUPS, num_barriers=block.stages
        )
    else:
        used = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=block.stages)
    shared = _Shared(
        x=tiles((block.stages, ROWS, block.step), x.dtype),
        w=tiles((block.stages, *of_w), w.dtype),
        out=tiles((ROWS, block.store), x.dtype) if exponentials else None,
        labels=plgpu.SMEM((COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.int32),
        here=plgpu.Barrier(num_arrivals=2, num_barriers=block.stages),
        used=used,
        labels_here=plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
        ahead=plgpu.Barrier(),
    )
    out = Statistics(top, total, picked, exponentials[0] if exponentials else None)

    def with_memory(shared):
        either_warpgroup(
            lambda warpgroup: _compute(options, grid, labels, out, shared, warpgroup),
            lambda: _copy(options, grid, x, w, shared),
            REGISTERS,
        )

    pl.run_scoped(with_memory, shared, collective_axes="wg")


def _copy(options: Options, grid: _Grid, x, w, shared: _Shared):
    """Steps of all of the program's tiles in the order of use, each as soon as its place is free."""
    block, program = grid.block, lax.axis_index("program")
    num_steps = grid.count(program) * grid.num_steps
    multicast: dict[str, Any] = {"collective_axes": "peer"} if block.cluster > 1 else {}

    def step(s, _):
        slot = lax.rem(s, jnp.int32(block.stages))
        row, vocab = grid.place(program, lax.div(s, jnp.int32(grid.num_steps)))
        features = pl.ds(lax.rem(s, jnp.int32(grid.num_steps)) * block.step, block.step)
        columns = pl.ds(vocab * block.columns, block.columns)
        rows = pl.ds(grid.first_row(row), ROWS)

        @pl.when(s >= block.stages)
        def _await_place():
            plgpu.barrier_wait(shared.used.at[slot])

        plgpu.copy_gmem_to_smem(x.at[rows, features], shared.x.at[slot], shared.here.at[slot])
        of_w = w.at[columns, features] if options.transposed else w.at[features, columns]
        plgpu.copy_gmem_to_smem(of_w, shared.w.at[slot], shared.here.at[slot], **multicast)

    lax.fori_loop(0, num_steps, step, None)
    drain((shared.used,), num_steps, block.stages)


def _compute(options: Options, grid: _Grid, labels, out: Statistics, shared: _Shared, warpgroup):
    """A warpgroup's half of the program's tiles."""
    block, program = grid.block, lax.axis_index("program")
    own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def tile(i, _):
        row, vocab = grid.place(program, i)
        rows = pl.ds(grid.first_row(row) + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        plgpu.copy_gmem_to_smem(labels.at[rows], shared.labels.at[warpgroup], shared.labels_here.at[warpgroup])
        logits = _products(options, grid, i * grid.num_steps, shared, warpgroup)
        plgpu.barrier_wait(shared.labels_here.at[warpgroup])
        label = load(shared.labels.at[warpgroup], 0, options.interpret)
        plgpu.commit_smem()  # the next tile's labels come when every warp has read these
        x = _capped(options, logits)
        index = lay(lax.broadcasted_iota(jnp.int32, x.shape, 1), LAYOUT, options.interpret)
        before = vocab * block.columns
        out.picked[vocab, rows] = jnp.sum(jnp.where(index == spread(label - before, x.shape), x, 0.0), axis=1)
        if options.vocab % block.columns:
            x = jnp.where(index < options.vocab - before, x, -jnp.inf)
        top = jnp.max(x, axis=1) * LOG2E
        out.top[vocab, rows] = top
        if out.exponentials is None:
            out.total[vocab, rows] = jnp.sum(jnp.exp2(x * LOG2E - spread(top, x.shape)), axis=1)
            return
        total = jnp.zeros_like(top)
        for at in range(0, block.columns, PIECE):
            piece = x[:, at : at + PIECE]
            exponentials = jnp.exp2(piece * LOG2E - spread(top, piece.shape))
            total += jnp.sum(exponentials, axis=1)
            if options.softcap is not None:  # its derivative; nan past the vocabulary's end, which is cut off
                exponentials *= 1.0 - piece * piece * (1.0 / options.softcap**2)
            within = at % block.store
            if within == 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of what was there before
            shared.out[own, pl.ds(within, PIECE)] = exponentials.astype(shared.out.dtype)
            if within + PIECE == block.store:
                plgpu.commit_smem()
                columns = pl.ds(before + at + PIECE - block.store, block.store)
                plgpu.copy_smem_to_gmem(shared.out.at[own], out.exponentials.at[rows, columns])
        out.total[vocab, rows] = total

    lax.fori_loop(0, grid.count(program), tile, None)
    if out.exponentials is not None:
        plgpu.wait_smem_to_gmem(0)


def _products(options: Options, grid: _Grid, first, shared: _Shared, warpgroup) -> Array:
    """x w of a warpgroup's rows and a tile's columns; `first` is the tile's first step among the program's."""
    own = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    lead = min(grid.block.lead, grid.num_steps - 1)

    def slot(k):
        return lax.rem(first + k, jnp.int32(grid.block.stages))

    def operands(k):
        plgpu.barrier_wait(shared.here.at[slot(k)])
        return shared.x.at[slot(k), own], shared.w.at[slot(k)]

    shape = WARPGROUP_ROWS, grid.block.columns
    if options.interpret:  # knows no wgmma of a transposed reference

        def add(k, total):
            left, right = operands(k)
            right_tile = right[...].T if options.transposed else right[...]
            total += jnp.dot(left[...], right_tile, preferred_element_type=jnp.float32)
            plgpu.barrier_arrive(shared.used.at[slot(k)])
            return total

        return lax.fori_loop(0, grid.num_steps, add, jnp.zeros(shape, jnp.float32))

    def run(acc):
        def multiply(k):
            left, right = operands(k)
            plgpu.wgmma(acc, left, right.transpose((1, 0)) if options.transposed else right)

        def step(k, _):
            multiply(k)
            plgpu.wgmma_wait(1)  # the step before is done; this one runs on while the next is awaited
            plgpu.barrier_arrive(shared.used.at[slot(k - 1)])

        if lead:

            @pl.when((first == 0) & (warpgroup == 1))
            def _let_the_other_go_ahead():
                plgpu.barrier_wait(shared.ahead)

        multiply(0)
        for k in range(1, lead + 1):
            step(k, None)
        if lead:

            @pl.when((first == 0) & (warpgroup == 0))
            def _is_ahead():
                plgpu.barrier_arrive(shared.ahead)

        lax.fori_loop(lead + 1, grid.num_steps, step, None)
        total = acc[...]
        plgpu.barrier_arrive(shared.used.at[slot(grid.num_steps - 1)])
        return total

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _capped(options: Options, logits: Array) -> Array:
    """Logits under the softcap."""
    if options.softcap is None:
        return logits
    # tanh y = 1 - 2 / (1 + e^2y): the tanh of the special function unit is off by up to 5e-4 of the softcap.
    root = lax.rsqrt(1.0 + jnp.exp2(logits * (2.0 * LOG2E / options.softcap)))
    return options.softcap - (2.0 * options.softcap) * (root * root)


def _interpreter():
    from jax._src.pallas.mosaic_gpu.interpret import params  # jax 0.10 has no public name for it

    return params.InterpretGPUParams()
