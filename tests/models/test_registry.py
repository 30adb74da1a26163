"""config.json and ModelConfig: both directions, both spellings of transformers, and what is refused."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import ModelConfig, RopeConfig, UserError, check_model
from llmos_jax.models.decoder import num_params
from llmos_jax.models.families import FAMILIES
from llmos_jax.models.registry import PRESETS, _llama3_scaling, model_from_hf, model_to_hf, shortest_pattern
from tests.models import golden

# Published parameter counts (embedding counted once where it is tied).
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma2-9b": 9_241_705_984,
    "gemma3-27b": 27_009_346_304,
    "gpt2": 124_439_808,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-235b-a22b": 235_093_634_560,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    check_model(PRESETS[name])
    assert num_params(PRESETS[name]) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_config_json(name):
    assert model_from_hf(model_to_hf(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize("name", golden.names())
def test_configs_written_by_transformers_survive(name):
    model = model_from_hf(golden.load(name).config)
    assert model_from_hf(model_to_hf(model)) == model


LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@given(
    scaling=st.sampled_from(["linear", "llama3", "yarn"]),
    factor=st.floats(1.5, 64),
    theta=st.floats(100, 1e7),
    type_key=st.sampled_from(["type", "rope_type"]),
)
def test_both_spellings_of_rope_scaling_mean_the_same(scaling, factor, theta, type_key):
    parameters = {"factor": factor, "original_max_position_embeddings": 128}
    old = LLAMA | {"rope_theta": theta, "rope_scaling": {type_key: scaling, **parameters}}
    new = LLAMA | {"rope_parameters": {"rope_type": scaling, "rope_theta": theta, **parameters}}
    assert model_from_hf(old) == model_from_hf(new)
    original = 0 if scaling == "linear" else 128
    expected = RopeConfig(theta=theta, scaling=scaling, factor=factor, original_max_seq_len=original)
    assert model_from_hf(old).rope == expected


def test_yarn_s_mscale_becomes_an_attention_factor():
    scaling = {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    rope = model_from_hf(LLAMA | {"rope_scaling": scaling}).rope
    assert rope.attention_factor == pytest.approx((0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1))
    assert rope.original_max_seq_len == 512


def test_what_transformers_fills_in():
    model = model_from_hf(LLAMA)
    assert (model.num_kv_heads, model.head_dim, model.norm_eps, model.rope.theta) == (4, 16, 1e-6, 10_000.0)
    assert not model.tie_embeddings
    assert model.layer_pattern == ("global",)


def test_mistral_s_window_may_be_null():
    mistral = LLAMA | {"model_type": "mistral"}
    assert model_from_hf(mistral).sliding_window == 4_096
    assert model_from_hf(mistral | {"sliding_window": None}).layer_pattern == ("global",)


def test_qwen_s_windows_start_at_a_layer():
    qwen = LLAMA | {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8, "max_window_layers": 2}
    assert model_from_hf(qwen).sliding_window is None
    model = model_from_hf(qwen | {"use_sliding_window": True})
    assert [kind for kind, _ in model.layer_kinds] == ["global", "global", "local", "local"]
    types = ["sliding_attention", "full_attention"] * 2
    model = model_from_hf(qwen | {"use_sliding_window": True, "layer_types": types})
    assert model.layer_pattern == ("local", "global")


def test_gemma3_as_it_is_published_with_images():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    model = model_from_hf({"model_type": "gemma3", "text_config": text | scaling, "vision_config": {}})
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) == (8, 4, 256, 262_208)
    assert model.layer_pattern == ("local",) * 5 + ("global",)
    assert model.rope == RopeConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8.0)
    assert model.tie_embeddings and model.norm_offset and model.qk_norm
    assert model.attention_scale == 256**-0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "'bert' model.*it reads llama, mistral"),
        ({}, "no model_type"),
        ({"model_type": "llama"}, "has no vocab_size"),
        (LLAMA | {"hidden_act": "relu"}, "activation 'relu'"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        (LLAMA | {"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        (LLAMA | {"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        (
            LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["x"]},
            "layer_types",
        ),
        (LLAMA | {"num_key_value_heads": 3}, "num_heads=4 is not a multiple"),
    ],
)
def test_what_cannot_be_read_is_said(config, message):
    with pytest.raises(UserError, match=message):
        model_from_hf(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "qk_norm=True cannot be written"),
        ({"layer_pattern": ("local", "global"), "sliding_window": 8}, "layer_pattern"),
        ({"logit_softcap": 30.0}, "logit_softcap"),
        ({"family": "unheard"}, "'unheard' is not known"),
    ],
)
def test_a_family_that_cannot_say_it_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        model_to_hf(dataclasses.replace(ModelConfig(), **changes))


def test_every_family_is_in_both_tables():
    from llmos_jax.models.weights.names import FAMILY_NAMES

    assert FAMILIES.keys() == FAMILY_NAMES.keys()


@given(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=12))
def test_the_shortest_pattern_repeats_to_the_whole(kinds):
    pattern = shortest_pattern(tuple(kinds))
    assert [pattern[i % len(pattern)] for i in range(len(kinds))] == kinds
    shorter = pattern[:-1]
    assert not shorter or [shorter[i % len(shorter)] for i in range(len(kinds))] != kinds


def test_llama3_scaling_is_read_back_from_a_gguf_s_divisors():
    from types import SimpleNamespace

    import numpy as np

    from llmos_jax.models.layers import rope_frequencies

    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_max_seq_len=8_192)
    scaled, _ = rope_frequencies(rope, 64, rope.theta)
    plain, _ = rope_frequencies(RopeConfig(theta=500_000.0), 64, 500_000.0)
    field = SimpleNamespace(contents=lambda: 500_000.0)
    reader = SimpleNamespace(fields={"llama.rope.freq_base": field}, tensors=[])
    assert _llama3_scaling(reader, "llama", plain / scaled)["factor"] == pytest.approx(32.0)
    with pytest.raises(UserError, match="does not know"):
        _llama3_scaling(reader, "llama", np.linspace(1, 5, 32))
