"""Sampling on the device against a sort in float64, its distribution, and that a row does not see the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from llmos_jax.serve import sampling
from llmos_jax.serve.request import Sampling
from llmos_jax.serve.sampling import NO_TOKEN, Adjust, Draw, Penalties, adjust_arrays, draw_arrays, sample
from tests import tiny

VOCAB = 1000
PLAIN = Sampling(max_tokens=1)
run = jax.jit(sample, static_argnums=0)


def make_draw(size: int, first_seed: int = 0, **changes) -> Draw:
    rows = [(dataclasses.replace(PLAIN, **changes), first_seed + row, 7 * row) for row in range(size)]
    return draw_arrays(rows, size)


def make_logits(rows: int, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def kept_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float):
    """The filtered distribution of one row in float64, by sorting, and how near top-p's border is to another choice."""
    order = np.argsort(-logits, kind="stable")
    scaled = logits[order] / np.float64(temperature)
    chance = np.exp(scaled - scaled[0])
    margin = 1.0
    if 0 < top_k < len(chance):
        chance[chance < chance[top_k - 1]] = 0.0
    chance /= chance.sum()
    if top_p < 1:
        before = np.cumsum(chance) - chance
        margin = np.abs(before[1:] - top_p).min()
        last = chance[before < top_p].min()
        chance[chance < last] = 0.0
    chance[chance < min_p * chance[0] * (1 - 1e-9)] = 0.0
    result = np.zeros(len(chance))
    result[order] = chance / chance.sum()
    return result, margin


def adjusted(logits: np.ndarray, adjust: Adjust | None, mask: np.ndarray | None) -> np.ndarray:
    logits = logits.astype(np.float64)
    if adjust is not None:
        for row in range(len(logits)):
            for token, add, factor in zip(*(np.asarray(x)[row] for x in adjust), strict=True):
                if token < logits.shape[1]:
                    old = logits[row, token]
                    logits[row, token] = (old * factor if old < 0 else old / factor) + add
    if mask is not None:
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
        logits = np.where(bits == 1, logits, -np.inf)
    return logits


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    rows = 8
    logits = make_logits(rows, spread=draw(st.sampled_from([0.1, 1.0, 4.0, 15.0])), seed=int(rng.integers(10**6)))
    # Multiples of 1/1024, or of 1: adjusting them is exact in float32, and two are equal or apart.
    scale = draw(st.sampled_from([1, 1024]))
    logits = np.round(logits * scale) / np.float32(scale)
    parameters = Draw(
        rng.choice([0.3, 0.7, 1.0, 2.5], rows).astype(np.float32),
        rng.choice([0, 1, 2, 40, 255, 256, 257, 700, 5000], rows).astype(np.int32),
        rng.choice([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0], rows).astype(np.float32),
        rng.choice([0.0, 0.01, 0.2, 1.0], rows).astype(np.float32),
        rng.integers(0, 2**32, rows, dtype=np.uint32),
        rng.integers(0, 10**6, rows).astype(np.int32),
    )
    adjust = Adjust(
        np.stack([rng.permutation(VOCAB)[:16] for _ in range(rows)]).astype(np.int32),
        rng.choice([-np.inf, -1.5, 0.0, 2.0], (rows, 16)).astype(np.float32),
        rng.choice([1.0, 2.0, 0.5], (rows, 16)).astype(np.float32),
    )
    adjust.ids[:, 10:] = NO_TOKEN
    mask = rng.integers(0, 2**32, (rows, -(-VOCAB // 32)), dtype=np.uint32)
    return logits, parameters, adjust, mask


@given(cases())
def test_tokens_are_those_of_a_sort_in_float64(case):
    logits, parameters, adjust, mask = case
    got = run(0, logits, parameters, adjust, mask)
    wanted = adjusted(logits, adjust, mask)
    uniform = np.asarray(sampling._random_bits(parameters.seed, parameters.position), np.float64) / 2**32
    compared = 0
    for row, token in enumerate(np.asarray(got.tokens)):
        options = [float(x[row]) for x in parameters[:4]]
        probabilities, margin = kept_probabilities(wanted[row], options[0], int(options[1]), *options[2:])
        until = np.cumsum(probabilities)
        if margin > 1e-5:
            assert probabilities[token] > 0
            if np.abs(until - uniform[row]).min() > 1e-5:
                assert token == np.searchsorted(until, uniform[row], side="right")
                compared += 1
    assume(compared > 0)


@pytest.mark.parametrize("vocab", [1, 31, 128, 1000, 20_000])
def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals(vocab):
    logits = make_logits(8, vocab)
    logits[:, [vocab // 3, vocab // 2]] = 100.0
    tokens = run(-1, logits, make_draw(8, temperature=0.0)).tokens
    np.testing.assert_array_equal(tokens, [vocab // 3] * 8)
    mixed = make_draw(8, temperature=0.0)
    mixed.temperature[3:5] = 1e-4
    np.testing.assert_array_equal(np.argmax(logits, axis=1)[5:], run(-1, logits, mixed).tokens[5:])


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 0.999, "top_k": 900}, {"min_p": 0.02, "temperature": 0.6}]
)
def test_a_row_has_the_same_bits_in_every_batch(options):
    logits, parameters = make_logits(64, spread=2.0), make_draw(64, **options)
    # Every other row is of another kind, so that what a batch does for one row must not be felt by the next.
    parameters.top_k[1::4], parameters.top_p[1::4], parameters.temperature[3::4] = 600, 0.9999, 0.0
    whole = jax.tree.map(np.asarray, run(5, logits, parameters))
    for size in (1, 8, 16):
        for start in range(0, 64, 24):
            rows = slice(start, start + size)
            part = run(5, logits[rows], Draw(*(x[rows] for x in parameters)))
            jax.tree.map(lambda got, want, rows=rows: np.testing.assert_array_equal(got, want[rows]), part, whole)


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.95}])
def test_a_sharded_vocabulary_changes_no_bit(options, eight_devices):
    mesh = tiny.mesh(tensor=4)
    logits, parameters = make_logits(8, 4096), make_draw(8, **options)
    split = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    with jax.set_mesh(mesh):
        got = run(3, split, parameters)
    jax.tree.map(np.testing.assert_array_equal, got, run(3, logits, parameters))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_the_distribution_drawn_is_the_one_wanted(options):
    """Pearson's chi-square over 40,000 draws of one row; a p-value below 1e-6 would be chance once in a million."""
    num, vocab = 40_000, 60
    row = make_logits(1, vocab, spread=1.5, seed=3)
    option = dataclasses.asdict(dataclasses.replace(PLAIN, **options))
    wanted, _ = kept_probabilities(
        row[0].astype(np.float64), *(option[k] for k in ("temperature", "top_k", "top_p", "min_p"))
    )
    tokens = np.concatenate(
        [
            run(-1, np.repeat(row, 2000, axis=0), make_draw(2000, first_seed=2000 * i, **options)).tokens
            for i in range(20)
        ]
    )
    counts = np.bincount(tokens, minlength=vocab)
    assert counts[wanted == 0].sum() == 0
    likely = wanted * num > 5
    chi_square = (((counts - wanted * num) ** 2) / np.maximum(wanted * num, 1e-9))[likely].sum()
    freedom = likely.sum() - 1
    # Wilson and Hilferty: the cube root of chi-square over its mean is nearly normal.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert abs(z) < 4.9


def test_draws_of_other_seeds_and_positions_are_independent():
    size = 4096
    logits = np.zeros((size, 4), np.float32)
    by_seed = make_draw(size)
    by_seed.position[:] = 5
    by_position = by_seed._replace(seed=np.full(size, 9, np.uint32), position=np.arange(size, dtype=np.int32))
    first, second = (np.asarray(run(-1, logits, draw).tokens) for draw in (by_seed, by_position))
    for tokens in (first, second):
        pairs = np.bincount(4 * tokens[:-1] + tokens[1:], minlength=16)
        assert np.abs(pairs - size / 16).max() < 5 * np.sqrt(size / 16)
    assert 0.2 < np.mean(first == second) < 0.3


def test_logprobs_are_of_the_models_own_distribution():
    logits = make_logits(8)
    adjust = Adjust(np.full((8, 1), 3, np.int32), np.full((8, 1), 50.0, np.float32), np.ones((8, 1), np.float32))
    given = np.array([-1, 5, 6, -1, 999, 0, 3, -1], np.int32)
    got = run(4, logits, make_draw(8, temperature=0.7), adjust, None, given)
    np.testing.assert_array_equal(got.tokens, [3] * 8)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got.logprobs, exact[np.arange(8), np.where(given < 0, 3, given)], atol=2e-6)
    order = np.argsort(-exact, axis=1)[:, :4]
    np.testing.assert_array_equal(got.top_tokens, order)
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(exact, order, axis=1), atol=2e-6)


@given(
    st.integers(0, 10**6),
    st.sampled_from([5, 256]),
    st.sampled_from([40, 3, 1]),
    st.sampled_from([640, 20_000, 20_032]),
)
def test_the_largest_are_found_in_order(seed, count, spread, size):
    values = np.random.default_rng(seed).integers(0, spread * 8, (3, size)).astype(np.float32)
    if spread == 40:
        values[:, :: size // 7] += 1000
    top, ids = sampling._largest(jnp.asarray(values), count)
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(top, np.take_along_axis(values, order, axis=1))


def test_a_row_in_which_nothing_is_allowed_still_gives_a_token():
    logits = make_logits(8)
    mask = np.zeros((8, 32), np.uint32)
    mask[0, 1] = 1 << 3
    tokens = np.asarray(run(-1, logits, make_draw(8), None, mask).tokens)
    assert tokens[0] == 35
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([2, 100, 49_152, 262_144]))
def test_weights_use_their_bits_and_do_not_overflow(seed, vocab):
    rng = np.random.default_rng(seed)
    chance = np.exp(-rng.random((4, vocab)) * np.array([[0.0], [1.0], [30.0], [300.0]])).astype(np.float32)
    chance[:, 0] = 1.0
    scale = sampling._scale(sampling._padded(jnp.asarray(chance)))
    weights = np.asarray(sampling._weights(jnp.asarray(chance), scale), np.int64)
    assert (weights.sum(axis=1) < 2**31).all() and (weights.sum(axis=1) > 0.49 * 2**30).all()


@pytest.mark.parametrize(("temperature", "times"), [(0.0, 0), (1.0, 1)])
def test_a_batch_that_is_all_greedy_does_not_pay_for_drawing(monkeypatch, temperature, times):
    original, calls = sampling._drawn, []

    def watched(*args):
        jax.debug.callback(lambda: calls.append(1))
        return original(*args)

    monkeypatch.setattr(sampling, "_drawn", watched)
    jax.block_until_ready(
        jax.jit(lambda *args: sample(-1, *args))(make_logits(8), make_draw(8, temperature=temperature))
    )
    jax.effects_barrier()
    assert len(calls) == times


def naive_adjustment(options: Sampling, prompt: list[int], answer: list[int], logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    for token in {*prompt, *answer}:
        factor = options.repetition_penalty
        logits[token] = logits[token] * factor if logits[token] < 0 else logits[token] / factor
    for token in set(answer):
        logits[token] -= options.frequency_penalty * answer.count(token) + options.presence_penalty
    for token, bias in options.logit_bias:
        logits[token] += bias
    if len(answer) < options.min_tokens:
        logits[list(options.stop_ids)] = -np.inf
    return logits


@given(
    st.builds(
        Sampling,
        max_tokens=st.just(10),
        min_tokens=st.integers(0, 4),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, -0.25]),
        repetition_penalty=st.sampled_from([1.0, 1.25]),
        logit_bias=st.sampled_from([(), ((3, 5.0), (90, -100.0))]),
        stop_ids=st.sampled_from([(), (3, 7)]),
    ),
    st.lists(st.integers(0, 99), max_size=90),
    st.lists(st.lists(st.integers(0, 99), max_size=8), max_size=5),
    st.lists(st.integers(0, 99), max_size=4),
)
def test_penalties_follow_the_answer(options, prompt, parts, ahead):
    penalties, answer = Penalties(options, prompt), []
    logits = make_logits(1, 100)
    for part in parts:
        penalties.extend(part)
        answer += part
        for further in (ahead, []):
            adjust = adjust_arrays([penalties.lists(further)], 1, 128)
            wanted = naive_adjustment(options, prompt, answer + further, logits[0])
            got = np.asarray(sampling._adjusted(jnp.asarray(logits), adjust))[0]
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["prompt", "answer", "bias"])
def test_penalties_hold_more_tokens_than_fit_at_first(what):
    tokens = list(range(1000))
    bias = tuple((token, float(token)) for token in tokens) if what == "bias" else ()
    options = Sampling(max_tokens=2000, frequency_penalty=0.5, repetition_penalty=1.25, logit_bias=bias)
    penalties = Penalties(options, tokens if what == "prompt" else ())
    penalties.extend(tokens if what == "answer" else ())
    ids, add, factor = penalties.lists()
    assert ids.tolist() == tokens
    assert add.tolist() == ([-0.5] * 1000 if what == "answer" else [value for _, value in bias] or [0.0] * 1000)
    assert set(factor.tolist()) == {1.0 if what == "bias" else 1.25}


def test_rows_are_padded_with_the_likeliest_token():
    draw = draw_arrays([(Sampling(max_tokens=1, temperature=0.5, top_k=3), 2**32 + 5, 11)], 4)
    assert draw.temperature.tolist() == [0.5, 0, 0, 0] and draw.seed.tolist() == [5, 0, 0, 0]
    assert {x.shape for x in draw} == {(4,)}
    adjust = adjust_arrays([None, (np.array([4]), np.array([1.0]), np.array([2.0]))], 4, 2)
    assert adjust.ids.tolist() == [[NO_TOKEN] * 2, [4, NO_TOKEN], [NO_TOKEN] * 2, [NO_TOKEN] * 2]
