"""Generation against the whole forward pass, and drawn tokens against the softmax they are drawn from."""

import functools
from itertools import islice

import jax
import numpy as np
import pytest

from llmos_jax.compiler.target import Target
from llmos_jax.config import MeshConfig, ModelConfig, RopeConfig, UserError
from llmos_jax.models.decoder import abstract_params, forward_logits
from llmos_jax.models.generate import (
    Generator,
    abstract_serving_params,
    bucket,
    decode_program,
    prefill_program,
)
from llmos_jax.sharding import make_mesh
from tests import tiny

BASE = tiny.model(num_heads=4, num_kv_heads=2, max_seq_len=64)
FEATURES = {
    "dense": {},
    "unrolled": {"scan_layers": False},
    "tied, biased": {"tie_embeddings": True, "qkv_bias": True, "attention_out_bias": True},
    "local and global": {
        "num_layers": 3,
        "layer_pattern": ("local", "global"),
        "sliding_window": 4,
        "rope": RopeConfig(local_theta=100.0, scaling="linear", factor=4.0),
    },
    "llama3 rope": {"rope": RopeConfig(scaling="llama3", factor=8.0, original_max_seq_len=16)},
    "yarn": {"rope": RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=16)},
    "moe": {"num_layers": 3, "num_experts": 4, "moe_mlp_dim": 8, "num_dense_layers": 1},
    "gemma": {
        "qk_norm": True,
        "sandwich_norm": True,
        "norm_offset": True,
        "embed_scale": 4.0,
        "tie_embeddings": True,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "attention_scale": 0.3,
        "activation": "gelu_tanh",
    },
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "gated_mlp": False,
        "mlp_bias": True,
        "qkv_bias": True,
        "attention_out_bias": True,
        "activation": "gelu",
    },
}
PROMPT = [5, 17, 3, 60, 11, 8, 44]

full = jax.jit(forward_logits, static_argnums=0)


@functools.cache
def generator(name: str = "dense") -> Generator:
    model = model_of(name)
    return Generator(model, tiny.params(model), tiny.mesh(data=1))


@functools.cache
def model_of(name: str) -> ModelConfig:
    return tiny.model(BASE, **FEATURES[name])


def last_logits(name: str, tokens: list[int]) -> np.ndarray:
    """[V], of the token after `tokens`. The rest of the row is padding, so that one program serves all."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(tokens)] = tokens
    model = model_of(name)
    return np.asarray(full(model, tiny.params(model), row))[0, len(tokens) - 1]


@pytest.mark.parametrize("name", FEATURES)
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward_pass(name):
    found = list(generator(name)(PROMPT, 12))
    tokens = list(PROMPT)
    for token in found:
        logits = last_logits(name, tokens)
        assert logits[token] >= logits.max() - 1e-4, f"after {len(tokens)} tokens"
        tokens.append(token)
    assert len(found) == 12


def test_logits_are_those_of_the_whole_forward_pass():
    found = np.asarray(generator().logits(PROMPT))
    assert found.shape == (len(PROMPT), 64)
    np.testing.assert_allclose(found[-1], last_logits("dense", PROMPT), atol=1e-4)


@pytest.mark.usefixtures("eight_devices")
def test_on_a_mesh_the_tokens_are_the_same():
    model = model_of("dense")
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    abstract = abstract_params(model, mesh)
    params = {path: jax.device_put(value, abstract[path].sharding) for path, value in tiny.params(model).items()}
    split = Generator(model, params, mesh)
    assert list(split(PROMPT, 8)) == list(generator()(PROMPT, 8))


# Drawing.


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_tokens_are_drawn_from_the_softmax(temperature):
    draws = 2_000
    counts = np.zeros(64)
    for seed in range(draws):
        counts[next(generator()(PROMPT, 1, temperature=temperature, seed=seed))] += 1
    logits = last_logits("dense", PROMPT).astype(np.float64) / temperature
    expected = np.exp(logits - logits.max())
    expected *= draws / expected.sum()
    # Pearson's chi-squared over the tokens expected five times or more, the others as one.
    usual = expected >= 5
    assert usual.sum() >= 4
    observed = [*counts[usual], counts[~usual].sum()]
    wanted = [*expected[usual], max(expected[~usual].sum(), 1e-9)]
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w >= 1)
    freedom = len(observed) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations above its mean


def test_a_seed_names_a_text():
    first = list(generator()(PROMPT, 20, temperature=1.0, seed=7))
    assert list(generator()(PROMPT, 20, temperature=1.0, seed=7)) == first
    assert list(generator()(PROMPT, 20, temperature=1.0, seed=8)) != first
    # A draw depends on the seed and its place, not on how the text before it came about.
    assert list(generator()(PROMPT + first[:5], 15, temperature=1.0, seed=7)) == first[5:]


def test_successive_draws_are_not_the_same_draw():
    """Where every token is as likely whatever came before, 200 draws with one seed are spread over the vocabulary."""
    model = tiny.model(BASE, max_seq_len=256)
    flat = {path: value * 0 if path.startswith("head.") else value for path, value in tiny.params(model).items()}
    drawn = list(Generator(model, flat, tiny.mesh(data=1))(PROMPT, 200, temperature=1.0, seed=3))
    assert len(set(drawn)) > 50  # of 64; 61 are expected


# Where it ends.


def test_it_ends_before_a_stop_token():
    found = list(generator()(PROMPT, 12))
    stop = found[4]
    assert list(generator()(PROMPT, 12, stop_ids=(stop,))) == found[: found.index(stop)]
    assert list(generator()(PROMPT, 12, stop_ids=(found[0],))) == []


def test_it_ends_after_so_many_tokens():
    longer = list(generator()(PROMPT, 12))
    assert list(generator()(PROMPT, 1)) == longer[:1]
    assert list(generator()(PROMPT, 5)) == longer[:5]
    assert generator().timings["tokens"] == 5


def test_it_ends_with_the_context():
    """The answer to a long prompt is cut, and its last tokens are still the likeliest."""
    prompt = (PROMPT * 9)[:60]
    found = list(generator()(prompt, 1000))
    assert len(found) == 4
    assert found == [int(last_logits("dense", prompt + found[:i]).argmax()) for i in range(4)]
    assert len(list(generator()((PROMPT * 10)[:63], 1000))) == 1
    with pytest.raises(UserError, match="the prompt has 64 tokens, and the model's context is 64; shorten it"):
        next(generator()((PROMPT * 10)[:64], 1))
    with pytest.raises(UserError, match="the prompt is empty"):
        next(generator()([], 1))


def test_a_text_that_is_left_off_does_no_harm():
    expected = list(generator()(PROMPT, 8))
    assert list(islice(generator()(PROMPT, 8), 3)) == expected[:3]
    assert list(generator()(PROMPT, 8)) == expected


def test_parameters_may_be_read_while_the_first_programs_are_compiled():
    model, mesh, reads = model_of("dense"), tiny.mesh(data=1), []
    params = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), tiny.params(model), abstract_params(model, mesh)
    )

    def read():
        reads.append(len(reads))
        if reads == [0]:
            raise UserError("a file is damaged")
        return params

    late = Generator(model, read, mesh)
    with pytest.raises(UserError, match="the prompt is empty"):
        next(late([], 1))
    assert reads == []
    with pytest.raises(UserError, match="a file is damaged"):
        next(late(PROMPT, 8))
    assert list(late(PROMPT, 8)) == list(late(PROMPT, 8)) == list(generator()(PROMPT, 8))
    np.testing.assert_array_equal(late.logits(PROMPT), generator().logits(PROMPT))
    assert reads == [0, 1]


def test_few_programs_serve_every_length():
    once = Generator(model_of("dense"), tiny.params(model_of("dense")), tiny.mesh(data=1))
    for length in range(1, 31):
        list(once([1] * length, 2))
    assert len(once._programs) == 2
    assert [bucket(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]


def test_a_batch_of_prompts_gives_what_each_gives_alone():
    """Different lengths, temperatures and seeds side by side, over a mesh that splits sequences and heads."""
    model, mesh = model_of("dense"), make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    params = jax.device_put(tiny.params(model), {k: v.sharding for k, v in abstract_params(model, mesh).items()})
    prompts, draws = [PROMPT, PROMPT[:3], PROMPT[2:], [9]], [(0.0, 0), (1.0, 5), (0.7, 6), (0.0, 1)]
    alone = [
        list(generator()(prompt, 6, temperature=temperature, seed=seed))
        for prompt, (temperature, seed) in zip(prompts, draws, strict=True)
    ]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    prefill = prefill_program(model, mesh, shapes, 4, 8, 16).compile()
    decode = decode_program(model, mesh, shapes, 4, 16).compile()
    rows = np.zeros((4, 8), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    temperature, seed = np.array([d[0] for d in draws], np.float32), np.array([d[1] for d in draws], np.uint32)
    tokens, cache = prefill(params, rows, lengths, temperature, seed)
    found = [np.asarray(tokens)]
    for step in range(5):
        tokens, cache = decode(params, tokens, lengths + np.int32(step), cache, temperature, seed)
        found.append(np.asarray(tokens))
    assert np.concatenate(found, axis=1).tolist() == alone


def test_the_cache_is_written_in_place():
    model, mesh = model_of("dense"), tiny.mesh(data=1)
    decode = decode_program(model, mesh, abstract_serving_params(model, mesh), 2, 64).compile()
    cache = 2 * model.num_layers * 2 * 64 * model.num_kv_heads * model.head_dim * 4
    assert decode.memory.alias >= cache


@pytest.mark.described
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")  # jax's, of absent devices
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_pattern": ("local", "global"), "sliding_window": 512},
        {"num_experts": 4, "moe_mlp_dim": 512, "num_dense_layers": 1},
    ],
    ids=["dense", "local and global", "moe"],
)
def test_on_tpus_serving_holds_the_weights_one_cache_and_little_more(changes):
    """Of sizes that TPUs hold without filling up, so that the arguments can be counted by hand."""
    pytest.importorskip("libtpu")
    layers, d, heads, kv_heads, h, f, vocab, batch, size = 4, 512, 8, 4, 128, 1024, 1024, 16, 2048
    shape = {"num_layers": layers, "embed_dim": d, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": h}
    model = tiny.model(**shape, mlp_dim=f, vocab_size=vocab, max_seq_len=size, dtype="bfloat16", **changes)
    mesh = Target.parse("v5p:2x2x1").mesh(MeshConfig(data=2, fsdp=1, tensor=2))
    params = abstract_serving_params(model, mesh)

    layer_cache = 2 * (batch // 2) * size * (kv_heads // 2) * h * 2  # k and v, over data, over tensor, bfloat16
    attention, mlp = d * h * 2 * (heads + kv_heads), 3 * d * f
    moe = 4 * 3 * d * 512 + 2 * d * 4  # the expert axis has one device; the router is whole on each
    feed_forward = mlp + (layers - 1) * moe if "num_experts" in changes else layers * mlp
    weights = 2 * (2 * vocab * d + layers * attention + feed_forward) // 2  # bfloat16, over tensor

    decode = decode_program(model, mesh, params, batch, size).compile().memory
    assert decode.argument == pytest.approx(weights + layers * layer_cache, rel=0.01)
    assert decode.alias == layers * layer_cache, "the cache is written where it is"
    assert decode.temp < layer_cache / 2, "not even one layer's keys are held twice"
    assert decode.peak < decode.argument + layer_cache, "a second cache would be four layers"

    prefill = prefill_program(model, mesh, params, batch, 128, size).compile().memory
    assert prefill.output == pytest.approx(layers * layer_cache, rel=0.01)
    # Its attention kernel has one layer's keys and values laid out anew; what is left is 128 tokens' activations.
    assert prefill.peak < prefill.argument + prefill.output + 1.5 * layer_cache
