"""The walk over a ragged batch and its softmax, on a TPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import tpu_write
from pallas_kernels.paged_attention.tpu_form import LANES, NEG_INF, Blocks, Form, Refs, copy_rows

LOG2_E = 1.4426950408889634
HEADS_AT_ONCE = 2


class Item(NamedTuple):
    """Some tokens of one sequence, and the keys that they see. Everything is a scalar."""

    sequence: Any
    token: Any  # the first, in the batch
    taken: Any  # how many
    position: Any  # of the first, among the keys
    first_page: Any
    last_page: Any  # exclusive
    end: Any  # of the keys
    count: Any  # new tokens of the sequence

    @classmethod
    def of(cls, form: Form, block: Blocks, at: Refs, r, index) -> "Item":
        count = at.starts[r + 1] - at.starts[r]
        offset = index * block.queries
        taken = jnp.minimum(block.queries, count - offset)
        position = at.lengths[r] - count + offset
        end = position + taken if form.causal else at.lengths[r]
        first_page: Any = 0
        if form.window is not None:
            first_page = jnp.maximum(position - form.window + 1, 0) // form.page_size
        last_page = pl.cdiv(end, form.page_size)
        return cls(r, at.starts[r] + offset, taken, position, first_page, last_page, end, count)

    def steps(self, block: Blocks):
        """At least one: an item that sees no key still has a result."""
        return jnp.maximum(pl.cdiv(self.last_page - self.first_page, block.pages), 1)


def walk(form: Form, block: Blocks, at: Refs) -> None:
    """All items of all sequences, each against its blocks of keys."""
    number = at.num_sequences[0]
    first = _next_sequence(at, -1)

    @pl.when(first < number)
    def _():
        item = Item.of(form, block, at, first, 0)
        _fetch_tokens(form, block, at, item, 0, start=True)
        _fetch_pages(form, block, at, item, 0, 0, start=True)

    def sequence(r, carry):
        items = pl.cdiv(at.starts[r + 1] - at.starts[r], block.queries)
        return lax.fori_loop(0, items, lambda index, carry: _item(form, block, at, r, index, items, carry), carry)

    # the half of the pages' buffer in use, that of the queries', and how many tokens are on their way out
    _, _, going = lax.fori_loop(0, number, sequence, (jnp.int32(0), jnp.int32(0), jnp.int32(0)))
    _send(form, block, at, 0, going, start=False)


def _next_sequence(at: Refs, r):
    """The next one after r that has new tokens, or num_sequences."""
    number = at.num_sequences[0]

    def empty(r):
        inside = jnp.clip(r, 0, jnp.maximum(number - 1, 0))  # both sides of the `and` are computed
        return (r < number) & (at.starts[inside + 1] == at.starts[inside])

    return lax.while_loop(empty, lambda r: r + 1, jnp.int32(r) + 1)


def _item(form: Form, block: Blocks, at: Refs, r, index, items, carry):
    slot, half, going = carry
    item = Item.of(form, block, at, r, index)
    steps = item.steps(block)
    same = index + 1 < items
    following = jnp.where(same, r, _next_sequence(at, r))
    exists = following < at.num_sequences[0]
    after = Item.of(form, block, at, jnp.minimum(following, at.num_sequences[0] - 1), jnp.where(same, index + 1, 0))
    _fetch_tokens(form, block, at, item, half, start=False)

    @pl.when(exists)
    def _():
        _fetch_tokens(form, block, at, after, 1 - half, start=True)

    few = item.taken == 1

    @pl.when(few)
    def _():
        _begin_few(form, at, half)

    @pl.when(jnp.logical_not(few))
    def _():
        _begin_many(form, block, at, half)

    def step(i, slot):
        last = i + 1 == steps

        @pl.when(jnp.logical_not(last))
        def _():
            _fetch_pages(form, block, at, item, i + 1, 1 - slot, start=True)

        @pl.when(last & exists)
        def _():
            _fetch_pages(form, block, at, after, 0, 1 - slot, start=True)

        _fetch_pages(form, block, at, item, i, slot, start=False)
        base = (item.first_page + i * block.pages) * form.page_size  # position of the block's first key
        writes = last & (item.count == 1) & form.writes
        row = item.position - base

        @pl.when(last)
        def _():
            _clear_values(form, block, at, slot, item.end - base)

        @pl.when(writes)
        def _():
            if form.writes:
                tpu_write.insert(form, at, slot, row, half)
                tpu_write.tile_copy(form, at, slot, row, r, item.position).start()

        @pl.when(few)
        def _():
            for head in range(form.kv_heads):
                _few(form, block, at, slot, head, item, base)

        whole = _all_seen(form, block, item, base)

        @pl.when(jnp.logical_not(few) & whole)
        def _():
            _every_head(form, lambda head: _many(form, block, at, slot, head, item, base, masked=False))

        @pl.when(jnp.logical_not(few | whole))
        def _():
            _every_head(form, lambda head: _many(form, block, at, slot, head, item, base, masked=True))

        @pl.when(writes)
        def _():
            if form.writes:
                tpu_write.tile_copy(form, at, slot, row, r, item.position).wait()

        return 1 - slot

    slot = lax.fori_loop(0, steps, step, slot)
    _send(form, block, at, 0, going, start=False)

    @pl.when(few)
    def _():
        _finish_few(form, at)

    @pl.when(jnp.logical_not(few))
    def _():
        _finish_many(form, block, at)

    _send(form, block, at, item.token, item.taken, start=True)
    return slot, 1 - half, item.taken


# Copies


def _fetch_tokens(form: Form, block: Blocks, at: Refs, item: Item, half, *, start) -> None:
    """An item's queries, and the new key and value of a sequence that has one."""
    part = at.part
    copy_rows(
        (at.q.at[:, part], item.token), (at.q_buf.at[half], 0), item.taken, block.queries, at.q_sem.at[half], start
    )
    if form.writes:

        @pl.when(item.count == 1)
        def _():
            copy = pltpu.make_async_copy(at.new.at[item.token, part], at.new_buf.at[half], at.new_sem.at[half])
            copy.start() if start else copy.wait()


def _fetch_pages(form: Form, block: Blocks, at: Refs, item: Item, i, slot, *, start) -> None:
    first = item.first_page + i * block.pages
    heads = pl.ds(at.part * form.kv_heads, form.kv_heads)

    def page(j, _):
        source = at.pool.at[at.tables[item.sequence * form.columns + first + j], heads]
        here = pl.ds(pl.multiple_of(j * form.page_size, form.tile), form.page_size)
        copy = pltpu.make_async_copy(source, at.kv_buf.at[slot, :, :, here], at.kv_sem.at[slot])
        copy.start() if start else copy.wait()

    lax.fori_loop(0, jnp.clip(item.last_page - first, 0, block.pages), page, None)


def _send(form: Form, block: Blocks, at: Refs, token, taken, *, start) -> None:
    part = at.part
    copy_rows((at.out_buf, 0), (at.out.at[:, part], token), taken, block.queries, at.out_sem, start)
    if form.with_lse:
        copy_rows((at.lse_buf, 0), (at.lse.at[:, part], token), taken, block.queries, at.out_sem, start)


def zero_rest(form: Form, block: Blocks, at: Refs) -> None:
    """Zeros for the tokens past the last sequence."""
    used = jnp.where(at.num_sequences[0] > 0, at.starts[jnp.maximum(at.num_sequences[0], 0)], 0)
    at.out_buf[...] = jnp.zeros_like(at.out_buf)
    if form.with_lse:
        at.lse_buf[...] = jnp.full_like(at.lse_buf, NEG_INF)

    def some(i, _):
        token = used + i * block.queries
        taken = jnp.minimum(block.queries, form.num_tokens - token)
        _send(form, block, at, token, taken, start=True)
        _send(form, block, at, token, taken, start=False)

    lax.fori_loop(0, pl.cdiv(form.num_tokens - used, block.queries), some, None)


# The softmax, in units of log 2: exp2 is what the chip has


def _begin_few(form: Form, at: Refs, half) -> None:
    at.wide[:1] = at.q_buf[half, :1].astype(jnp.float32)
    for head in range(form.kv_heads):
        at.few[head, : form.group] = at.wide[0, head * form.group : (head + 1) * form.group]
    rows = form.few_rows
    if form.with_sinks:
        at.top[:, :rows] = at.sinks[0]
    else:
        at.top[:, :rows] = jnp.full((form.kv_heads, rows, LANES), NEG_INF)
    at.total[:, :rows] = jnp.full((form.kv_heads, rows, LANES), 1.0 / LANES if form.with_sinks else 0.0)
    at.acc[:, :rows] = jnp.zeros((form.kv_heads, rows, form.head_dim))


def _begin_many(form: Form, block: Blocks, at: Refs, half) -> None:
    size = block.queries
    at.wide[...] = at.q_buf[half].astype(jnp.float32)
    for head in range(form.kv_heads):
        for g in range(form.group):
            rows = slice(g * size, (g + 1) * size)
            at.rows[head, rows] = at.wide[:, head * form.group + g].astype(at.rows.dtype)
            if form.with_sinks:
                at.top[head, rows] = jnp.broadcast_to(at.sinks[0, head, g : g + 1], (size, LANES))
    rows = slice(0, size * form.group)
    if not form.with_sinks:
        at.top[:, rows] = jnp.full((form.kv_heads, rows.stop, LANES), NEG_INF)
    at.total[:, rows] = jnp.full((form.kv_heads, rows.stop, LANES), 1.0 / LANES if form.with_sinks else 0.0)
    at.acc[:, rows] = jnp.zeros((form.kv_heads, rows.stop, form.head_dim))


def _clear_values(form: Form, block: Blocks, at: Refs, slot, end) -> None:
    """Zeros for the values after the last key: nobody wrote them, and zero times nan is nan."""
    for i in range(block.pages):
        rows = slice(i * form.page_size, (i + 1) * form.page_size)

        @pl.when(rows.stop > end)
        def _(rows=rows):
            row = rows.start + lax.broadcasted_iota(jnp.int32, (form.page_size, form.head_dim), 0)
            for head in range(form.kv_heads):
                x = at.kv_buf[slot, head, 1, rows].astype(jnp.float32)
                at.kv_buf[slot, head, 1, rows] = jnp.where(row < end, x, 0.0).astype(at.kv_buf.dtype)


def _few(form: Form, block: Blocks, at: Refs, slot, head, item: Item, base) -> None:
    """The only token of an item against a block of keys."""
    keys, rows = block.pages * form.page_size, slice(0, form.few_rows)
    column = lax.broadcasted_iota(jnp.int32, (form.few_rows, keys), 1)
    seen = column < item.end - base
    if form.window is not None:
        seen &= column > item.position - base - form.window
    q = at.few[head].astype(form.compute_dtype)
    _update(form, at, slot, head, q, rows, slice(0, keys), seen)


def _all_seen(form: Form, block: Blocks, item: Item, base):
    """Whether each of an item's tokens sees every key of the block that begins at `base`."""
    last = base + block.pages * form.page_size - 1
    whole = last <= item.position if form.causal else last < item.end
    if form.window is not None:
        whole &= base > item.position + block.queries - 1 - form.window
    return whole


def _every_head(form: Form, run: Callable[[Any], None]) -> None:
    """Some heads at a time, so that the products of one overlap with the softmax of another."""
    some = max(size for size in range(1, HEADS_AT_ONCE + 1) if form.kv_heads % size == 0)

    def heads(i, _):
        for head in range(some):
            run(i * some + head)

    lax.fori_loop(0, form.kv_heads // some, heads, None)


def _many(form: Form, block: Blocks, at: Refs, slot, head, item: Item, base, *, masked: bool) -> None:
    """The tokens of an item, of a prompt, against a block of keys."""
    size, rows = block.queries, slice(0, block.queries * form.group)
    shape = (rows.stop, block.keys)
    token = lax.broadcasted_iota(jnp.int32, shape, 0) & (size - 1)
    ahead = lax.broadcasted_iota(jnp.int32, shape, 1) - token
    q = at.rows[head]
    for start in range(0, block.pages * form.page_size, block.keys):
        seen = None
        if masked and form.causal:
            here = item.position - base - start
            seen = ahead <= here
            if form.window is not None:
                seen &= ahead > here - form.window
        elif masked:
            seen = lax.broadcasted_iota(jnp.int32, shape, 1) < item.end - base - start
        _update(form, at, slot, head, q, rows, slice(start, start + block.keys), seen)


def _update(form: Form, at: Refs, slot, head, q, rows: slice, keys: slice, seen) -> None:
    """One step of the running softmax of a head's rows."""
    compute = jnp.dtype(form.compute_dtype)
    precision = lax.Precision.HIGHEST if compute == jnp.float32 else None
    k = at.kv_buf[slot, head, 0, keys].astype(compute)
    v = at.kv_buf[slot, head, 1, keys].astype(compute)
    dims = (((1,), (1,)), ((), ()))
    s = lax.dot_general(q, k, dims, precision=precision, preferred_element_type=jnp.float32)
    if form.softcap is None:
        s = s * (form.scale * LOG2_E)
    else:
        s = jnp.tanh(s * (form.scale / form.softcap)) * (form.softcap * LOG2_E)
    if seen is not None:
        s = jnp.where(seen, s, NEG_INF)
    before = at.top[head, rows]
    top = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
    p = jnp.exp2(s - _across(top, s.shape[1]))
    fade = jnp.exp2(before - top)
    at.top[head, rows] = top
    at.total[head, rows] = at.total[head, rows] * fade + _fold(p)
    dims = (((1,), (0,)), ((), ()))
    add = lax.dot_general(p.astype(compute), v, dims, precision=precision, preferred_element_type=jnp.float32)
    at.acc[head, rows] = at.acc[head, rows] * _across(fade, form.head_dim) + add


def _across(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal lanes -> [rows, width]."""
    if width % LANES:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], width))
    return jnp.tile(x, (1, width // LANES))


def _fold(p: jax.Array) -> jax.Array:
    """Sums over lanes as far as they need no exchange between lanes: [rows, S] -> [rows, LANES]."""
    if p.shape[1] % LANES:
        return jnp.broadcast_to(jnp.sum(p, axis=1, keepdims=True) / LANES, (p.shape[0], LANES))
    parts = [p[:, i : i + LANES] for i in range(0, p.shape[1], LANES)]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]


def _result(form: Form, at: Refs, head, rows: slice):
    """(out, log-sum-exp on all lanes) of a head's rows."""
    total = jnp.sum(at.total[head, rows], axis=1, keepdims=True)
    out = at.acc[head, rows] * (1 / total)
    return out, (at.top[head, rows] + jnp.log2(total)) / LOG2_E


def _finish_few(form: Form, at: Refs) -> None:
    for head in range(form.kv_heads):
        out, lse = _result(form, at, head, slice(0, form.few_rows))
        of_head = slice(head * form.group, (head + 1) * form.group)
        at.wide[0, of_head] = out[: form.group]
        if form.with_lse:
            at.lse_buf[0, of_head] = lse[: form.group]
    at.out_buf[:1] = at.wide[:1].astype(at.out_buf.dtype)


def _finish_many(form: Form, block: Blocks, at: Refs) -> None:
    for head in range(form.kv_heads):
        for g in range(form.group):
            out, lse = _result(form, at, head, slice(g * block.queries, (g + 1) * block.queries))
            at.wide[:, head * form.group + g] = out
            if form.with_lse:
                at.lse_buf[:, head * form.group + g] = lse
    at.out_buf[...] = at.wide[...].astype(at.out_buf.dtype)
