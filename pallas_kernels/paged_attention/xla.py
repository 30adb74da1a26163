"""Paged attention in plain XLA, for any platform: a running softmax over blocks of pages.

The new tokens are cut into items, a few tokens of one sequence each, so that a page is gathered once for all of an
item's tokens; an item of a batch that only decodes is a single token. Memory is linear in the tokens, and the loop
ends with the longest sequence, not with the widest table.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import dispatch
from pallas_kernels.paged_attention.reference import NEG_INF, KVPages, locate, merge, write

# Keys of a step of the running softmax. Few, since what a short sequence does not need is gathered all the same; and as
# many for single tokens as for prompts, so that a token is summed in the same parts in either.
BLOCK_KEYS = 128
MAX_ITEM = 64  # tokens
# Items that a CPU computes at once: a group without any item costs nothing, and each ends with its own longest sequence.
GROUP = {False: 4, True: 2}

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def paged_attention(
    q, k_new, v_new, pages, block_tables, lengths, starts, num_sequences, *, prefix, window, softcap, sinks, scale
):
    """See `api.paged_attention`."""
    num_tokens, num_rows = q.shape[0], lengths.shape[0]
    pages = write(k_new, v_new, pages, block_tables, locate(num_tokens, lengths, starts, num_sequences))
    attend = functools.partial(_attend, scale=scale, softcap=softcap, window=window)
    counts = jnp.where(jnp.arange(num_rows) < num_sequences, starts[1:] - starts[:-1], 0)
    out, lse = attend(q, pages, block_tables, lengths, starts, counts, causal=True, sinks=sinks)
    if prefix is not None:
        table, length = prefix
        total = jnp.sum(counts)[None]
        begin = jnp.zeros(2, jnp.int32)
        shared = attend(q, pages, table[None], length[None], begin, total, causal=False, sinks=None)
        out = merge(out, lse, *shared)
    return out.astype(q.dtype), pages


def _attend(q, pages: KVPages, block_tables, lengths, starts, counts, *, causal, window, softcap, sinks, scale):
    """(out [M, N, H], log-sum-exp [M, N]) in float32 of counts[r] tokens a sequence; zeros for other tokens."""
    num_tokens, num_heads, head_dim = q.shape
    size = _item_size(num_tokens, lengths.shape[0])
    *items, num_items = _items(num_tokens, size, starts, counts)
    together = GROUP[size > 1] if dispatch.current_chip().platform == "cpu" else len(items[0])
    items = [jnp.pad(x, (0, -len(x) % together), mode="edge") for x in items]
    options = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks, "scale": scale}

    def group(at, found):
        part = [lax.dynamic_slice_in_dim(x, at * together, together) for x in items]
        new = _attend_items(q, pages, block_tables, lengths, starts, counts, size, *part, **options)
        return [lax.dynamic_update_slice_in_dim(x, y, at * together, 0) for x, y in zip(found, new, strict=True)]

    shape = (len(items[0]), size, num_heads)
    found = [jnp.zeros((*shape, head_dim), jnp.float32), jnp.full(shape, NEG_INF)]
    out, lse = lax.fori_loop(0, -(-num_items // together), group, found)
    _, first, taken = items
    token = first[:, None] + jnp.arange(size)
    real = (token < (first + taken)[:, None]) & (jnp.arange(len(first)) < num_items)[:, None]
    where = jnp.where(real, token, num_tokens).reshape(-1)  # past the end: dropped
    zeros = jnp.zeros((num_tokens, num_heads, head_dim), jnp.float32)
    none = jnp.full((num_tokens, num_heads), NEG_INF)
    return (
        zeros.at[where].set(out.reshape(-1, num_heads, head_dim), mode="drop"),
        none.at[where].set(lse.reshape(-1, num_heads), mode="drop"),
    )


def _attend_items(
    q,
    pages,
    block_tables,
    lengths,
    starts,
    counts,
    size,
    sequence,
    first,
    taken,
    *,
    causal,
    window,
    softcap,
    sinks,
    scale,
):
    """(out [I, size, N, H], log-sum-exp [I, size, N]) of items as `_items` gives them."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.data.shape[1], pages.data.shape[3]
    token = first[:, None] + jnp.arange(size)  # [I, size]
    real = token < (first + taken)[:, None]
    items = q[jnp.minimum(token, num_tokens - 1)].reshape(-1, size, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q_IKGTH = items.transpose(0, 2, 3, 1, 4)
    q_position = (lengths - starts[:-1] - counts)[sequence][:, None] + token  # [I, size]
    end = jnp.where(taken > 0, jnp.max(jnp.where(real, q_position, -1), axis=1) + 1, 0)
    end = end if causal else jnp.where(taken > 0, lengths[sequence], 0)
    begin = jnp.zeros_like(end) if window is None else jnp.maximum(q_position[:, 0] - window + 1, 0) // page_size
    num_pages = min(-(-BLOCK_KEYS // page_size), block_tables.shape[1])
    page_ends = -(-end // page_size)
    num_steps = jnp.max(-(-(page_ends - begin) // num_pages), initial=0)
    state = _initial(q_IKGTH, sinks)

    def step(at, state):
        column = begin[:, None] + at * num_pages + jnp.arange(num_pages)  # [I, C]
        table = block_tables[sequence[:, None], jnp.minimum(column, block_tables.shape[1] - 1)]
        key = begin[:, None] * page_size + at * num_pages * page_size + jnp.arange(num_pages * page_size)  # [I, S]
        live = key < end[:, None]
        seen = real[:, :, None] & live[:, None]
        distance = q_position[:, :, None] - key[:, None]
        if causal:
            seen &= distance >= 0
        if window is not None:
            seen &= distance < window
        k, v = (_gather(pages, table, kv, q.dtype) for kv in range(2))
        return _update(state, q_IKGTH, k, v, seen, live, pages.scales, softcap, scale)

    out, lse = _finish(lax.fori_loop(0, num_steps, step, state), pages.scales)
    shape = (len(first), size, num_heads)
    return out.transpose(0, 3, 1, 2, 4).reshape(*shape, head_dim), lse.transpose(0, 3, 1, 2).reshape(shape)


def _item_size(num_tokens: int, num_rows: int) -> int:
    """A power of two near the mean number of tokens a sequence."""
    size = 1
    while size < MAX_ITEM and 2 * size * num_rows <= num_tokens:
        size *= 2
    return size


def _items(num_tokens: int, size: int, starts, counts) -> tuple[Array, Array, Array, Array]:
    """Of each item its sequence, its first token and how many it has, none past the last; the number of items."""
    num_rows = counts.shape[0]
    number = min(num_tokens, num_tokens // size + num_rows)
    ends = jnp.cumsum(-(-counts // size))
    item = jnp.arange(number, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.sum(item[:, None] >= ends, axis=1), num_rows - 1)
    within = (item - (ends - -(-counts // size))[sequence]) * size
    taken = jnp.where(item < ends[-1], jnp.clip(counts[sequence] - within, 0, size), 0)
    return sequence, jnp.where(taken > 0, starts[sequence] + within, num_tokens), taken, ends[-1]


def _gather(pages: KVPages, table, kv: int, dtype) -> Array:
    """Keys (kv = 0) or values of the pages [I, C] of each head, joined: [I, K, C * page_size, H]."""
    heads = jnp.arange(pages.data.shape[1])
    found = pages.data[table[:, None, :], heads[None, :, None], kv]  # [I, K, C, page_size, H]
    found = found.reshape(*found.shape[:2], -1, found.shape[4])
    return found.astype(dtype if pages.scales is not None else pages.data.dtype)


def _initial(q_IKGTH, sinks):
    shape = q_IKGTH.shape[:-1]
    acc = jnp.zeros(q_IKGTH.shape, jnp.float32)
    if sinks is None:
        return jnp.full(shape, NEG_INF), jnp.zeros(shape), acc
    top = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(shape[1], shape[2], 1), shape)
    return top, jnp.ones(shape), acc


def _update(state, q, k, v, seen, live, scales, softcap, scale):
    """One step of the running softmax.

    q [I, K, G, T, H]; k, v [I, K, S, H]; seen [I, T, S] pairs; keys outside live [I, S] may hold anything.
    """
    top, total, acc = state
    rows = q.reshape(*q.shape[:2], -1, q.shape[4])
    if rows.shape[2] == 1:  # a CPU sums a product with one row in another order: the bits would depend on the batch
        rows = jnp.broadcast_to(rows, (*rows.shape[:2], 2, rows.shape[3]))
    scores = product("ikrh,iksh->ikrs", rows.astype(k.dtype), k) * scale
    if scales is not None:
        scores = scores * scales[:, 0, None, None]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores[:, :, : q.shape[2] * q.shape[3]].reshape(*q.shape[:4], -1)  # [I, K, G, T, S]
    seen = seen[:, None, None]
    scores = jnp.where(seen, scores, NEG_INF)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    p = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
    fade = jnp.exp(top - new_top)
    v = jnp.where(live[:, None, :, None], v, 0)
    weights = p.reshape(*q.shape[:2], -1, p.shape[-1]).astype(v.dtype)
    weights = jnp.broadcast_to(weights, (*rows.shape[:3], weights.shape[3]))
    add = product("ikrs,iksh->ikrh", weights, v)[:, :, : q.shape[2] * q.shape[3]].reshape(acc.shape)
    return new_top, total * fade + jnp.sum(p, axis=-1), acc * fade[..., None] + add


def _finish(state, scales):
    top, total, acc = state
    if scales is not None:
        acc = acc * scales[:, 1, None, None, None]
    one = jnp.where(total == 0, 1.0, total)
    return acc / one[..., None], jnp.where(total == 0, NEG_INF, top + jnp.log(one))
