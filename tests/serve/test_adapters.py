"""PEFT folders written by hand: the numbers they add, and what is refused."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llmos_jax.config import UserError
from llmos_jax.models.decoder import abstract_params
from llmos_jax.models.weights.names import family_names, sizes
from llmos_jax.serve.adapters import load_adapter
from tests import tiny

LLAMA = tiny.model(num_kv_heads=2)
GPT2 = tiny.model(
    family="gpt2",
    position="learned",
    norm="layernorm",
    gated_mlp=False,
    mlp_bias=True,
    qkv_bias=True,
    attention_out_bias=True,
    tie_embeddings=True,
)
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none", "use_dora": False}
Q, K, OUT, DOWN = (
    f"model.layers.1.{x}" for x in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
)
SHAPES = {Q: (32, 16), K: (8, 16), OUT: (16, 32), DOWN: (16, 32)}  # [out, in], as torch's Linear


def tensors(shapes: dict[str, tuple[int, int]], rank: int = 4, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for module, (num_out, num_in) in shapes.items():
        found[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((rank, num_in)).astype(dtype)
        found[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((num_out, rank)).astype(dtype)
    return found


def write(folder: Path, values: dict[str, np.ndarray], **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(values, folder / "adapter_model.safetensors")
    return folder


def delta(values: dict[str, np.ndarray], module: str) -> np.ndarray:
    """B A, what LoRA adds to a torch weight [out, in]."""
    a, b = (np.asarray(values[f"base_model.model.{module}.lora_{side}.weight"], np.float64) for side in "AB")
    return b @ a


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_added_to_each_projection(tmp_path, dtype):
    values = tensors(SHAPES, dtype=dtype)
    adapter = load_adapter(write(tmp_path / "mine", values), LLAMA)
    assert (adapter.name, adapter.rank, len(adapter.layers)) == ("mine", 4, 2)
    assert adapter.layers[0] == {} and set(adapter.layers[1]) == {"q", "k", "o", "down"}
    for module, name in ((Q, "q"), (K, "k"), (OUT, "o"), (DOWN, "down")):
        a, b = adapter.layers[1][name]
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a @ b, 1.5 * delta(values, module).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model", "prefix"), [(LLAMA, "model.layers.0."), (GPT2, "transformer.h.0.")])
def test_the_sum_of_weight_and_adapter_is_the_merged_weight(tmp_path, model, prefix):
    """W + B A as it lies in the model's own file, read by the weights' own map, is W + (A B) in our layout."""
    entries = [
        e for e in family_names(model).entries if e.ours.startswith(("*.attention.", "*.mlp.")) and "bias" not in e.ours
    ]
    entries = [e for e in entries if "norm" not in e.ours]
    shapes = {e.name(0).removesuffix(".weight"): e.file_shape(sizes(model)) for e in entries}
    is_conv = model is GPT2  # torch's Conv1D holds [in, out]
    values = tensors({m: shape[::-1] if is_conv else shape for m, shape in shapes.items()})
    adapter = load_adapter(write(tmp_path / "a", values, use_rslora=True), model)
    ours = {path.rpartition(".")[2]: leaf.shape[1:] for path, leaf in abstract_params(model).items()}
    assert set(adapter.layers[0]) == {e.ours.rpartition(".")[2] for e in entries}
    for entry in entries:
        added = 6 / math.sqrt(4) * delta(values, entry.name(0).removesuffix(".weight"))
        in_file = added.T if is_conv else added
        name = entry.ours.rpartition(".")[2]
        everything = tuple(slice(None) for _ in ours[name])
        wanted = entry.read(lambda part, x=in_file: x[part], everything, sizes(model))
        a, b = adapter.layers[0][name]
        assert wanted.shape == ours[name]
        np.testing.assert_allclose((a @ b).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


def test_ranks_and_alphas_of_their_own(tmp_path):
    values = tensors({Q: SHAPES[Q]}) | tensors({K: SHAPES[K]}, rank=2)
    changes = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.k_proj": 10}}
    adapter = load_adapter(write(tmp_path / "a", values, **changes), LLAMA)
    assert adapter.rank == 4
    for module, name, scale in ((Q, "q", 1.5), (K, "k", 5.0)):
        a, b = adapter.layers[1][name]
        assert a.shape[1] == b.shape[0] == 4
        np.testing.assert_allclose(a @ b, scale * delta(values, module).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'."),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"bias": "all"}, "bias='all'"),
        ({"r": 8}, "of rank 4 .* and 8.0 in its"),
        ({"r": "eight"}, "no number under r "),
        ({"lora_alpha": None}, "no number under lora_alpha"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_adapter(write(tmp_path / "a", tensors(SHAPES), **changes), LLAMA)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "holds no tensors"),
        (tensors({"lm_head": (64, 16)}), "lm_head.lora_A.weight, which llmos cannot apply"),
        (tensors({Q.replace("1", "2"): (32, 16)}), "layers.2.*of 2 layers"),
        (tensors({Q: (32, 17)}), r"needs \(rank, 16\) and \(32, rank\)"),
        (tensors({Q: (33, 16)}), "another model"),
        (dict([*tensors({Q: (32, 16)}).items()][:1]), "only one of the two"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(32, np.float32)}, "lora_magnitude_vector"),
        ({f"base_model.model.{Q}.lora_embedding_A": np.ones((4, 32), np.float32)}, "lora_embedding_A"),
        ({name: value * np.nan for name, value in tensors({Q: (32, 16)}).items()}, "not finite"),
    ],
)
def test_other_tensors_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        load_adapter(write(tmp_path / "a", values), LLAMA)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read"):
        load_adapter(tmp_path, LLAMA)
    folder = write(tmp_path / "a", tensors(SHAPES))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_adapter(folder, LLAMA)
    file.unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_adapter(folder, LLAMA)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        load_adapter(folder, LLAMA)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        load_adapter(folder, LLAMA)
