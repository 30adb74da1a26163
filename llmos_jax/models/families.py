"""The table of model families, as data.

A family is a row of `FAMILIES`: which key of `config.json` holds which field of ModelConfig, what never varies in the
family, and what llmos refuses to read because it would compute something else. `registry.py` applies the table; the
names of the tensors are in `weights/names.py`. Defaults are those of `transformers`, which leaves some keys out.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

REQUIRED = object()

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


@dataclass(frozen=True)
class Key:
    """A field of ModelConfig and the key of `config.json` that holds it; `default` where the key is absent."""

    ours: str
    theirs: str
    default: Any = REQUIRED


@dataclass(frozen=True)
class Family:
    """One architecture. `windows` says which layers see a sliding window:

    "none"; "all" (where `sliding_window` is set); "typed" (by `layer_types`, and where that is absent from the layer
    that `use_sliding_window` and `max_window_layers` tell, or all but each `window_period`-th).
    """

    model_type: str  # in config.json
    architecture: str  # the class transformers loads
    gguf: str  # general.architecture in a GGUF
    keys: tuple[Key, ...]
    always: dict[str, Any]  # fields of ModelConfig that are the same in the whole family
    only: dict[str, tuple[Any, ...]]  # keys of config.json that llmos reads with these values alone
    windows: str = "none"
    window_period: int = 0
    theta: float = 10_000.0  # base of the rotary embedding where config.json has none
    activation_key: str = "hidden_act"
    default_activation: str = "silu"


_CORE = (
    Key("vocab_size", "vocab_size"),
    Key("num_layers", "num_hidden_layers"),
    Key("embed_dim", "hidden_size"),
    Key("num_heads", "num_attention_heads"),
    Key("num_kv_heads", "num_key_value_heads", None),
    Key("head_dim", "head_dim", None),
    Key("mlp_dim", "intermediate_size"),
    Key("max_seq_len", "max_position_embeddings"),
    Key("norm_eps", "rms_norm_eps", 1e-6),
)
_UNTIED = Key("tie_embeddings", "tie_word_embeddings", False)
_BIAS = Key("qkv_bias", "attention_bias", False)
_OUT_BIAS = Key("attention_out_bias", "attention_bias", False)
_GEMMA = (
    Key("tie_embeddings", "tie_word_embeddings", True),
    Key("attention_scale", "query_pre_attn_scalar", 256),
    _BIAS,
    _OUT_BIAS,
)
_GEMMA_ALWAYS = {"norm_offset": True, "sandwich_norm": True}
_CAUSAL_GEMMA = {"use_bidirectional_attention": (None, False)}


def _with_defaults(keys: tuple[Key, ...], **defaults: Any) -> tuple[Key, ...]:
    return tuple(dataclasses.replace(key, default=defaults.get(key.ours, key.default)) for key in keys)


_GEMMA3_SHAPE = {  # a nested text_config leaves these out where they are the class's own
    "vocab_size": 262_208,
    "num_layers": 26,
    "embed_dim": 2_304,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 256,
    "mlp_dim": 9_216,
    "max_seq_len": 131_072,
}
_QWEN3 = (*_with_defaults(_CORE, head_dim=128), _UNTIED, _BIAS, _OUT_BIAS)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        keys=(*_CORE, _UNTIED, _BIAS, _OUT_BIAS),
        always={},
        only={"mlp_bias": (False, None)},
    ),
    "mistral": Family(
        "mistral", "MistralForCausalLM", "llama", keys=(*_CORE, _UNTIED), always={}, only={}, windows="all"
    ),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        keys=(*_CORE, _UNTIED),
        always={"qkv_bias": True},
        only={},
        windows="typed",
    ),
    "qwen3": Family(
        "qwen3", "Qwen3ForCausalLM", "qwen3", keys=_QWEN3, always={"qk_norm": True}, only={}, windows="typed"
    ),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        keys=(
            *_with_defaults(_CORE, head_dim=256, num_kv_heads=4),
            *_GEMMA,
            Key("attention_softcap", "attn_logit_softcapping", 50.0),
            Key("logit_softcap", "final_logit_softcapping", 30.0),
        ),
        always=_GEMMA_ALWAYS,
        only=_CAUSAL_GEMMA,
        windows="typed",
        window_period=2,
        activation_key="hidden_activation",
        default_activation="gelu_pytorch_tanh",
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        keys=(
            *_with_defaults(_CORE, **_GEMMA3_SHAPE),
            *_GEMMA,
            Key("attention_softcap", "attn_logit_softcapping", None),
            Key("logit_softcap", "final_logit_softcapping", None),
        ),
        always={**_GEMMA_ALWAYS, "qk_norm": True},
        only=_CAUSAL_GEMMA,
        windows="typed",
        window_period=6,
        theta=1_000_000.0,
        activation_key="hidden_activation",
        default_activation="gelu_pytorch_tanh",
    ),
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        keys=(
            Key("vocab_size", "vocab_size"),
            Key("num_layers", "n_layer"),
            Key("embed_dim", "n_embd"),
            Key("num_heads", "n_head"),
            Key("mlp_dim", "n_inner", None),
            Key("max_seq_len", "n_positions", 1_024),
            Key("norm_eps", "layer_norm_epsilon", 1e-5),
            Key("tie_embeddings", "tie_word_embeddings", True),
        ),
        always={
            "position": "learned",
            "norm": "layernorm",
            "gated_mlp": False,
            "mlp_bias": True,
            "qkv_bias": True,
            "attention_out_bias": True,
        },
        only={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        activation_key="activation_function",
        default_activation="gelu_new",
    ),
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        "llama",
        keys=(
            *_with_defaults(_CORE, norm_eps=1e-5),
            _UNTIED,
            Key("num_experts", "num_local_experts", 8),
            Key("num_experts_per_token", "num_experts_per_tok", 2),
        ),
        always={"norm_topk": True},
        only={},
        windows="all",
        theta=1_000_000.0,
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        keys=(
            *_CORE,
            _UNTIED,
            _BIAS,
            _OUT_BIAS,
            Key("num_experts", "num_experts", 128),
            Key("num_experts_per_token", "num_experts_per_tok", 8),
            Key("moe_mlp_dim", "moe_intermediate_size", 768),
            Key("norm_topk", "norm_topk_prob", False),
        ),
        always={"qk_norm": True},
        only={"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
        windows="all",
    ),
}
