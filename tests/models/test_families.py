"""Every family computes what transformers computes, and what is exported reads back bit for bit."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.config import RopeConfig
from llmos_jax.models.decoder import abstract_params, forward_logits
from llmos_jax.models.weights import load_model_config, load_weights
from llmos_jax.models.weights.huggingface import export
from tests.models import golden

ROOT = Path(__file__).parents[2]
NAMES = golden.names()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            stored = golden.load(name)
            made[name] = golden.write_folder(tmp_path_factory.mktemp(name), stored.config, stored.tensors)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def loaded(folders):
    made = {}

    def load(name: str):
        if name not in made:
            model = load_model_config(folders(name))
            made[name] = model, load_weights(folders(name), model, abstract_params(model))
        return made[name]

    return load


def logits(model, params, tokens) -> np.ndarray:
    return np.asarray(jax.jit(forward_logits, static_argnums=0)(model, params, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name, loaded):
    stored = golden.load(name)
    model, params = loaded(name)
    np.testing.assert_allclose(logits(model, params, stored.tokens), stored.logits, atol=1e-4, rtol=0)


# Each golden must be able to see the feature it is there for: without it, the logits differ.
CHANGES = {
    "llama_linear": {"rope": RopeConfig(theta=100.0)},
    "llama_llama3": {"rope": RopeConfig(theta=100.0)},
    "llama_yarn": {"rope": RopeConfig(theta=100.0)},
    "mistral": {"sliding_window": 64},
    "qwen2_window": {"layer_pattern": ("local", "global", "local")},
    "gemma2": {"attention_softcap": None},
    "gemma3": {"layer_pattern": ("local",) * 3 + ("global",)},
    "qwen3_moe": {"norm_topk": False},
    "qwen3_moe_raw": {"norm_topk": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_golden_sees_its_feature(name, loaded):
    stored = golden.load(name)
    model, params = loaded(name)
    layers = {}
    for layer in range(model.num_layers):  # the parameters by layer, so that another pattern can take them
        s, j, r = model.layer_slot(layer)
        for path, value in params.items():
            if path.startswith(f"segments.{s}.{j}."):
                layers[layer, path.split(".", 3)[3]] = value[r]
    changed = dataclasses.replace(model, **CHANGES[name])
    stacks = {path: value for path, value in params.items() if not path.startswith("segments")}
    slots: dict[str, list[jax.Array]] = {}
    for (layer, part), value in sorted(layers.items()):
        s, j, _ = changed.layer_slot(layer)
        slots.setdefault(f"segments.{s}.{j}.{part}", []).append(value)
    stacks |= {path: jnp.stack(values) for path, values in slots.items()}
    assert np.abs(logits(changed, stacks, stored.tokens) - stored.logits).max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_export_then_import_is_bit_for_bit(name, loaded, tmp_path):
    model, params = loaded(name)
    export(tmp_path / "out", model, params, max_shard_bytes=50_000)
    again = load_model_config(tmp_path / "out")
    assert again == model
    read = load_weights(tmp_path / "out", again, abstract_params(again))
    assert read.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(read[path]), np.asarray(value), err_msg=path)


REFERENCE = """
import sys
import numpy, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load(sys.argv[2])["tokens"]).long()).logits
numpy.save(sys.argv[3], logits.numpy())
"""


def reference_python() -> str:
    """The interpreter with torch and transformers: LLMOS_REFERENCE_PYTHON, or this one."""
    python = os.environ.get("LLMOS_REFERENCE_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("needs torch and transformers, here or at LLMOS_REFERENCE_PYTHON")
    return python


@pytest.mark.reference
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_is_exported(name, loaded, tmp_path):
    stored = golden.load(name)
    model, params = loaded(name)
    export(tmp_path / "out", model, params, max_shard_bytes=50_000)
    arguments = [tmp_path / "out", golden.FOLDER / f"{name}.npz", tmp_path / "logits.npy"]
    subprocess.run([reference_python(), "-c", REFERENCE, *map(str, arguments)], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), stored.logits, atol=1e-5, rtol=0)


@pytest.mark.reference
def test_the_goldens_are_what_transformers_computes():
    subprocess.run([reference_python(), ROOT / "scripts" / "make_goldens.py", "--check"], check=True, cwd=ROOT)
