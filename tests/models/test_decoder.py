"""The decoder against itself, every way it can be run: whole, cached, packed, unrolled, recomputed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import ModelConfig, RopeConfig
from llmos_jax.models.cache import Cache
from llmos_jax.models.decoder import abstract_params, bind, forward_logits, init_params, logical_dims, num_params
from llmos_jax.models.presets import PRESETS
from tests import tiny

BASE = tiny.model(num_heads=4, num_kv_heads=2)
VARIANTS = {
    "dense": BASE,
    "local_global": tiny.model(
        BASE, num_layers=3, layer_pattern=("local", "global"), sliding_window=4, rope=RopeConfig(local_theta=100.0)
    ),
    "moe": tiny.model(
        BASE,
        num_layers=3,
        layer_pattern=("local", "global"),
        sliding_window=4,
        num_experts=4,
        moe_mlp_dim=8,
        num_dense_layers=1,
    ),
    "gemma": tiny.model(
        BASE,
        qk_norm=True,
        sandwich_norm=True,
        norm_offset=True,
        embed_scale=4.0,
        tie_embeddings=True,
        attention_softcap=5.0,
        logit_softcap=3.0,
        attention_scale=0.3,
        activation="gelu_tanh",
    ),
    "gpt2": tiny.model(
        BASE,
        position="learned",
        norm="layernorm",
        gated_mlp=False,
        mlp_bias=True,
        qkv_bias=True,
        attention_out_bias=True,
        activation="gelu",
    ),
}
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, BASE.vocab_size)

full = jax.jit(forward_logits, static_argnums=0)
params_of = functools.cache(tiny.params)


@functools.partial(jax.jit, static_argnums=0)
def cached(config: ModelConfig, params, tokens, cache, offset):
    model = bind(config, params)
    output = model(tokens, cache=cache, offset=offset)
    return model.logits(output.hidden), output.cache


def empty_cache(config: ModelConfig, rows: int, size: int) -> tuple[Cache, ...]:
    layer = jnp.zeros((rows, size, config.num_kv_heads, config.head_dim))
    return (Cache(layer, layer),) * config.num_layers


@pytest.mark.compat
@pytest.mark.parametrize("name", VARIANTS)
def test_a_cached_run_gives_the_logits_of_the_whole_one(name):
    """A prefill of seven tokens, then one token at a time."""
    config = VARIANTS[name]
    params, cache, parts = params_of(config), empty_cache(config, 2, 16), []
    for start, stop in [(0, 7), *((i, i + 1) for i in range(7, 12))]:
        logits, cache = cached(config, params, TOKENS[:, start:stop], cache, jnp.full(2, start))
        parts.append(logits)
    want = full(config, params, TOKENS)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-4 * float(jnp.abs(want).max()))


def test_sequences_of_one_cache_stand_at_their_own_offsets():
    config = VARIANTS["local_global"]
    params, cache = params_of(config), empty_cache(config, 2, 16)
    _, cache = cached(config, params, TOKENS, cache, jnp.zeros(2, jnp.int32))
    offset = jnp.array([5, 9])  # what stands behind is overwritten or not seen
    new = TOKENS[jnp.arange(2), offset][:, None]
    logits, _ = cached(config, params, new, cache, offset)
    want = full(config, params, TOKENS)[jnp.arange(2), offset]
    np.testing.assert_allclose(logits[:, 0], want, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_as_if_alone(name):
    config = VARIANTS[name]
    params = params_of(config)
    segments = jnp.array([[1] * 5 + [2] * 7])
    positions = jnp.array([[*range(5), *range(7)]])

    @jax.jit
    def packed(params):
        model = bind(config, params)
        return model.logits(model(TOKENS[:1], positions, segments).hidden)

    parts = [full(config, params, TOKENS[:1, :5]), full(config, params, TOKENS[:1, 5:])]
    want = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(packed(params), want, atol=1e-4 * float(jnp.abs(want).max()))


def test_no_token_sees_what_comes_after():
    for config in VARIANTS.values():
        changed = TOKENS.at[:, 8].set((TOKENS[:, 8] + 1) % config.vocab_size)
        before, after = (full(config, params_of(config), tokens) for tokens in (TOKENS, changed))
        np.testing.assert_array_equal(before[:, :8], after[:, :8])
        assert (jnp.abs(before[:, 8:] - after[:, 8:]).max(axis=-1) > 0).all() or config.sliding_window


def test_local_layers_see_their_window_only():
    config = tiny.model(BASE, layer_pattern=("local",), sliding_window=3, num_layers=1)
    changed = TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % config.vocab_size)
    difference = full(config, params_of(config), TOKENS) - full(config, params_of(config), changed)
    np.testing.assert_array_equal(np.flatnonzero(jnp.abs(difference[0]).max(axis=-1)), [4, 5, 6])


def test_layers_as_a_tuple_of_arrays_equal_the_stack():
    """What generation on a CPU feeds, so that no layer is copied out of the stack."""
    config = VARIANTS["local_global"]
    params, offset = params_of(config), jnp.zeros(2, jnp.int32)
    split = {path: tuple(x) if path.startswith("segments.") else x for path, x in params.items()}
    stacked, unstacked = (cached(config, p, TOKENS, empty_cache(config, 2, 12), offset) for p in (params, split))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stacked, unstacked)


@functools.partial(jax.jit, static_argnums=0)
def gradients(config: ModelConfig, params):
    def loss(params):
        model = bind(config, params)
        output = model(TOKENS)
        return jnp.mean(jnp.tanh(model.logits(output.hidden)) ** 2) + output.aux_loss

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": False},
        *({"remat": policy} for policy in ("full", "dots", "dots_no_batch")),
        {"remat": "names", "remat_save": ("q", "k", "v", "attention"), "remat_offload": ("input", "gate")},
    ],
    ids=["unrolled", "full", "dots", "dots_no_batch", "names"],
)
def test_how_it_is_computed_does_not_change_the_gradients(changes):
    config = VARIANTS["moe"]
    want, got = (gradients(c, params_of(config)) for c in (config, dataclasses.replace(config, **changes)))
    assert got[0] == pytest.approx(float(want[0]), rel=1e-6)
    for path, gradient in want[1].items():
        assert tiny.relative_error(got[1][path], gradient) < 1e-4, path


def test_recomputing_keeps_less():
    """The activations that the backward pass is handed, counted in the traced program."""
    config = tiny.model(BASE, num_layers=8)

    def kept(remat: str, *names: str) -> int:
        varied = dataclasses.replace(config, remat=remat, remat_save=names)
        _, pull = jax.eval_shape(
            lambda p: jax.vjp(lambda p: forward_logits(varied, p, TOKENS), p), abstract_params(config)
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept("full") < kept("dots") < kept("none")
    tokens = TOKENS.size * config.num_layers
    assert kept("names", "input", "up") - kept("names", "input") == tokens * config.mlp_dim
    attended = config.num_heads * (config.head_dim + 1)  # the result, and the logsumexp of each head
    assert kept("names", "input", "attention") - kept("names", "input") == tokens * attended


def test_computation_in_bfloat16_is_near():
    config = VARIANTS["dense"]
    want = full(config, params_of(config), TOKENS)
    got = full(dataclasses.replace(config, dtype="bfloat16"), params_of(config), TOKENS)
    assert got.dtype == jnp.float32
    assert tiny.relative_error(got, want) < 0.1


# Shapes without arrays.


@given(
    pattern=st.lists(st.sampled_from(["global", "local"]), min_size=1, max_size=4),
    num_layers=st.integers(1, 13),
    num_dense_layers=st.integers(0, 15),
    num_experts=st.sampled_from([0, 4]),
)
def test_every_layer_has_one_slot_of_its_kind(pattern, num_layers, num_dense_layers, num_experts):
    config = tiny.model(
        num_layers=num_layers,
        layer_pattern=tuple(pattern),
        sliding_window=4,
        num_experts=num_experts,
        num_dense_layers=num_dense_layers,
    )
    slots = [config.layer_slot(layer) for layer in range(num_layers)]
    for layer, (segment, place, index) in enumerate(slots):
        attention, feed_forward = config.segments[segment].kinds[place]
        assert attention == pattern[layer % len(pattern)]
        assert (feed_forward == "moe") == (num_experts > 0 and layer >= num_dense_layers)
        assert 0 <= index < config.segments[segment].repeats
    assert slots == sorted(slots, key=lambda slot: (slot[0], slot[2], slot[1])) and len(set(slots)) == num_layers
    assert sum(len(s.kinds) * s.repeats for s in config.segments) == num_layers
    with pytest.raises(IndexError):
        config.layer_slot(num_layers)


# Parameters as their publishers count them, in millions (embedding included).
PUBLISHED = {
    "smollm2-135m": 134.5,
    "llama3-8b": 8030,
    "llama3-70b": 70_554,
    "llama3.1-405b": 405_853,
    "mistral-7b": 7242,
    "qwen2.5-7b": 7616,
    "qwen3-8b": 8191,
    "gemma2-9b": 9242,
    "gpt2": 124.4,
    "mixtral-8x7b": 46_703,
    "qwen3-235b-a22b": 235_094,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    assert num_params(PRESETS[name]) / 1e6 == pytest.approx(PUBLISHED[name], rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_abstract_parameters_are_those_that_init_makes(name):
    config = dataclasses.replace(VARIANTS[name], param_dtype="bfloat16")
    abstract = abstract_params(config)
    made = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert {path: (x.shape, x.dtype) for path, x in made.items()} == {
        p: (x.shape, x.dtype) for p, x in abstract.items()
    }
    assert {path: len(dims) for path, dims in logical_dims(config).items()} == {p: x.ndim for p, x in abstract.items()}
    assert num_params(config) == sum(x.size for x in made.values())


def test_fresh_parameters_follow_the_key():
    make = jax.jit(init_params, static_argnums=0)
    first, same, other = (make(BASE, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.array_equal(first["embed.table"], other["embed.table"])
    layers = first["segments.0.0.attention.q"]
    assert not np.array_equal(layers[0], layers[1])
