"""Paged attention in plain XLA, for any platform: a running softmax over blocks of keys.

Sequences with one new token and those with more go different ways, since what costs time differs. For single tokens it
is the number of steps, so (token, block of keys) pairs of all sequences fill each step alike, however long each sequence
is. The tokens of prompts are cut into items, so that a block is gathered once for all of an item's tokens. Memory is
linear in the tokens, and the work follows the lengths, not the widest table.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import dispatch
from pallas_kernels.paged_attention.reference import NEG_INF, KVPages, locate, merge, values, write

BLOCK_KEYS = 128  # keys of a pair, and of a step of an item
NUM_PAIRS = (4, 16)  # that a CPU computes at once, of few tokens and of many; what is not needed is gathered too
SMALL = 8  # tokens; a batch of no more is taken as single tokens only
MAX_ITEM = 128  # tokens
TOGETHER = 64  # tokens of the items that a CPU computes at once; each group ends with its longest sequence

LEAST = NEG_INF / 2  # a top from which even exp(NEG_INF - top) is 0, so that masked scores need no second mask

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Options(NamedTuple):
    """causal: a token sees keys up to its own place; otherwise all of its sequence."""

    causal: bool
    window: int | None
    softcap: float | None
    sinks: Any
    scale: float


class Rows(NamedTuple):
    """Sequences: where their pages and new tokens are; counts: how many new tokens each has [R]."""

    tables: Array
    lengths: Array
    starts: Array
    counts: Array


def paged_attention(
    q, k_new, v_new, pages, block_tables, lengths, starts, num_sequences, *, prefix, window, softcap, sinks, scale
):
    """See `api.paged_attention`."""
    num_tokens, num_rows = q.shape[0], lengths.shape[0]
    pages = write(k_new, v_new, pages, block_tables, locate(num_tokens, lengths, starts, num_sequences))
    counts = jnp.where(jnp.arange(num_rows) < num_sequences, starts[1:] - starts[:-1], 0)
    own = Options(True, window, softcap, sinks, scale)
    out, lse = _attend(q, pages, Rows(block_tables, lengths, starts, counts), own)
    if prefix is not None:
        table, length = prefix
        all_tokens = Rows(table[None], length[None], jnp.zeros(2, jnp.int32), jnp.sum(counts)[None])
        out = merge(out, lse, *_attend(q, pages, all_tokens, own._replace(causal=False, sinks=None)))
    return out.astype(q.dtype), pages


def _attend(q, pages: KVPages, rows: Rows, options: Options):
    """(out [M, N, H], log-sum-exp [M, N]) in float32 of counts[r] tokens a sequence; zeros for other tokens."""
    num_tokens, num_heads, head_dim = q.shape
    found = jnp.zeros((num_tokens, num_heads, head_dim), jnp.float32), jnp.full((num_tokens, num_heads), NEG_INF)
    size = _item_size(num_tokens)
    if size == 1:
        return _attend_tokens(found, q, pages, rows, num_tokens, options)
    single = rows.counts == 1
    singles, chunks = (rows._replace(counts=jnp.where(single == wanted, rows.counts, 0)) for wanted in (True, False))
    found = _attend_chunks(found, q, pages, chunks, size, options)
    return _attend_tokens(found, q, pages, singles, min(num_tokens, len(rows.counts)), options)


def _item_size(num_tokens: int) -> int:
    """A power of two, near a quarter of the batch."""
    size = 1
    while num_tokens > SMALL and size < MAX_ITEM and 8 * size <= num_tokens:
        size *= 2
    return size


def _items(num_tokens: int, number: int, size: int, starts, counts) -> tuple[Array, Array, Array, Array]:
    """Of each of at most `number` items its sequence, its first token, how many it has; and how many items there are."""
    num_rows = counts.shape[0]
    ends = jnp.cumsum(-(-counts // size))
    item = jnp.arange(number, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.sum(item[:, None] >= ends, axis=1), num_rows - 1)
    within = (item - (ends - -(-counts // size))[sequence]) * size
    taken = jnp.where(item < ends[-1], jnp.clip(counts[sequence] - within, 0, size), 0)
    return sequence, jnp.where(taken > 0, starts[sequence] + within, num_tokens), taken, ends[-1]


# Single tokens.


def _attend_tokens(found, q, pages: KVPages, rows: Rows, most: int, options: Options):
    """`found` with at most `most` tokens in it, each an item of its own."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.data.shape[1], pages.data.shape[3]
    sequence, token, taken, _ = _items(num_tokens, most, 1, rows.starts, rows.counts)
    position = (rows.lengths - rows.starts[:-1] - rows.counts)[sequence] + token
    end = jnp.where(taken > 0, position + 1 if options.causal else rows.lengths[sequence], 0)
    begin = jnp.zeros_like(end) if options.window is None else jnp.maximum(position - options.window + 1, 0)
    width = min(-(-BLOCK_KEYS // page_size), rows.tables.shape[1])
    item, key, table, num_pairs = _pairs(
        rows.tables[sequence], begin // page_size, -(-end // page_size), width, page_size
    )
    on_cpu = dispatch.current_chip().platform == "cpu"
    together = NUM_PAIRS[len(token) > SMALL] if on_cpu else len(token)
    pad = -len(item) % together
    item, key, table = (jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)) for x in (item, key, table))
    groups = num_heads // num_kv_heads

    def step(at, state):
        i, first, part = (lax.dynamic_slice_in_dim(x, at * together, together) for x in (item, key, table))
        keys = first[:, None] + jnp.arange(width * page_size)
        real = (at * together + jnp.arange(together) < num_pairs)[:, None]
        live = (keys < end[i][:, None]) & (keys >= begin[i][:, None]) & real  # [P, S]
        mine = q[jnp.minimum(token, num_tokens - 1)[i]].reshape(together, num_kv_heads, groups, 1, head_dim)
        k, v = _gather(pages, part, live, q.dtype)
        new = _softmax(mine, k, v, live[:, None], options)
        return _add_pairs(state, i, real, *(x.reshape(together, num_heads, *x.shape[4:]) for x in new))

    state = _initial((len(token), num_heads), head_dim, options.sinks)
    top, total, acc = lax.fori_loop(0, -(-num_pairs // together), step, state)
    out, lse = _finish(top, total, acc)
    return _placed(found, jnp.where(taken > 0, token, num_tokens), out, lse)


def _pairs(tables, begin, end, width: int, page_size: int) -> tuple[Array, Array, Array, Array]:
    """Blocks of `width` pages from page begin [I] to end [I] of each item, item after item.

    Returns of each pair its item, its first key and its pages [P, width]; and the number of pairs.
    """
    num_items, columns = tables.shape
    blocks = -(-jnp.maximum(end - begin, 0) // width)
    ends = jnp.cumsum(blocks)
    pair = jnp.arange(num_items * -(-columns // width), dtype=jnp.int32)
    item = jnp.minimum(jnp.sum(pair[:, None] >= ends, axis=1), num_items - 1)
    page = begin[item] + (pair - (ends - blocks)[item]) * width
    column = jnp.clip(page[:, None] + jnp.arange(width), 0, columns - 1)
    return item, page * page_size, tables[item[:, None], column], ends[-1]


def _add_pairs(state, item, real, top, total, acc):
    """The running softmax of items [I, N], with pairs [P, N] of any of them added."""
    old_top, old_total, old_acc = state
    own = ((jnp.arange(len(old_top))[:, None] == item) & real.T)[..., None]  # [I, P, 1]
    new_top = jnp.maximum(old_top, jnp.max(jnp.where(own, top, NEG_INF), axis=1))
    fade = jnp.exp(old_top - new_top)
    weight = jnp.where(own, jnp.exp(top - new_top[:, None]), 0)  # [I, P, N]
    new_total = old_total * fade + jnp.sum(weight * total, axis=1)
    return new_top, new_total, old_acc * fade[..., None] + product("ipn,pnh->inh", weight, acc)


# Chunks of prompts.


def _attend_chunks(found, q, pages: KVPages, rows: Rows, size: int, options: Options):
    """`found` with the tokens of `rows` in it, in items of up to `size` tokens of one sequence."""
    num_tokens, num_heads, head_dim = q.shape
    most = num_tokens // size + len(rows.counts)
    *items, num_items = _items(num_tokens, most, size, rows.starts, rows.counts)
    together = max(1, TOGETHER // size) if dispatch.current_chip().platform == "cpu" else most
    items = [jnp.pad(x, (0, -most % together), mode="edge") for x in items]

    def group(at, found):
        sequence, first, taken = (lax.dynamic_slice_in_dim(x, at * together, together) for x in items)
        out, lse = _attend_items(q, pages, rows, size, sequence, first, taken, options)
        token = first[:, None] + jnp.arange(size)
        real = (token < (first + taken)[:, None]) & (at * together + jnp.arange(together) < num_items)[:, None]
        where = jnp.where(real, token, num_tokens).reshape(-1)
        return _placed(found, where, out.reshape(-1, num_heads, head_dim), lse.reshape(-1, num_heads))

    return lax.fori_loop(0, -(-num_items // together), group, found)


def _attend_items(q, pages: KVPages, rows: Rows, size: int, sequence, first, taken, options: Options):
    """(out [I, size, N, H], log-sum-exp [I, size, N]) of items as `_items` gives them."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.data.shape[1], pages.data.shape[3]
    token = first[:, None] + jnp.arange(size)  # [I, size]
    real = token < (first + taken)[:, None]
    items = q[jnp.minimum(token, num_tokens - 1)].reshape(-1, size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q_IKGTH = items.transpose(0, 2, 3, 1, 4)
    q_position = (rows.lengths - rows.starts[:-1] - rows.counts)[sequence][:, None] + token  # [I, size]
    end = jnp.where(taken > 0, jnp.max(jnp.where(real, q_position, -1), axis=1) + 1, 0)
    end = end if options.causal else jnp.where(taken > 0, rows.lengths[sequence], 0)
    window = options.window
    begin = jnp.zeros_like(end) if window is None else jnp.maximum(q_position[:, 0] - window + 1, 0) // page_size
    num_pages = min(-(-BLOCK_KEYS // page_size), rows.tables.shape[1])
    num_steps = jnp.max(-(-(-(-end // page_size) - begin) // num_pages), initial=0)

    def step(at, state):
        column = begin[:, None] + at * num_pages + jnp.arange(num_pages)  # [I, C]
        table = rows.tables[sequence[:, None], jnp.minimum(column, rows.tables.shape[1] - 1)]
        key = begin[:, None] * page_size + at * num_pages * page_size + jnp.arange(num_pages * page_size)  # [I, S]
        live = key < end[:, None]
        seen = real[:, :, None] & live[:, None]
        distance = q_position[:, :, None] - key[:, None]
        if options.causal:
            seen &= distance >= 0
        if window is not None:
            seen &= distance < window
        k, v = _gather(pages, table, live, q.dtype)
        top, total, acc = state
        new_top, new_total, add = _softmax(q_IKGTH, k, v, seen, options, top)
        fade = jnp.exp(top - new_top)
        return new_top, total * fade + new_total, acc * fade[..., None] + add

    state = _initial(q_IKGTH.shape[:-1], head_dim, options.sinks)
    top, total, acc = lax.fori_loop(0, num_steps, step, state)
    out, lse = _finish(top, total, acc)
    shape = (len(first), size, num_heads)
    return out.transpose(0, 3, 1, 2, 4).reshape(*shape, head_dim), lse.transpose(0, 3, 1, 2).reshape(shape)


# Both.


def _placed(found, where, out, lse):
    """Results [I, ...] put where [I] they belong, the number of tokens for nowhere."""
    return found[0].at[where].set(out, mode="drop"), found[1].at[where].set(lse, mode="drop")


def _gather(pages: KVPages, table, live, dtype) -> tuple[Array, Array]:
    """Keys and values of the pages [I, C] of each head, joined: [I, K, C * page_size, H] each.

    Outside live [I, S] they are zero: values have to be, and with keys too XLA's loop on a CPU takes half the time.
    """
    heads = jnp.arange(pages.data.shape[1])
    k, v = (pages.data[table[:, None, :], heads[None, :, None], kv] for kv in range(2))  # [I, K, C, page_size, H]
    k, v = (x.reshape(*x.shape[:2], -1, x.shape[4]) for x in (k, v))
    k, v = (jnp.where(live[:, None, :, None], x, jnp.zeros((), v.dtype)) for x in (k, v))
    k, v = values(k), values(v)
    return (k.astype(dtype), v.astype(dtype)) if pages.data.dtype.itemsize == 1 else (k, v)


def _initial(shape: tuple[int, ...], head_dim: int, sinks):
    """(top, total, acc) before any key. shape: of the rows; their heads are [N] or [K, G] from dimension 1 on."""
    acc = jnp.zeros((*shape, head_dim), jnp.float32)
    if sinks is None:
        return jnp.full(shape, NEG_INF), jnp.zeros(shape), acc
    heads = shape[1:] if len(shape) == 2 else (*shape[1:3], 1)
    return jnp.broadcast_to(sinks.astype(jnp.float32).reshape(heads), shape), jnp.ones(shape), acc


def _softmax(q, k, v, seen, options: Options, top=None):
    """(top, total, acc): the largest score, or `top` if that is larger, and sums of exp(score - top) over the keys.

    q [I, K, G, T, H]; k, v [I, K, S, H]; seen [I, T, S] pairs, of which v is zero where no query sees it.
    """
    rows = q.reshape(*q.shape[:2], -1, q.shape[4])
    num_rows = rows.shape[2]
    if num_rows == 1:  # a CPU sums a product with one row in another order: the bits would depend on the batch
        rows = jnp.broadcast_to(rows, (*rows.shape[:2], 2, rows.shape[3]))
    scores = product("ikrh,iksh->ikrs", rows.astype(k.dtype), k) * options.scale
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    scores = scores[:, :, :num_rows].reshape(*q.shape[:4], -1)  # [I, K, G, T, S]
    scores = jnp.where(seen[:, None, None], scores, NEG_INF)
    new_top = jnp.max(scores, axis=-1, initial=LEAST)
    new_top = new_top if top is None else jnp.maximum(top, new_top)
    p = jnp.exp(scores - new_top[..., None]).astype(v.dtype)
    weights = p.reshape(*q.shape[:2], num_rows, -1)
    weights = jnp.broadcast_to(weights, (*rows.shape[:3], weights.shape[3]))
    acc = product("ikrs,iksh->ikrh", weights, v)[:, :, :num_rows].reshape(q.shape)
    return new_top, jnp.sum(p, axis=-1, dtype=jnp.float32), acc


def _finish(top, total, acc):
    """(out, log-sum-exp)."""
    one = jnp.where(total == 0, 1.0, total)
    return acc / one[..., None], jnp.where(total == 0, NEG_INF, top + jnp.log(one))
