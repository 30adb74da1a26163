"""What the Hopper kernels of attention share: options, products on tiles, masks, and which blocks have to be visited.

Letters of shapes: B batch, T queries, S keys, N query heads, K key heads, H head_dim. A tile of scores is [R, C].
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

LOG2E = math.log2(math.e)
NO_KEY = -1e30  # log-sum-exp of a row that has seen no key; finite, so that no difference of two is a nan
WARPGROUP_ROWS = 64  # of one wgmma
COMPUTE_WARPGROUPS = 2  # take turns: one multiplies while the other exponentiates
ROWS = WARPGROUP_ROWS * COMPUTE_WARPGROUPS  # of a thread block
PADDING = 8  # TMA tiles a sequence by 8 rows
MEMORY_REGISTERS = 24  # of a thread of the warpgroup that only issues copies
COMPUTE_REGISTERS = 240
SHARED_MEMORY = 219 * 1024  # bytes for the tiles of a thread block, of the 227 KiB that it may ask for
LAYOUT = plgpu.Layout.WGMMA


class Options(NamedTuple):
    """What a kernel is specialised to. num_queries and num_keys count without padding."""

    causal: bool
    window: int | None
    offset: int  # of the first query among the keys
    softcap: float | None
    scale: float
    num_queries: int
    num_keys: int
    segments: bool
    alibi: bool
    interpret: bool

    @property
    def plain(self) -> bool:
        """Whether a score is just scale q·k with a positive scale, which then joins the exponential's argument."""
        return self.softcap is None and not self.alibi and self.scale > 0


# ---- products ----


def _nothing() -> None:
    pass


def products(*pairs: tuple, meanwhile: Callable[[], None] = _nothing, interpret: bool) -> list[Array]:
    """a bᵀ for each pair (a, b) of references, on the tensor cores and in float32.

    `meanwhile` runs between the start of all and the end of all.
    """
    if interpret:
        meanwhile()
        return [_plain_product(a, b, True) for a, b in pairs]

    def run(*sum_refs):
        for sum_ref, (a, b) in zip(sum_refs, pairs, strict=True):
            plgpu.wgmma(sum_ref, a, b.transpose((1, 0)))
        meanwhile()
        return [sum_ref[...] for sum_ref in sum_refs]

    return pl.run_scoped(run, *(plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in pairs))


def add_products(
    totals: Sequence[Array], *pairs: tuple, meanwhile: Callable[[], None] = _nothing, interpret: bool
) -> tuple[Array, ...]:
    """total + a b for each total and pair, a in registers and b a reference; see `products`."""
    if interpret:
        meanwhile()
        return tuple(total + _plain_product(a, b, False) for total, (a, b) in zip(totals, pairs, strict=True))

    def run(sum_refs):
        for sum_ref, (a, b) in zip(sum_refs, pairs, strict=True):
            plgpu.wgmma(sum_ref, a, b)
        meanwhile()

    return pl.run_state(run)(tuple(plgpu.ACC.init(total) for total in totals))


def _plain_product(a, b, transposed: bool) -> Array:
    """Jax's interpreter knows no wgmma of registers or of a transposed reference, and no sum that starts with a value."""
    a, b = (x if isinstance(x, Array) else x[...] for x in (a, b))
    return jnp.dot(a, b.T if transposed else b, preferred_element_type=jnp.float32)


# ---- registers ----


def lay(x: Array, layout: Any, interpret: bool) -> Array:
    return x if interpret else plgpu.layout_cast(x, layout)


def full(shape: tuple[int, ...], value: float, interpret: bool) -> Array:
    """A tile of scores or of sums ([R, C]), or one number a row of it ([R])."""
    return lay(jnp.full(shape, value, jnp.float32), LAYOUT if len(shape) == 2 else LAYOUT.reduce(1), interpret)


def load(ref, along: int, interpret: bool) -> Array:
    """A vector from shared memory, one number a row (along = 0) or a column (1) of a tile of scores."""
    return lay(ref[...], LAYOUT.reduce(1 - along), interpret)


def spread(x: Array, shape: tuple[int, ...], along: int = 0) -> Array:
    """One number a row (along = 0) or a column (1), over a tile."""
    return lax.broadcast_in_dim(x, shape, [along])


# ---- scores ----


class Place(NamedTuple):
    """Where a tile of scores stands."""

    query: Any  # position of its first query among the keys
    key: Any  # of its first key
    queries_along: int  # 0: queries are rows, 1: columns


def scores(options: Options, raw: Array, place: Place, slope) -> tuple[Array, Array | None]:
    """Scores in units of log 2 if not `options.plain`, else the product as it is; and softcap's derivative.

    raw: q·k, [R, C]. slope: ALiBi's, of the head.
    """
    if options.plain:
        return raw, None
    x, derivative = raw * options.scale, None
    if options.softcap is not None:
        # tanh y = 1 - 2 / (1 + e^2y): the tanh of the special function unit is off by up to 5e-4 of the softcap.
        root = lax.rsqrt(1.0 + jnp.exp2(x * (2.0 * LOG2E / options.softcap)))
        squashed = 1.0 - 2.0 * root * root
        x, derivative = squashed * options.softcap, 1.0 - squashed * squashed
    if options.alibi:
        x = x - _distance(options, raw.shape, place).astype(jnp.float32) * slope
    return x * LOG2E, derivative


def factor(options: Options) -> float:
    """What `scores` is to be multiplied by to be in units of log 2."""
    return options.scale * LOG2E if options.plain else 1.0


def hide(options: Options, x: Array, place: Place, ids: tuple | None, end_of_keys: bool) -> Array:
    """x with -inf where the query does not see the key.

    ids: segments of the tile's queries and of its keys. end_of_keys: whether the tile may reach past the last key.
    """
    keys_along = 1 - place.queries_along
    conditions = []
    if end_of_keys:
        conditions.append(_index(options, x.shape, keys_along) < options.num_keys - place.key)
    if options.causal or options.window is not None:
        distance = _distance(options, x.shape, place)
        if options.causal:
            conditions.append(distance >= 0)
        if options.window is not None:
            conditions.append(distance < options.window)
    if ids is not None:
        conditions.append(spread(ids[0], x.shape, place.queries_along) == spread(ids[1], x.shape, keys_along))
    return jnp.where(functools.reduce(jnp.logical_and, conditions), x, -jnp.inf) if conditions else x


def _distance(options: Options, shape: tuple[int, ...], place: Place) -> Array:
    """How far each key stands before the query."""
    query, key = (_index(options, shape, along) for along in (place.queries_along, 1 - place.queries_along))
    return query - key + (place.query - place.key)


def _index(options: Options, shape, along: int) -> Array:
    return lay(lax.broadcasted_iota(jnp.int32, shape, along), LAYOUT, options.interpret)


# ---- blocks to visit ----


class Span(NamedTuple):
    """Blocks first <= j < end are visited; of them, whole_first <= j < whole_end need no mask.

    A program holds a loop for each part; None says that there is no masked block in front, or none behind.
    """

    first: Any
    whole_first: Any
    whole_end: Any
    end: Any

    def part(self, warpgroup: "Span") -> "Span":
        """The same blocks, masked as a part of the rows needs it."""
        whole_first, whole_end = warpgroup.whole_first, warpgroup.whole_end
        if whole_first is not None:
            whole_first = jnp.clip(whole_first, self.first, self.end)
        if whole_end is not None:
            whole_end = jnp.clip(whole_end, self.first if whole_first is None else whole_first, self.end)
        return Span(self.first, whole_first, whole_end, self.end)


def span_of_keys(options: Options, start, rows: int, block: int) -> Span:
    """The blocks of keys that queries start <= t < start + rows see."""
    last = jnp.minimum(start + rows, options.num_queries) - 1 + options.offset
    first: Any = 0
    end: Any = -(-options.num_keys // block)
    whole_first: Any = None
    whole_end: Any = None
    if options.num_keys % block:
        whole_end = options.num_keys // block
    if options.causal:
        end = jnp.minimum(end, _blocks_up(last + 1, block))
        whole_end = jnp.minimum(options.num_keys // block, _blocks_down(start + (options.offset + 1), block))
    if options.window is not None:
        first = _blocks_down(start + (options.offset + 1 - options.window), block)
        whole_first = _blocks_up(last + (1 - options.window), block)
    return _span(options, first, whole_first, whole_end, end)


def span_of_queries(options: Options, start, rows: int, block: int) -> Span:
    """The blocks of queries that see keys start <= s < start + rows.

    A query past the last is zero and adds nothing, a key past the last is not stored: neither needs a mask.
    """
    last = jnp.minimum(start + rows, options.num_keys) - 1
    first: Any = 0
    end: Any = -(-options.num_queries // block)
    whole_first: Any = None
    whole_end: Any = None
    if options.causal:
        first = _blocks_down(start - options.offset, block)
        whole_first = _blocks_up(last - options.offset, block)
    if options.window is not None:
        end = jnp.minimum(end, _blocks_up(last + (options.window - options.offset), block))
        whole_end = _blocks_down(start + (options.window - options.offset), block)
    return _span(options, first, whole_first, whole_end, end)


def _span(options: Options, first, whole_first, whole_end, end) -> Span:
    if not (isinstance(first, int) and isinstance(end, int)):
        end = jnp.maximum(end, first)
    if options.segments:  # any block may have a boundary of segments
        return Span(first, None, first, end)
    everything = Span(first, None, None, end)
    return everything.part(Span(None, whole_first, whole_end, None))


def _blocks_down(x, block: int):
    return lax.div(jnp.maximum(x, 0), jnp.int32(block))


def _blocks_up(x, block: int):
    return lax.div(jnp.maximum(x, 0) + (block - 1), jnp.int32(block))


def walk(span: Span, body: Callable[[Any, Any, bool], Any], carry: Any) -> Any:
    """body(j, carry, masked) over the blocks of a span; only those that need it are masked."""
    first, end = span.first, span.end
    if span.whole_first is not None:
        carry = lax.fori_loop(first, span.whole_first, lambda j, state: body(j, state, True), carry)
        first = span.whole_first
    whole_end = end if span.whole_end is None else span.whole_end
    if whole_end is not first:
        carry = lax.fori_loop(first, whole_end, lambda j, state: body(j, state, False), carry)
    if span.whole_end is not None:
        carry = lax.fori_loop(whole_end, end, lambda j, state: body(j, state, True), carry)
    return carry


# ---- memory ----


def tiles(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory laid out as wgmma reads it."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def either_warpgroup(
    compute: Callable[[Any], None],
    copy: Callable[[], None],
    registers: tuple[int, int] = (COMPUTE_REGISTERS, MEMORY_REGISTERS),
) -> None:
    """compute(index of the warpgroup) in the computing warpgroups, copy() in the other, each with its registers."""
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        plgpu.set_max_registers(registers[0], action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        plgpu.set_max_registers(registers[1], action="decrease")
        copy()


def call_kernel(
    body: Callable, options: Options, out_type: Any, grid: dict[str, int], arguments: tuple, **more: Any
) -> Any:
    """body(*references, of arguments and results) on a grid of thread blocks, two computing warpgroups and one copying.

    more: further parameters of the compiler.
    """
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **more
        ),
        **({"interpret": _interpreter()} if options.interpret else {}),
    )
    return kernel(*arguments)


def _interpreter():
    from jax._src.pallas.mosaic_gpu.interpret import params  # jax 0.10 has no public name for it

    return params.InterpretGPUParams()


def drain(barriers: tuple, num_uses, num_slots: int) -> None:
    """Waits for the last use of each slot, which no later copy has waited for: every phase of a barrier is observed."""
    for slot in range(num_slots):

        @pl.when(num_uses > slot)
        def _(slot=slot):
            for barrier in barriers:
                plgpu.barrier_wait(barrier.at[slot])


def padded(x: Array, size: int, axis: int = 1, value: float = 0) -> Array:
    """x with its axis filled up to a multiple of size."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    pads = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads, constant_values=value)
