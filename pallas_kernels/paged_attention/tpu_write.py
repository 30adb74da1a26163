"""New keys and values on their way into the pool, on a TPU."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_form import Blocks, Form, Refs, write_pages


def prepared(form: Form, block: Blocks, new) -> list[jax.Array]:
    """The stored k and v [M, K, H]: token by token for decoding, and as matrices of heads for pages of prompts."""
    k, v = (x.astype(form.compute_dtype) for x in new)  # holds what is stored exactly
    both = jnp.stack([k, v], axis=1).reshape(form.num_tokens, 2, form.parts, form.kv_heads, form.head_dim)
    behind = write_pages(form, block) * form.page_size + 2 * form.tile
    behind += -(form.page_size + form.num_tokens + behind) % form.tile

    def by_head(x):
        x = jnp.pad(x.swapaxes(0, 1), ((0, 0), (form.page_size, behind), (0, 0)))
        return x.reshape(form.parts, form.kv_heads, -1, form.head_dim)

    return [both.swapaxes(1, 2), by_head(k), by_head(v)]


def chunks(form: Form, block: Blocks, at: Refs) -> None:
    """Writes the new tokens of each sequence that has more than one, some pages at a time."""

    def sequence(r, carry):
        count = at.starts[r + 1] - at.starts[r]

        @pl.when(count > 1)
        def _():
            length = at.lengths[r]
            first = length - count
            page, end = first // form.page_size, pl.cdiv(length, form.page_size)
            size = write_pages(form, block)
            steps = pl.cdiv(end - page, size)
            lax.fori_loop(0, steps, lambda i, _: _chunk(form, block, at, r, first, length, page + i * size, end), None)

        return carry

    lax.fori_loop(0, at.num_sequences[0], sequence, None)


def _chunk(form: Form, block: Blocks, at: Refs, r, first, length, page, end) -> None:
    """Pages page to min(page + write_pages, end) of sequence r, whose new tokens have positions first to length."""
    part, size, rows = at.part, write_pages(form, block), form.page_size
    heads = pl.ds(part * form.kv_heads, form.kv_heads)
    number = jnp.minimum(size, end - page)
    source = rows + at.starts[r] + page * rows - first  # in the padded tokens
    base = source // form.tile * form.tile
    shift = source - base
    turn = jnp.where(shift == 0, 0, rows + form.tile - shift)  # brings row `shift` to the front

    def new(kv, start):
        by_head = (at.k_by_head, at.v_by_head)[kv]
        window = by_head.at[part, :, pl.ds(pl.multiple_of(base, form.tile), size * rows + form.tile)]
        copy = pltpu.make_async_copy(window, at.staged.at[kv], at.new_sem.at[0])
        copy.start() if start else copy.wait()

    def old(i, start):  # rows of a page that are not new, at either end
        @pl.when(((page + i) * rows < first) | ((page + i + 1) * rows > length))
        def _():
            copy = _page_copy(form, at, r, page + i, i, heads, at.kv_sem.at[0], read=True)
            copy.start() if start else copy.wait()

    def write(i, start):
        copy = _page_copy(form, at, r, page + i, i, heads, at.write_sem, read=False)
        copy.start() if start else copy.wait()

    def join(i, _):
        position = (page + i) * rows + lax.broadcasted_iota(jnp.int32, (rows, form.head_dim), 0)
        is_new = (position >= first) & (position < length)
        here = pl.ds(pl.multiple_of(i * rows, form.tile), rows)
        window = pl.ds(pl.multiple_of(i * rows, form.tile), rows + form.tile)
        for kv in range(2):
            for head in range(form.kv_heads):
                x = at.staged[kv, head, window].astype(jnp.float32)
                x = pltpu.roll(x, turn, 0)[:rows]
                before = at.kv_buf[0, head, kv, here].astype(jnp.float32)
                at.kv_buf[0, head, kv, here] = jnp.where(is_new, x, before).astype(at.kv_buf.dtype)
        write(i, True)

    for start in (True, False):
        new(0, start)
        new(1, start)
        lax.fori_loop(0, number, lambda i, _, start=start: old(i, start), None)
    lax.fori_loop(0, number, join, None)
    lax.fori_loop(0, number, lambda i, _: write(i, False), None)


def _page_copy(form: Form, at: Refs, r, column, i, heads, semaphore, *, read):
    page = at.pool.at[at.tables[r * form.columns + column], heads]
    here = at.kv_buf.at[0, :, :, pl.ds(pl.multiple_of(i * form.page_size, form.tile), form.page_size)]
    return pltpu.make_async_copy(*((page, here) if read else (here, page)), semaphore)


def insert(form: Form, at: Refs, slot, row, half) -> None:
    """Puts the one new token of a sequence into row `row` of the block in kv_buf[slot]."""
    base = pl.multiple_of(row // form.tile * form.tile, form.tile)
    is_new = lax.broadcasted_iota(jnp.int32, (form.tile, form.head_dim), 0) == row - base
    for kv in range(2):
        for head in range(form.kv_heads):
            x = at.new_buf[half, kv, pl.ds(head, 1)].astype(jnp.float32)
            before = at.kv_buf[slot, head, kv, pl.ds(base, form.tile)].astype(jnp.float32)
            joined = jnp.where(is_new, x, before)
            at.kv_buf[slot, head, kv, pl.ds(base, form.tile)] = joined.astype(at.kv_buf.dtype)


def tile_copy(form: Form, at: Refs, slot, row, r, position):
    """The copy back of the tile around that token."""
    part = at.part
    base = pl.multiple_of(row // form.tile * form.tile, form.tile)
    inside = pl.multiple_of(position % form.page_size // form.tile * form.tile, form.tile)
    page = at.tables[r * form.columns + position // form.page_size]
    target = at.pool.at[page, pl.ds(part * form.kv_heads, form.kv_heads), :, pl.ds(inside, form.tile)]
    return pltpu.make_async_copy(at.kv_buf.at[slot, :, :, pl.ds(base, form.tile)], target, at.write_sem)
