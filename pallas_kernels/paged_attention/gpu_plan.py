"""Who computes what in paged attention on a GPU: items, and equal shares of all keys for the programs of a grid.

An item is up to `tokens` new tokens of one sequence. Its keys are cut into blocks, and the blocks of all (item, kv
head) pairs stand in one line, which is cut into as many equal pieces as there are programs: whatever the lengths are,
one long sequence or many short ones, every multiprocessor reads as much. A pair that a cut goes through is computed in
parts, which are merged by their log-sum-exp. All of it is found at run time, and nothing here is larger than the batch.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

MAX_ROWS = 64  # of a wgmma: (token, query head) pairs of an item and a kv head
MIN_ROWS = 8  # of a tile in shared memory
MOST_PARTS = 34  # of a pair, since merging costs for each. With 4 kv heads or more one sequence still fills the chip


class Form(NamedTuple):
    """What a kernel is specialised to."""

    num_items: int  # at most
    rows: int  # kept of an item, of the 64 that are computed
    tokens: int  # of an item, at most
    group: int  # query heads of a kv head
    kv_heads: int
    head_dim: int
    page_size: int
    keys: int  # of a block
    programs: int
    causal: bool
    window: int | None

    @property
    def piece(self) -> int:
        """Keys of one copy: a page, or what of it belongs to a block."""
        return min(self.page_size, self.keys)

    @property
    def num_units(self) -> int:
        """Parts of pairs, at most. Pair + program numbers them: along the line one of the two grows with each part."""
        return self.num_items * self.kv_heads + self.programs

    @property
    def most_parts(self) -> int:
        """Of one pair: it is no longer than a kv head's part of the line."""
        return min(self.programs, MOST_PARTS, -(-self.programs // self.kv_heads) + 1)


class Items(NamedTuple):
    """Of each item [I]. Blocks are counted from `first`, the first key that is read; keys from `end` on are not seen."""

    sequence: Array
    position: Array  # of its first token in the sequence; of all keys or later where a token sees them all
    first: Array
    end: Array
    blocks: Array  # 0 for an item that is not in use
    before: Array  # blocks of all items before it


class Pairs(NamedTuple):
    """Each program has a part in the pairs first <= n < end."""

    first: Array
    end: Array


class Plan(NamedTuple):
    items: Items
    token: Array  # first of each item [I]
    taken: Array  # tokens of each item [I]
    first_item: Array  # of each sequence [R]
    share: Array  # blocks of a program, []
    pairs: Pairs  # of each program


def item_shape(num_tokens: int, num_sequences: int, group: int) -> tuple[int, int]:
    """(rows, tokens) of an item: few where the batch has room for one token a sequence only."""
    rows = MAX_ROWS
    if num_tokens <= num_sequences:
        while rows // 2 >= max(group, MIN_ROWS):
            rows //= 2
    return rows, rows // group


def most_items(num_tokens: int, num_sequences: int, tokens: int) -> int:
    return min(num_tokens, num_tokens // tokens + num_sequences)


def plan(form: Form, lengths: Array, starts: Array, num_sequences: Array) -> Plan:
    num_rows = lengths.shape[0]
    counts = jnp.where(jnp.arange(num_rows) < num_sequences, starts[1:] - starts[:-1], 0)
    number = -(-counts // form.tokens)
    item_ends = _running_sum(number)
    item = jnp.arange(form.num_items, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.sum(item[:, None] >= item_ends, axis=1, dtype=jnp.int32), num_rows - 1)
    first_item = item_ends - number
    within = (item - first_item[sequence]) * form.tokens
    taken = jnp.where(item < item_ends[-1], jnp.clip(counts[sequence] - within, 0, form.tokens), 0)
    position = (lengths - counts)[sequence] + within
    end = position + taken if form.causal else lengths[sequence]
    begin = jnp.zeros_like(end) if form.window is None else jnp.maximum(position - form.window + 1, 0)
    first = begin // form.piece * form.piece
    number_of_blocks = jnp.where(taken > 0, -(-(end - first) // form.keys), 0)
    block_ends = _running_sum(number_of_blocks)
    position = position if form.causal else end
    items = Items(sequence, position, first, end, number_of_blocks, block_ends - number_of_blocks)

    total = block_ends[-1] * form.kv_heads
    share = jnp.maximum(-(-total // form.programs), 1)
    if form.most_parts == MOST_PARTS:
        share = jnp.maximum(share, -(-jnp.max(number_of_blocks) // (MOST_PARTS - 1)))
    begins = jnp.arange(form.programs, dtype=jnp.int32) * share
    low, high = (_pair_of(form, items, block_ends, at) for at in (begins, jnp.minimum(begins + share, total) - 1))
    pairs = Pairs(low, jnp.where(begins < total, high + 1, low))
    return Plan(items, starts[sequence] + within, taken, first_item, share, pairs)


def _running_sum(x: Array) -> Array:
    """As jnp.cumsum, in one pass of a GPU: x is short."""
    index = jnp.arange(x.shape[0])
    return jnp.sum(jnp.where(index[:, None] >= index, x, 0), axis=1, dtype=jnp.int32)


def _pair_of(form: Form, items: Items, block_ends: Array, at: Array) -> Array:
    """The (item, kv head) pair that each place of the line belongs to."""
    item = jnp.sum(at[:, None] >= block_ends * form.kv_heads, axis=1, dtype=jnp.int32)
    item = jnp.minimum(item, form.num_items - 1)
    inside = at - items.before[item] * form.kv_heads
    head = inside // jnp.maximum(items.blocks[item], 1)
    return item * form.kv_heads + jnp.clip(head, 0, form.kv_heads - 1)


class Parts(NamedTuple):
    """The units of each pair, as numbers first <= u < first + number."""

    first: Array  # [I, K]
    number: Array  # [I, K]


def parts(form: Form, made: Plan) -> Parts:
    items = made.items
    head = jnp.arange(form.kv_heads, dtype=jnp.int32)
    begin = items.before[:, None] * form.kv_heads + head * items.blocks[:, None]
    program = begin // made.share
    last = (begin + items.blocks[:, None] - 1) // made.share
    pair = jnp.arange(form.num_items, dtype=jnp.int32)[:, None] * form.kv_heads + head
    return Parts(pair + program, jnp.where(items.blocks[:, None] > 0, last - program + 1, 0))
