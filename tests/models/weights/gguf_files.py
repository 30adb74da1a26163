"""Writes tiny models as GGUF files, the way llama.cpp's converter does, from its documentation and not from our map."""

import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.models.golden import Golden

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EXPERT_NAMES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
TOP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}


def convert(folder: Path, config: dict) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder under GGUF names, with llama.cpp's changes of layout and value."""
    kind, experts = config["model_type"], {}
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        stem, suffix = name.rsplit(".", 1)
        match = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", stem)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if kind == "gpt2" and match and value.ndim == 2:
            value = np.ascontiguousarray(value.T)
        if not match:
            tensors[f"{TOP_NAMES[stem]}.{suffix}"] = value
            continue
        layer, part = match.groups()
        if expert := re.fullmatch(r".*experts\.(\d+)\.(\w+)", part):
            experts.setdefault(f"blk.{layer}.ffn_{EXPERT_NAMES[expert[2]]}_exps.weight", {})[int(expert[1])] = value
            continue
        if ARCHITECTURES.get(kind, kind) == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
            shape = value.shape
            value = value.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        short = (GEMMA_NAMES if kind.startswith("gemma") else {}).get(part) or LAYER_NAMES[part]
        tensors[f"blk.{layer}.{short}.{suffix}"] = value
    for name, parts in experts.items():
        tensors[name] = np.stack([parts[i] for i in range(len(parts))])
    return tensors


def metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    kind = config["model_type"]
    if kind == "gpt2":
        writer.add_block_count(config["n_layer"])
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if kind.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def write(path: Path, folder: Path, stored: Golden, quantization: gguf.GGMLQuantizationType | None = None) -> Path:
    """The model in `folder` as a GGUF; matrices quantized where `quantization` is given."""
    kind = stored.config["model_type"]
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(kind, kind))
    metadata(writer, stored.config)
    for name, value in convert(folder, stored.config).items():
        if quantization is not None and value.ndim > 1 and value.shape[-1] % 32 == 0:  # whole blocks
            writer.add_tensor(name, gguf.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
