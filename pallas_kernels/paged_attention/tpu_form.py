"""What the parts of the TPU kernel share: its static form, its block sizes, its references, and copies of rows."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
NEG_INF = -1e30  # finite: the difference of two of them is not nan


def round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def tile_rows(dtype) -> int:
    """Rows of a tile in memory: 8 of 32 bits, more of narrower types."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize


class Form(NamedTuple):
    """All that the kernel's code depends on. Heads are those of one part: each core has its own."""

    num_tokens: int
    columns: int  # of the block tables
    parts: int
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    causal: bool
    writes: bool
    window: int | None
    softcap: float | None
    scale: float
    with_sinks: bool
    with_lse: bool
    q_dtype: str
    pool_dtype: str
    compute_dtype: str

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def few_rows(self) -> int:
        """Rows of a head's queries in an item of one token."""
        return round_up(self.group, SUBLANES)

    @property
    def tile(self) -> int:
        return tile_rows(self.pool_dtype)


class Blocks(NamedTuple):
    """queries: tokens of an item, a power of two. pages: of a block. keys: whose scores are held at once (prompts)."""

    queries: int
    pages: int
    keys: int


def write_pages(form: Form, block: Blocks) -> int:
    """How many pages of new tokens are put together at once."""
    return min(block.pages, -(-form.num_tokens // form.page_size) + 1)


def candidates(form: Form, num_rows: int, capacity: int) -> list[Blocks]:
    """Sizes that fit the chip's memory, best first.

    A block of keys is long enough that its copy hides the start of the next one's; an item has rows enough that
    loading the keys into the MXU is a small part of a product. Items are no longer than a sequence can be.
    """
    found = []
    longest = max(1, form.num_tokens - num_rows + 1)  # of one sequence, if each has one
    for rows in (512, 256, 128, 64):
        queries = max(16, 1 << ((rows // form.group).bit_length() - 1))
        while queries > 16 and queries >= 2 * longest:
            queries //= 2
        for tokens in (512, 1024, 256, 128):
            pages = min(max(1, tokens // form.page_size), form.columns)
            keys = pages * form.page_size
            for held in (256, 512, 128):
                if keys % min(held, keys) == 0:
                    size = Blocks(queries, pages, min(held, keys))
                    if size not in found and vmem_bytes(form, size) <= capacity * 0.7:
                        found.append(size)
    return found or [Blocks(16, 1, form.page_size)]


def vmem_bytes(form: Form, block: Blocks) -> int:
    shapes = Refs.shapes(form, block).values()
    total = sum(jnp.dtype(dtype).itemsize * _padded_size(shape, dtype) for shape, dtype in shapes)
    return total + 4 * block.queries * form.group * block.keys * 4  # scores on their way


def _padded_size(shape: tuple[int, ...], dtype) -> int:
    size = round_up(shape[-1], LANES) * round_up(shape[-2], tile_rows(dtype))
    for part in shape[:-2]:
        size *= part
    return size


class Refs(NamedTuple):
    """The kernel's references by name. Buffers of two halves are filled while the other half is in use."""

    lengths: Any
    starts: Any
    tables: Any  # [R * columns]
    num_sequences: Any
    q: Any  # [M, parts, heads, H]
    pool: Any  # [P, K, 2, page_size, H], read and written
    sinks: Any  # [1, kv_heads, few_rows, LANES], in units of log 2
    new: Any  # [M, parts, 2, kv_heads, H]: the tokens one by one
    k_by_head: Any  # [parts, kv_heads, padded tokens, H]
    v_by_head: Any
    out: Any
    lse: Any
    kv_buf: Any
    q_buf: Any
    wide: Any
    out_buf: Any
    lse_buf: Any
    rows: Any
    few: Any
    top: Any
    total: Any
    acc: Any
    new_buf: Any
    staged: Any
    kv_sem: Any
    q_sem: Any
    new_sem: Any
    out_sem: Any
    write_sem: Any
    part: Any  # which core this is

    @staticmethod
    def shapes(form: Form, block: Blocks) -> dict[str, tuple[tuple[int, ...], Any]]:
        """The buffers in VMEM."""
        keys, rows = block.pages * form.page_size, block.queries * form.group
        kv, heads, dim = form.kv_heads, form.heads, form.head_dim
        all_rows = max(rows, form.few_rows)
        buffers = {
            "kv_buf": ((2, kv, 2, keys, dim), form.pool_dtype),
            "q_buf": ((2, block.queries, heads, dim), form.q_dtype),
            "wide": ((block.queries, heads, dim), "float32"),  # queries and results, where single rows can be moved
            "out_buf": ((block.queries, heads, dim), form.q_dtype),
            "lse_buf": ((block.queries, heads, LANES), "float32"),
            "rows": ((kv, rows, dim), form.compute_dtype),  # queries of a head: those of its group one after another
            "few": ((kv, form.few_rows, dim), "float32"),
            "top": ((kv, all_rows, LANES), "float32"),
            "total": ((kv, all_rows, LANES), "float32"),  # not yet summed over the lanes
            "acc": ((kv, all_rows, dim), "float32"),
            "new_buf": ((2, 2, kv, dim), form.compute_dtype),
            "staged": ((2, kv, write_pages(form, block) * form.page_size + form.tile, dim), form.compute_dtype),
        }
        if not form.with_lse:
            del buffers["lse_buf"]
        if not form.writes:
            del buffers["new_buf"], buffers["staged"]
        return buffers

    @classmethod
    def scratch(cls, form: Form, block: Blocks) -> list[Any]:
        buffers = [pltpu.VMEM(shape, jnp.dtype(dtype)) for shape, dtype in cls.shapes(form, block).values()]
        two, one = pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA(())
        return [*buffers, two, two, two, one, one]

    @classmethod
    def of(cls, form: Form, refs) -> "Refs":
        names = ["lengths", "starts", "tables", "num_sequences", "q", "pool_in"]
        names += ["sinks"] if form.with_sinks else []
        names += ["new", "k_by_head", "v_by_head"] if form.writes else []
        names += ["out", "pool"] + (["lse"] if form.with_lse else [])
        names += cls.shapes(form, Blocks(1, 1, form.page_size))
        names += ["kv_sem", "q_sem", "new_sem", "out_sem", "write_sem"]
        found = dict(zip(names, refs, strict=True))
        del found["pool_in"]  # the same memory as pool
        return cls(**(dict.fromkeys(cls._fields) | found | {"part": pl.program_id(0)}))


def copy_rows(source, target, count, most: int, semaphore, start: bool) -> None:
    """Starts or awaits a copy of `count` <= most (a power of two) rows of the first dimension, by powers of two.

    source, target: (reference, its first row); the parts of a copy have static sizes, as everything here has.
    """
    size = most
    while size:
        fits = size <= source[0].shape[0] and size <= target[0].shape[0]
        if fits:

            @pl.when((count & size) != 0)
            def _(size=size):
                offset = count & ~(2 * size - 1)
                (have, at), (want, to) = source, target
                copy = pltpu.make_async_copy(
                    have.at[pl.ds(at + offset, size)], want.at[pl.ds(to + offset, size)], semaphore
                )
                copy.start() if start else copy.wait()

        size //= 2
