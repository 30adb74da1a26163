"""The programs of a server: one pass over a flat batch of new tokens, and the drawing of the next ones.

There is one pair for each token bucket: a step with fewer tokens is filled up. All integers that the host sends
travel in one array, since each array costs a transfer of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.compiler.program import Program
from llmos_jax.config import ModelConfig, ServeConfig
from llmos_jax.models.attention import Ragged
from llmos_jax.models.cache import Cache
from llmos_jax.models.decoder import bind
from llmos_jax.models.layers import Adapters
from llmos_jax.serve import sampling
from llmos_jax.serve.cache import Pool
from llmos_jax.sharding import replicated, sharding

SMALLEST = 8  # rows, and tokens but for a CPU's one: a TPU pads to as many
NUM_TOP = 20  # likeliest tokens that a program with log-probabilities reports


class Shape(NamedTuple):
    """Of one forward program: new tokens, rows that get logits, sequences, pages of a block table."""

    tokens: int
    rows: int
    sequences: int
    table: int

    @property
    def num_integers(self) -> int:
        return 3 * self.tokens + self.rows + 2 * self.sequences + 2 + self.sequences * self.table


class Integers(NamedTuple):
    """What the host says about a step.

    tokens [M]: ids, or -1 - slot for the token that the step before drew into that slot. positions [M].
    adapter [M]: which adapter slot a token uses, -1 for none. rows [Q]: the tokens that get logits.
    lengths [R], starts [R+1], num_sequences [], block_tables [R, C]: as `paged_attention` has them.
    """

    tokens: Any
    positions: Any
    adapter: Any
    rows: Any
    lengths: Any
    starts: Any
    num_sequences: Any
    block_tables: Any


def split(shape: Shape, flat: Any) -> Integers:
    """Views of the parts of one array of integers, numpy's or jax's."""
    m, q, r, c = shape
    sizes = (m, m, m, q, r, r + 1, 1, r * c)
    ends = np.cumsum(sizes)
    parts = [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    tokens, positions, adapter, rows, lengths, starts, number, tables = parts
    count = number if isinstance(flat, np.ndarray) else number[0]
    return Integers(tokens, positions, adapter, rows, lengths, starts, count, tables.reshape(r, c))


def shapes(model: ModelConfig, serve: ServeConfig, platform: str) -> list[Shape]:
    """Token buckets: a step is filled up to one.

    On a CPU each token takes its time, so they double, after the one token of a single answer. Elsewhere reading the
    weights does, and they grow fourfold from the smallest that holds the decodes of a full batch half.
    """
    rows = serve.max_sequences * (1 + serve.num_drafts)
    sizes, size = [1] if platform == "cpu" else [], SMALLEST
    while size < serve.max_step_tokens:
        sizes.append(size)
        size *= 4 if size >= 4 * SMALLEST and platform != "cpu" else 2
    table = -(-(serve.max_model_len or model.max_seq_len) // serve.page_size)
    return [
        Shape(size, max(SMALLEST, min(size, rows)), serve.max_sequences, table)
        for size in (*sizes, serve.max_step_tokens)
    ]


def forward(
    model: ModelConfig, shape: Shape, rank: int, params: Any, pool: Pool, last: jax.Array, flat: jax.Array, layers: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """(logits [Q, V] float32, hidden states [Q, D] float32, pool). last [R]: the token drawn last in each slot.

    layers: of adapters of `rank` each (models.layers.Adapters), or None.
    """
    given = split(shape, flat)
    tokens = jnp.where(given.tokens < 0, last[jnp.maximum(-1 - given.tokens, 0)], given.tokens)
    decoder = bind(model, params)
    at = Ragged(given.block_tables, given.lengths, given.starts, given.num_sequences)
    mixture = None
    if layers is not None:
        ranks = jax.tree.leaves(layers)[0].shape[1]
        mask = given.adapter[:, None] == jnp.arange(ranks) // rank
        mixture = Adapters(mask[None].astype(jnp.float32), layers)
    out = decoder(tokens[None], given.positions[None], cache=pool, offset=at, adapters=mixture)
    hidden = out.hidden[:, given.rows]
    return decoder.logits(hidden)[0], hidden[0].astype(jnp.float32), out.cache


def largest_kv(model: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """The largest |key| and |value| of each channel over tokens [1, T], [L, K, 2, H]."""
    shape = (1, tokens.shape[1], model.num_kv_heads, model.head_dim)
    empty = tuple(Cache(*(jnp.zeros(shape, model.dtype) for _ in range(2))) for _ in range(model.num_layers))
    caches: Any = bind(model, params)(tokens, cache=empty, offset=jnp.zeros((1,), jnp.int32)).cache
    largest = [jnp.stack([jnp.max(jnp.abs(x), axis=(0, 1)) for x in (layer.k, layer.v)], axis=1) for layer in caches]
    return jnp.stack(largest).astype(jnp.float32)


def forward_program(
    model: ModelConfig, shape: Shape, mesh: Mesh, params: Any, pool: Pool, layers: Any = None, rank: int = 0
) -> Program:
    whole = replicated(mesh)
    last = jax.ShapeDtypeStruct((shape.sequences,), jnp.int32, sharding=whole)
    flat = jax.ShapeDtypeStruct((shape.num_integers,), jnp.int32, sharding=whole)
    same = jax.tree.map(lambda leaf: leaf.sharding, pool)
    out = (sharding(mesh, (None, "vocab")), whole, same)
    return Program(
        f"forward_{shape.tokens}",
        forward,
        (model, shape, rank),
        (params, pool, last, flat, layers),
        mesh,
        donate=(1,),
        out_shardings=out,
    )


def draw(
    num_top: int,
    last: jax.Array,
    logits: jax.Array,
    row: sampling.Draw,
    slots: jax.Array,
    adjust: Any,
    mask: Any,
    given: Any,
) -> tuple[jax.Array, sampling.Sampled]:
    """(last, what was drawn). slots [Q]: where each row's token goes in `last`; past its end for nowhere."""
    found = sampling.sample(num_top, logits, row, adjust, mask, given)
    return last.at[slots].set(found.tokens, mode="drop"), found


def draw_program(
    model: ModelConfig, serve: ServeConfig, rows: int, mesh: Mesh, full: bool, num_adjusted: int
) -> Program:
    """full: with penalties, masks and log-probabilities; otherwise only the tokens."""
    whole = replicated(mesh)

    def vector(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=whole)

    last = jax.ShapeDtypeStruct((serve.max_sequences,), jnp.int32, sharding=whole)
    logits = jax.ShapeDtypeStruct((rows, model.vocab_size), jnp.float32, sharding=sharding(mesh, (None, "vocab")))
    floats, ints = vector("float32"), vector("int32")
    row = sampling.Draw(floats, ints, floats, floats, vector("uint32"), ints)
    adjust = sampling.Adjust(*(vector(t, num_adjusted) for t in ("int32", "float32", "float32"))) if full else None
    mask = vector("uint32", -(-model.vocab_size // 32)) if full else None
    args = (last, logits, row, ints, adjust, mask, ints)
    return Program(
        f"draw_{rows}{'_full' if full else ''}", draw, (NUM_TOP if full else -1,), args, mesh, out_shardings=whole
    )
