"""Makes tests/goldens: for a tiny random model of each family, the logits that `transformers` computes in float32.

Needs torch and transformers 5. Run from the repository root: `python scripts/make_goldens.py [--check]`.
With --check nothing is written; it fails where a stored golden differs from what transformers computes now.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models import golden

NUM_TOKENS = 24  # longer than every window below
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# No ids of special tokens: those of the real families are outside of the tiny vocabulary.
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def rope(kind: str, theta: float = 100.0, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {**rope("default", 10_000.0)}),
    "llama_biased": ("LlamaConfig", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16}),
    "llama_linear": ("LlamaConfig", rope("linear", factor=4.0)),
    "llama_llama3": (
        "LlamaConfig",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama_yarn": ("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 8,  # one pattern of six, and two over
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gpt2": ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_raw": (  # the router's probabilities as they are
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
        },
    ),
}


def make(class_name: str, settings: dict) -> golden.Golden:
    shape = {} if class_name == "GPT2Config" else SHAPE
    config = getattr(transformers, class_name)(**{**shape, **NO_IDS, **settings})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            tensors = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
        golden.write_folder(folder, written, tensors)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, NUM_TOKENS), dtype=np.int32)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens).long()).logits.numpy()
    return golden.Golden(written, tensors, tokens, logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is stored instead of storing")
    check = parser.parse_args().check
    golden.FOLDER.mkdir(exist_ok=True)
    for name, (class_name, settings) in CONFIGS.items():
        made = make(class_name, settings)
        if check:
            stored = golden.load(name)
            np.testing.assert_array_equal(stored.tokens, made.tokens)
            np.testing.assert_allclose(stored.logits, made.logits, atol=1e-5, err_msg=name)
        else:
            described = {"config": made.config, "tensors": made.tensors}
            (golden.FOLDER / f"{name}.json").write_text(json.dumps(described) + "\n")
            np.savez_compressed(golden.FOLDER / f"{name}.npz", tokens=made.tokens, logits=made.logits)
        print(f"{name}: logits of standard deviation {made.logits.std():.3f}")


if __name__ == "__main__":
    main()
