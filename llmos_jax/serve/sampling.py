"""Logits to tokens on the device: penalties, masks, temperature, top-k, top-p, min-p, logprobs.

A row's token follows from its own logits, parameters, seed and position alone: the same bits in any batch, on any mesh.
Sums of floats would not give that, since their order changes with the shape; so probabilities are made integers of up
to 2^30 first, and sums of integers are exact in every order. The vocabulary is never sorted: each filter keeps the tokens
at or above some probability, which is mostly one of the largest few, and else found by bisection over the float's bits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from llmos_jax.serve.request import Sampling, Token

NO_TOKEN = 2**31 - 1  # pads lists of ids
BLOCK = 128  # tokens whose weights are summed before the running sum is formed
GROUP = 32  # tokens of which the largest is looked at first
CANDIDATES = 256  # likeliest tokens among which top-k and top-p mostly end
COLDEST = 1e-5  # a temperature below is 0
TOTAL_BITS = 30  # the weights of a row sum to at most 2^30, and to more than half of that


class Draw(NamedTuple):
    """How each row is drawn. temperature 0: the likeliest token. top_k 0, top_p 1 and min_p 0 are off.

    The random number of a row is a function of seed and position.
    """

    temperature: Float[Array, "R"]
    top_k: Int[Array, "R"]
    top_p: Float[Array, "R"]
    min_p: Float[Array, "R"]
    seed: UInt32[Array, "R"]
    position: Int[Array, "R"]


class Adjust(NamedTuple):
    """A logit l of a listed token becomes (l * factor if l < 0 else l / factor) + add.

    ids: each at most once in a row, padded with NO_TOKEN.
    """

    ids: Int[Array, "R A"]
    add: Float[Array, "R A"]
    factor: Float[Array, "R A"]


class Sampled(NamedTuple):
    """Drawn tokens, and natural logarithms of the model's own probabilities (before anything of Draw and Adjust).

    logprobs: of the drawn token, or of the given one. top_tokens: likeliest first, the lower id first among equals.
    """

    tokens: Int[Array, "R"]
    logprobs: Float[Array, "R"]
    top_tokens: Int[Array, "R k"]
    top_logprobs: Float[Array, "R k"]


def sample(
    num_top: int,
    logits: Float[Array, "R V"],
    draw: Draw,
    adjust: Adjust | None = None,
    mask: UInt32[Array, "R W"] | None = None,
    given: Int[Array, "R"] | None = None,
) -> Sampled:
    """One token a row.

    Args:
      num_top: static; how many likeliest tokens to report. -1 computes no logprobs at all: they are 0.
      mask: bit i % 32 of word i // 32 says whether token i may be drawn; of W = ceil(V / 32) words.
      given: a token whose logprob is wanted in place of the drawn one's; -1 for none.

    Adjustments and mask come first, then temperature, top-k, top-p and min-p, in this order. top-k and top-p keep
    tokens as likely as the last one kept; top-p those before which less than top_p of what top-k left has gone.
    A row in which nothing may be drawn gives the likeliest token of the least id.
    """
    logits = logits.astype(jnp.float32)
    draw = draw._replace(temperature=jnp.where(draw.temperature < COLDEST, 0.0, draw.temperature))
    allowed = _masked(_adjusted(logits, adjust), mask)
    best = jnp.max(allowed, axis=-1)
    likeliest = _first(allowed == best[:, None])
    tokens = jax.lax.cond(
        jnp.any(draw.temperature > 0),
        lambda: jnp.where(draw.temperature > 0, _drawn(allowed, best, likeliest, draw), likeliest),
        lambda: likeliest,
    )
    if num_top < 0:
        none = jnp.zeros((logits.shape[0], 0))
        return Sampled(tokens, jnp.zeros(tokens.shape), none.astype(jnp.int32), none)
    wanted = tokens if given is None else jnp.where(given < 0, tokens, given)
    normalizer = _logsumexp(logits)
    logprobs = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0] - normalizer
    top, top_tokens = _largest(logits, num_top)
    return Sampled(tokens, logprobs, top_tokens, top - normalizer[:, None])


def _adjusted(logits: Float[Array, "R V"], adjust: Adjust | None) -> Float[Array, "R V"]:
    if adjust is None:
        return logits
    rows = jnp.arange(logits.shape[0])[:, None]
    old = logits.at[rows, adjust.ids].get(mode="fill", fill_value=0.0)
    new = jnp.where(old < 0, old * adjust.factor, old / adjust.factor) + adjust.add
    return logits.at[rows, adjust.ids].set(new, mode="drop")


def _masked(logits: Float[Array, "R V"], mask: UInt32[Array, "R W"] | None) -> Float[Array, "R V"]:
    if mask is None:
        return logits
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jnp.where(bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def _first(found: Bool[Array, "R V"]) -> Int[Array, "R"]:
    """Index of the first True. Two plain reductions are faster on a CPU than argmax."""
    size = found.shape[-1]
    return jnp.minimum(jnp.min(jnp.where(found, jnp.arange(size), size), axis=-1), size - 1)


def _drawn(
    logits: Float[Array, "R V"], best: Float[Array, "R"], likeliest: Int[Array, "R"], draw: Draw
) -> Int[Array, "R"]:
    """A token of the filtered distribution, by its inverse cumulative distribution function."""
    temperature = jnp.where(draw.temperature > 0, draw.temperature, 1.0)
    best = jnp.where(jnp.isfinite(best), best, 0.0)
    # Relative to the likeliest token, so that min-p is a threshold on it as it stands.
    chance = jnp.exp((logits - best[:, None]) / temperature[:, None])
    chance = _padded(chance)
    filtered = jnp.any((draw.temperature > 0) & ((draw.top_k > 0) | (draw.top_p < 1)))
    least = jax.lax.cond(filtered, lambda: _least(chance, draw), lambda: jnp.zeros(best.shape))
    kept = jnp.where(chance >= jnp.maximum(least, draw.min_p)[:, None], chance, 0.0)
    weights = _weights(kept, _scale(kept))
    token, total = _pick(weights, _random_bits(draw.seed, draw.position))
    return jnp.where(total > 0, token, likeliest)


def _least(chance: Float[Array, "R V"], draw: Draw) -> Float[Array, "R"]:
    """The smallest chance that top-k and top-p keep: among the largest few, or where it is not, by bisection."""
    drawn = draw.temperature > 0
    top, _ = _largest(chance, CANDIDATES)
    size = top.shape[1]
    rank = jnp.where(drawn & (draw.top_k > 0), draw.top_k, 0)
    by_rank = jax.lax.cond(
        jnp.any(rank > size),
        lambda: jnp.where(rank > size, _bisect(chance, rank, None), _at(top, rank - 1)),
        lambda: _at(top, rank - 1),
    )
    by_rank = jnp.where(rank > 0, by_rank, 0.0)

    scale = _scale(chance)
    total = _sum(jnp.where(chance >= by_rank[:, None], _weights(chance, scale), 0))
    need = jnp.maximum((total.astype(jnp.float32) * draw.top_p).astype(jnp.int32), 1)
    need = jnp.where(drawn & (draw.top_p < 1), need, 0)
    place = jnp.sum(jnp.cumsum(_weights(top, scale), axis=-1) < need[:, None], axis=-1)
    by_mass = jax.lax.cond(
        jnp.any(place == size),
        lambda: jnp.where(place == size, _bisect(chance, need, scale), _at(top, place)),
        lambda: _at(top, place),
    )
    return jnp.maximum(by_rank, jnp.where(need > 0, by_mass, 0.0))


def _at(values: Float[Array, "R C"], index: Int[Array, "R"]) -> Float[Array, "R"]:
    return jnp.take_along_axis(values, jnp.clip(index, 0, values.shape[1] - 1)[:, None], axis=1)[:, 0]


def _largest(values: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R C"], Int[Array, "R C"]]:
    """The `count` largest values and where they are, the first of equals first.

    They lie in the `count` groups of the largest maxima; of a vocabulary split over devices, only those are moved.
    """
    rows, size = values.shape
    if size % GROUP or size <= 2 * GROUP * count:
        return jax.lax.top_k(values, min(count, size))
    groups = values.reshape(rows, -1, GROUP)
    best = jnp.sort(jax.lax.top_k(jnp.max(groups, axis=-1), count)[1], axis=-1)  # in their order in the vocabulary
    candidates = jnp.take_along_axis(groups, best[:, :, None], axis=1).reshape(rows, -1)
    top, place = jax.lax.top_k(candidates, count)
    return top, jnp.take_along_axis(best, place // GROUP, axis=1) * GROUP + place % GROUP


def _bisect(chance: Float[Array, "R V"], need: Int[Array, "R"], scale: Float[Array, "R"] | None) -> Float[Array, "R"]:
    """The largest c for which the tokens of a chance of c or more weigh `need` together; 0 where all weigh less.

    Their weight is their number where `scale` is None. Floats that are not negative are ordered as their bits are.
    """
    bits = jax.lax.bitcast_convert_type(chance, jnp.int32)
    weights = jnp.ones(bits.shape, jnp.int32) if scale is None else _weights(chance, scale)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = _sum(jnp.where(bits >= middle[:, None], weights, 0)) >= need
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(need.shape, jnp.int32)
    high = low + jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _scale(chance: Float[Array, "R V"]) -> Float[Array, "R"]:
    """The power of two that makes the weights of a row sum to between 2^29 and 2^30.

    The first sum is coarse, so that it cannot overflow; what it shows to be unused is used in the second.
    """
    size = chance.shape[-1]
    exponent = jnp.full(chance.shape[:1], TOTAL_BITS - math.ceil(math.log2(max(size, 2))), jnp.int32)
    for _ in range(2):
        total = _sum(jnp.floor(chance * _power_of_two(exponent)[:, None]).astype(jnp.int32))
        unused = jax.lax.clz(total + size) - (32 - TOTAL_BITS)
        exponent = jnp.clip(exponent + unused, 0, TOTAL_BITS)
    return _power_of_two(exponent)


def _sum(values: Int[Array, "R V"]) -> Int[Array, "R"]:
    """Of each row. XLA's CPU compiler vectorises it in two steps, not in one: three times as fast."""
    size = values.shape[1]
    return jnp.sum(jnp.sum(values.reshape(-1, size // BLOCK, BLOCK), axis=-1), axis=-1)


def _padded(values: Float[Array, "R V"]) -> Float[Array, "R P"]:
    """With as many columns as make whole blocks."""
    return jnp.pad(values, ((0, 0), (0, -values.shape[1] % BLOCK)))


def _power_of_two(exponent: Int[Array, "R"]) -> Float[Array, "R"]:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _weights(chance: Float[Array, "R V"], scale: Float[Array, "R"]) -> Int[Array, "R V"]:
    return jnp.floor(chance * scale[:, None] + 0.5).astype(jnp.int32)


def _pick(weights: Int[Array, "R V"], random: UInt32[Array, "R"]) -> tuple[Int[Array, "R"], Int[Array, "R"]]:
    """The token in whose part of the running sum of weights the random number falls, and the sum of all."""
    blocks = weights.reshape(weights.shape[0], -1, BLOCK)
    until = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    total = until[:, -1]
    target = _high_product(random, total.astype(jnp.uint32)).astype(jnp.int32)
    block = jnp.minimum(jnp.sum(until <= target[:, None], axis=-1), until.shape[1] - 1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(until, block[:, None], axis=1)[:, 0] - jnp.sum(inside, axis=-1)
    place = jnp.sum(before[:, None] + jnp.cumsum(inside, axis=-1) <= target[:, None], axis=-1)
    return (block * BLOCK + jnp.minimum(place, BLOCK - 1)).astype(jnp.int32), total


def _random_bits(seed: UInt32[Array, "R"], position: Int[Array, "R"]) -> UInt32[Array, "R"]:
    def one(seed, position):
        return jax.random.bits(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position))

    return jax.vmap(one)(seed, position)


def _high_product(a: UInt32[Array, "R"], b: UInt32[Array, "R"]) -> UInt32[Array, "R"]:
    """floor(a b / 2^32), which is uniform over 0 .. b - 1 for a uniform a (Lemire, arXiv:1805.10941)."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    carried = (middle & 0xFFFF) + a_low * b_high
    return a_high * b_high + (middle >> 16) + (carried >> 16)


def _logsumexp(logits: Float[Array, "R V"]) -> Float[Array, "R"]:
    best = jnp.max(logits, axis=-1)
    chance = _padded(jnp.exp(logits - best[:, None]))
    scale = _scale(chance)
    total = _sum(_weights(chance, scale))
    return best + jnp.log(total.astype(jnp.float32) / scale)


def draw_arrays(rows: Sequence[tuple[Sampling, int, int]], size: int) -> Draw:
    """The Draw of rows (sampling, seed, position), padded to `size` with rows that take the likeliest token."""

    def column(values: list, padding: float, dtype) -> Any:
        return np.array(values + [padding] * (size - len(rows)), dtype)

    return Draw(
        column([sampling.temperature for sampling, _, _ in rows], 0.0, np.float32),
        column([sampling.top_k for sampling, _, _ in rows], 0, np.int32),
        column([sampling.top_p for sampling, _, _ in rows], 1.0, np.float32),
        column([sampling.min_p for sampling, _, _ in rows], 0.0, np.float32),
        column([seed % 2**32 for _, seed, _ in rows], 0, np.uint32),
        column([position for _, _, position in rows], 0, np.int32),
    )


class Penalties:
    """What one sequence's past and its request add to its next logits; O(1) a token.

    The repetition penalty counts prompt and answer, the frequency and presence penalties the answer alone.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[Token] = ()):
        self._sampling = sampling
        self._num_output = 0
        self._slot: dict[Token, int] = {}
        self._ids = np.zeros(64, np.int32)
        self._counts = np.zeros(64, np.int32)  # of the answer
        self._bias = np.zeros(64, np.float32)
        self._penalizes = any(
            (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1.0)
        )
        self._seen = np.zeros(64, bool)
        for token, bias in sampling.logit_bias:
            slot = self._slot_of(token)  # first, as it may put longer arrays in place
            self._bias[slot] += bias
        self._stops = [self._slot_of(token) for token in sampling.stop_ids] if sampling.min_tokens else []
        if sampling.repetition_penalty != 1.0:
            for token in prompt:
                slot = self._slot_of(token)
                self._seen[slot] = True

    def extend(self, tokens: Sequence[Token]) -> None:
        """Tells the next tokens of the answer."""
        self._count(tokens, 1)

    def lists(self, ahead: Sequence[Token] = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, add and factor of an Adjust's row, for the token that follows the answer and `ahead`."""
        self._count(ahead, 1)
        size, sampling = len(self._slot), self._sampling
        counts = self._counts[:size]
        add = self._bias[:size] - np.float32(sampling.frequency_penalty) * counts
        add -= np.float32(sampling.presence_penalty) * (counts > 0)
        if self._num_output < sampling.min_tokens:
            add[self._stops] = -np.inf
        factor = np.where(self._seen[:size] | (counts > 0), np.float32(sampling.repetition_penalty), np.float32(1.0))
        ids = self._ids[:size].copy()
        self._count(ahead, -1)
        return ids, add, factor

    def _count(self, tokens: Sequence[Token], change: int) -> None:
        self._num_output += change * len(tokens)
        if self._penalizes:
            for token in tokens:
                slot = self._slot_of(token)
                self._counts[slot] += change

    def _slot_of(self, token: Token) -> int:
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._ids):
            grown = (np.concatenate([x, np.zeros_like(x)]) for x in (self._ids, self._counts, self._bias, self._seen))
            self._ids, self._counts, self._bias, self._seen = grown
        self._ids[slot] = token
        return slot


def adjust_arrays(rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray] | None], size: int, width: int) -> Adjust:
    """The Adjust of rows of `Penalties.lists`, None for no change, padded to [size, width]; width bounds each list."""
    empty: tuple[Any, ...] = (np.full((size, width), NO_TOKEN, np.int32), *np.zeros((2, size, width), np.float32))
    adjust = Adjust(*empty)
    adjust.factor[:] = 1.0
    for row, lists in enumerate(rows):
        for target, values in zip(adjust, lists or (), strict=False):
            target[row, : len(values)] = values
    return adjust
