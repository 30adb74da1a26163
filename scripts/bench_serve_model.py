"""A model with random weights, for scripts/bench_serve.py: speed needs no sense.

As a Hugging Face folder, and the same as a GGUF, whose rows of q and k are not put into llama.cpp's order: no time
depends on it.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np

SMALL_VOCABULARY = 2_000  # of the tokenizer; the model's other tokens have no text
SHAPES = {  # TinyLlama-1.1B and Llama-3.2-1B
    "tinyllama": {"vocab_size": 32_000, "num_layers": 22, "num_kv_heads": 4, "mlp_dim": 5_632},
    "llama-1b": {
        "vocab_size": 128_256,
        "num_layers": 16,
        "num_kv_heads": 8,
        "mlp_dim": 8_192,
        "tie_embeddings": True,
    },
}


def write_random(folder: Path, shape: str) -> None:
    from llmos_jax.config import ModelConfig
    from llmos_jax.data.tokenizer import train_bpe
    from llmos_jax.models.decoder import init_params
    from llmos_jax.models.weights import huggingface

    model = ModelConfig(
        **SHAPES[shape],
        embed_dim=2_048,
        num_heads=32,
        head_dim=64,
        max_seq_len=2_048,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )
    texts = (file.read_text(errors="ignore") for file in sorted(Path(os.__file__).parent.glob("*.py"))[:60])
    tokenizer = train_bpe(texts, SMALL_VOCABULARY)
    tokens = folder.parent / "tokenizer"
    tokenizer.save(tokens)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    huggingface.export(folder, model, params, "bfloat16", tokens)


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, file: Path) -> None:
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(64)
    by_id = {i: token for token, i in tokenizer["vocab"].items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([by_id.get(i, f"<unused{i}>") for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_eos_token_id(0)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "flax") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                value = np.asarray(tensors.get_tensor(name).astype("float32"))
                writer.add_tensor(_name(name), value if value.ndim == 1 else value.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"
