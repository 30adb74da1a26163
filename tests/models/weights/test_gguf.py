"""GGUF files give the parameters and the configuration that the same model's safetensors give."""

import dataclasses

import gguf
import numpy as np
import pytest

from llmos_jax.config import UserError
from llmos_jax.models.decoder import abstract_params
from llmos_jax.models.weights import load_model_config, load_weights
from tests.models import golden
from tests.models.weights import gguf_files

# What a GGUF cannot say (see models/registry.py): the llama architecture's windows, and settings that llama.cpp
# takes from the size of the published models.
UNSAID = {"family", "layer_pattern", "sliding_window", "attention_scale", "rope"}
NAMES = [n for n in golden.names() if n not in ("llama_llama3", "qwen2_window", "qwen3_moe_raw")]


@pytest.fixture
def make(tmp_path):
    def make(name, quantization=None):
        stored = golden.load(name)
        folder = golden.write_folder(tmp_path / name, stored.config, stored.tensors)
        return folder, gguf_files.write(tmp_path / f"{name}.gguf", folder, stored, quantization)

    return make


def load(path):
    model = load_model_config(path)
    return model, load_weights(path, model, abstract_params(model))


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_is_the_same_model(make, name):
    folder, path = make(name)
    model, params = load(path)
    expected, expected_params = load(folder)
    for field in dataclasses.fields(expected):
        if field.name not in UNSAID:
            assert getattr(model, field.name) == getattr(expected, field.name), field.name
    if name != "mistral":
        assert model.layer_pattern[:1] == expected.layer_pattern[:1]
    assert (model.rope.theta, model.rope.scaling) == (expected.rope.theta, expected.rope.scaling)
    assert params.keys() == expected_params.keys()
    for key, value in expected_params.items():
        np.testing.assert_allclose(params[key], value, atol=2e-7, err_msg=key)  # Gemma's norms went through 1 + w - 1


def test_rope_scaling_comes_along(make):
    for name in ("llama_linear", "llama_yarn"):
        folder, path = make(name)
        assert load_model_config(path).rope == load_model_config(folder).rope


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_are_those_of_the_format(make, kind):
    quantization = gguf.GGMLQuantizationType[kind]
    folder, path = make("qwen3", quantization)
    _, params = load(path)
    _, exact = load(folder)
    tensors = gguf_files.convert(folder, golden.load("qwen3").config)
    up = tensors["blk.1.ffn_up.weight"]
    read_back = gguf.dequantize(gguf.quantize(up, quantization), quantization)
    np.testing.assert_array_equal(params["segments.0.0.mlp.up"][1], read_back.T)
    assert 0 < np.abs(params["embed.table"] - exact["embed.table"]).max() < 0.2


def test_a_gguf_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"'mamba' model.*it reads llama, qwen2"):
        load_model_config(tmp_path / "x.gguf")


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.9])
def test_a_gguf_cut_short_is_refused(make, keep):
    _, path = make("llama")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match="is not a GGUF file, or is damaged or cut short"):
        load_model_config(path)


def test_a_gguf_without_a_tensor_is_refused(make, monkeypatch):
    whole = gguf_files.convert
    monkeypatch.setattr(
        gguf_files, "convert", lambda *a: {k: v for k, v in whole(*a).items() if k != "blk.1.ffn_up.weight"}
    )
    _, path = make("llama")
    with pytest.raises(UserError, match=r"has no blk.1.ffn_up.weight"):
        load(path)


def test_a_gguf_with_a_strange_tensor_is_refused(make, monkeypatch):
    whole = gguf_files.convert
    monkeypatch.setattr(gguf_files, "convert", lambda *a: whole(*a) | {"blk.0.ssm.weight": np.zeros(3, np.float32)})
    _, path = make("llama")
    with pytest.raises(UserError, match=r"holds blk.0.ssm.weight"):
        load(path)


def test_one_part_of_a_split_gguf_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="one part of a split GGUF"):
        load_model_config(tmp_path / "x-00001-of-00002.gguf")
