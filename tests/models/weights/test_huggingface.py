"""Hugging Face folders: damage is told, slices are read, other spellings are known, exports are whole."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmos_jax.config import MeshConfig, UserError
from llmos_jax.models.decoder import abstract_params
from llmos_jax.models.weights import load_model_config, load_weights
from llmos_jax.models.weights.huggingface import export
from llmos_jax.sharding import make_mesh
from tests.models import golden


@pytest.fixture
def folder(tmp_path):
    stored = golden.load("llama")
    return golden.write_folder(tmp_path / "llama", stored.config, stored.tensors)


def load(folder, **changes):
    model = load_model_config(folder)
    abstract = abstract_params(model, make_mesh(MeshConfig()))
    if changes:
        abstract = {
            k: jax.ShapeDtypeStruct(v.shape, changes["dtype"], sharding=v.sharding) for k, v in abstract.items()
        }
    return model, load_weights(folder, model, abstract)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_layers_are_stacked_and_turned_to_our_layout(folder):
    _, params = load(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        q = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(params["segments.0.0.attention.q"][layer], q.T.reshape(32, 4, 8))
        o = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
        np.testing.assert_array_equal(params["segments.0.0.attention.o"][layer], o.T.reshape(4, 8, 32))
    np.testing.assert_array_equal(params["head.kernel"], tensors["lm_head.weight"].T)


def test_weights_are_cast_to_what_is_asked(folder):
    _, params = load(folder, dtype=jnp.bfloat16)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert params["embed.table"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["embed.table"], table.astype(jnp.bfloat16))


def test_progress_counts_bytes(folder):
    model, seen = load_model_config(folder), []
    load_weights(folder, model, abstract_params(model), lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(np.prod(s) * 4 for s in golden.load("llama").tensors.values())


def test_a_file_cut_short_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or cut short"):
        load(folder)


def test_garbage_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="damaged"):
        load(folder)


def test_missing_tensors_are_named(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    with pytest.raises(UserError, match=r"has no model.layers.1.+ and 6 more"):
        load(folder)


def test_unexpected_tensors_are_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}))
    with pytest.raises(UserError, match=r"holds model.layers.0.self_attn.q_proj.bias, which a llama model"):
        load(folder)


def test_other_shapes_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match=r"embed_tokens.weight of shape \(96, 32\).*means \(100, 32\)"):
        load(folder)


def test_a_missing_shard_is_named(folder, tmp_path):
    export(tmp_path / "out", *load(folder), max_shard_bytes=20_000)
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-"):
        load(tmp_path / "out")


def test_buffers_and_a_tied_head_in_old_files_are_passed_over(tmp_path):
    stored = golden.load("gpt2")
    folder = golden.write_folder(tmp_path / "gpt2", stored.config, stored.tensors)
    _, expected = load(folder)

    def as_published(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    rewrite(folder, as_published)
    _, params = load(folder)
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value)


def test_gemma3_with_images_gives_its_text_model(tmp_path):
    stored = golden.load("gemma3")
    folder = golden.write_folder(tmp_path / "gemma3", stored.config, stored.tensors)
    _, expected = load(folder)

    def as_published(tensors):
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)

    rewrite(folder, as_published)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": stored.config}))
    _, params = load(folder)
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value)


def test_an_export_never_overwrites(folder, tmp_path):
    model, params = load(folder)
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", model, params)  # empty: taken
    with pytest.raises(UserError, match="exists and is not empty"):
        export(tmp_path / "out", model, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]  # no temporary folder is left


def test_an_export_casts_and_brings_the_tokenizer(folder, tmp_path):
    model, params = load(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "bos_token_id": 0}')
    export(tmp_path / "out", model, params, dtype="bfloat16", tokenizer_folder=folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["eos_token_id"], config["bos_token_id"]) == ("bfloat16", [1, 2], 0)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}


def test_a_failed_export_leaves_nothing(folder, tmp_path, monkeypatch):
    from llmos_jax.models.weights import huggingface

    def fail(*arguments):
        raise KeyboardInterrupt

    model, params = load(folder)
    monkeypatch.setattr(huggingface, "_write_companions", fail)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out", model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


SHARDED = """
import sys
import jax, numpy as np
from llmos_jax.config import MeshConfig
from llmos_jax.models.decoder import abstract_params
from llmos_jax.models.weights import load_model_config, load_weights
from llmos_jax.models.weights import huggingface
from llmos_jax.sharding import make_mesh
folder, out = sys.argv[1:]
model = load_model_config(folder)
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
parts = []
read = huggingface._Safetensors.read
def watched(self, entry, layer, index):
    part = read(self, entry, layer, index)
    parts.append(part.size if entry.has_experts else 0)
    return part
huggingface._Safetensors.read = watched
abstract = abstract_params(model, mesh)
params = load_weights(folder, model, abstract)
assert max(parts) == model.num_experts * model.embed_dim * model.mlp_dim // 8, max(parts)
alone = load_weights(folder, model, abstract_params(model))
for path, value in params.items():
    assert value.sharding.is_equivalent_to(abstract[path].sharding, value.ndim), path
    np.testing.assert_array_equal(np.asarray(value), np.asarray(alone[path]))
huggingface.export(out, model, params)
"""


def test_each_device_gets_its_own_part(tmp_path):
    stored = golden.load("mixtral")
    folder = golden.write_folder(tmp_path / "mixtral", stored.config, stored.tensors)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(folder), str(tmp_path / "out")]
    subprocess.run(command, check=True, env=environment)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a model folder"),
        ({"pytorch_model.bin": "", "config.json": "{}"}, "pickles"),
        ({"a.gguf": "", "b.gguf": ""}, "2 GGUF files; name one: a.gguf, b.gguf"),
        ({"config.json": "not json", "model.safetensors": ""}, "cannot be read as JSON"),
        ({"config.json": "[]", "model.safetensors": ""}, "no JSON object"),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_model_config(tmp_path)
