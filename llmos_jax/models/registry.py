"""From `config.json` or a GGUF's metadata to a ModelConfig, and back to `config.json`, by the table in `families.py`.

`PRESETS` names well-known models, so that they can be planned and trained without being pulled.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from llmos_jax.config import RUNTIME_MODEL_FIELDS, ModelConfig, RopeConfig, UserError, check_model
from llmos_jax.models.families import ACTIVATIONS, FAMILIES, LAYER_TYPES, REQUIRED, Family, Key
from llmos_jax.models.presets import PRESETS

__all__ = ["PRESETS", "model_from_gguf", "model_from_hf", "model_to_hf"]


def model_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that a Hugging Face `config.json` describes.

    Raises UserError for an architecture llmos does not know, a missing key, and a setting it does not compute.
    """
    name, config = _family_of(config)
    family = FAMILIES[name]
    for key, allowed in family.only.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"config.json has {key}={config[key]!r}, which llmos does not compute for {name} models; "
                f"it reads {key}={allowed[0]!r}"
            )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"the weights are stored quantized ({method}); pull the unquantized model, or a GGUF of it")
    values = {key.ours: _value(config, key) for key in family.keys}
    if "num_local_experts" in config and "num_experts" in values:
        values["num_experts"] = config["num_local_experts"]  # transformers 5 writes this name for every family
    values["activation"] = _activation(config.get(family.activation_key) or family.default_activation)
    values["num_kv_heads"] = values.get("num_kv_heads") or values["num_heads"]
    values["head_dim"] = values.get("head_dim") or values["embed_dim"] // values["num_heads"]
    values["mlp_dim"] = values["mlp_dim"] or 4 * values["embed_dim"]
    if "attention_scale" in values:  # the Gemmas: a scale of the scores, and one of the embedding
        values["attention_scale"] = float(values["attention_scale"]) ** -0.5
        values["embed_scale"] = math.sqrt(values["embed_dim"])
    values["layer_pattern"], values["sliding_window"] = _windows(config, family, values["num_layers"])
    if family.always.get("position") != "learned":
        values["rope"] = _rope(config, family, values["max_seq_len"])
    model = ModelConfig(**(values | family.always | {"family": name}))
    check_model(model)
    return model


def model_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The `config.json` of `model`, in the spelling that transformers 4 and 5 both read.

    Raises UserError where the family has no way to say what `model` is (for example a llama with qk_norm).
    """
    if model.family not in FAMILIES:
        raise UserError(f"model.family={model.family!r} is not known; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[model.family]
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {key.theirs: getattr(model, key.ours) for key in family.keys}
    spellings = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    config[family.activation_key] = (
        family.default_activation
        if ACTIVATIONS[family.default_activation] == model.activation
        else spellings[model.activation]
    )
    if "query_pre_attn_scalar" in config:
        scale = model.attention_scale or model.head_dim**-0.5
        scalar = scale**-2
        config["query_pre_attn_scalar"] = round(scalar) if round(scalar) ** -0.5 == scale else scalar
    _write_windows(config, family, model)
    if model.position == "rope":
        _write_rope(config, family, model)
    _check_expressible(model, config)
    return config


def _check_expressible(model: ModelConfig, config: dict[str, Any]) -> None:
    """Refuses a model whose `config.json` would be read back as another one."""
    read = model_from_hf(config)
    for field in dataclasses.fields(ModelConfig):
        if field.name in RUNTIME_MODEL_FIELDS or field.name in ("layer_pattern", "sliding_window"):
            continue
        ours, theirs = _effective(model, field.name), _effective(read, field.name)
        if ours != theirs:
            raise UserError(
                f"model.{field.name}={ours!r} cannot be written: a {model.family} config.json always means "
                f"{theirs!r}; change the field or the family"
            )
    windows = [
        (kind, m.sliding_window if kind[0] == "local" else None) for m in (model, read) for kind in m.layer_kinds
    ]
    if windows[: model.num_layers] != windows[model.num_layers :]:
        raise UserError(
            f"model.layer_pattern={model.layer_pattern} cannot be written in a {model.family} config.json; "
            "use a family that has such sliding windows (mistral for all layers, qwen3 or gemma3 for a pattern)"
        )


def _effective(model: ModelConfig, name: str) -> Any:
    """A field's value with what it stands for filled in, so that two spellings of one model compare equal."""
    if name == "attention_scale":
        return model.attention_scale or model.head_dim**-0.5
    if name == "moe_mlp_dim":
        return model.expert_mlp_dim if model.num_experts else None
    if name == "mlp_dim" and model.num_experts:
        return None  # of no layer
    if name in ("num_experts_per_token", "norm_topk", "num_dense_layers") and not model.num_experts:
        return None
    if name == "rope":
        return model.rope if model.position == "rope" else None
    return getattr(model, name)


def _family_of(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family's name and the part of `config` that describes the text model."""
    if config.get("model_type") == "gemma3":
        text = config.get("text_config") or {}
        return "gemma3", {**text, "tie_word_embeddings": config.get("tie_word_embeddings", True)}
    for name, family in FAMILIES.items():
        if config.get("model_type") == family.model_type:
            return name, config
    found = config.get("model_type") or config.get("architectures") or "no model_type"
    raise UserError(f"config.json is of a {found!r} model, which llmos does not know; it reads {', '.join(FAMILIES)}")


def _value(config: dict[str, Any], key: Key) -> Any:
    value = config.get(key.theirs, key.default)
    if value is REQUIRED:
        raise UserError(f"config.json has no {key.theirs}; pull the model again, or add it")
    return value


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"config.json has the activation {name!r}; llmos computes {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(config: dict[str, Any], family: Family, num_layers: int) -> tuple[tuple[str, ...], int | None]:
    """(layer_pattern, sliding_window)."""
    window = config.get("sliding_window")
    if family.model_type in ("mistral", "gemma2", "gemma3_text"):
        window = config.get("sliding_window", 4_096)
    elif family.model_type.startswith("qwen") and not config.get("use_sliding_window", False):
        window = None
    if family.windows == "none" or window is None:
        return ("global",), None
    if family.windows == "all":
        return ("local",), window
    types = config.get("layer_types")
    if types is None and family.window_period:
        period = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", family.window_period))
        types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]
    elif types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    unknown = set(types) - set(LAYER_TYPES)
    if unknown or len(types) != num_layers:
        raise UserError(
            f"config.json has {len(types)} layer_types {sorted(set(types))} for {num_layers} layers; "
            f"llmos reads one of {', '.join(LAYER_TYPES)} for each layer"
        )
    pattern = shortest_pattern(tuple(LAYER_TYPES[name] for name in types))
    return pattern, window if "local" in pattern else None


def shortest_pattern(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest tuple that, repeated and cut, gives `kinds`."""
    return next(
        kinds[:period]
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds))
    )


def _write_windows(config: dict[str, Any], family: Family, model: ModelConfig) -> None:
    if family.windows == "none":
        return
    config["sliding_window"] = model.sliding_window
    if family.model_type.startswith("qwen"):
        config["use_sliding_window"] = model.sliding_window is not None
    if family.windows == "typed":
        names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
        config["layer_types"] = [names[attention] for attention, _ in model.layer_kinds]
        if family.window_period and model.sliding_window is None:
            config["sliding_window"] = model.max_seq_len  # of no layer, and transformers wants a number
    if family.window_period and len(model.layer_pattern) > 1:
        config["sliding_window_pattern"] = len(model.layer_pattern)


def _rope(config: dict[str, Any], family: Family, max_seq_len: int) -> RopeConfig:
    """From `rope_theta` and `rope_scaling` (transformers 4), or `rope_parameters` (5), nested by layer type or not."""
    parameters = config.get("rope_parameters") or {}
    values: dict[str, Any] = {}
    if family.model_type == "gemma3_text":
        local = parameters.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise UserError("config.json scales the rotary embedding of sliding_attention layers; llmos never does")
        values["local_theta"] = float(local.get("rope_theta", config.get("rope_local_base_freq", 10_000.0)))
    scaling = parameters.get("full_attention") or ({} if "full_attention" in parameters else parameters)
    scaling = {**scaling, **(config.get("rope_scaling") or {})}
    values["theta"] = float(scaling.get("rope_theta") or config.get("rope_theta") or family.theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"config.json has the rotary scaling {kind!r}; llmos computes linear, llama3 and yarn")
    if (scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("config.json has partial_rotary_factor below 1, and llmos turns whole heads")
    if kind == "default":
        return RopeConfig(**values)
    original = scaling.get("original_max_position_embeddings") or max_seq_len
    values |= {"scaling": kind, "factor": float(scaling.get("factor") or max_seq_len / original)}
    if kind == "llama3":
        values["low_freq_factor"] = float(scaling.get("low_freq_factor", 1.0))
        values["high_freq_factor"] = float(scaling.get("high_freq_factor", 4.0))
    if kind == "yarn":
        if not scaling.get("truncate", True):
            raise UserError("config.json has yarn scaling with truncate=false, which llmos does not compute")
        values["beta_fast"] = float(scaling.get("beta_fast") or 32.0)
        values["beta_slow"] = float(scaling.get("beta_slow") or 1.0)
        values["attention_factor"] = _yarn_attention_factor(scaling, values["factor"])
    if kind in ("llama3", "yarn"):
        values["original_max_seq_len"] = int(original)
    return RopeConfig(**values)


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float | None:
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scaling.get("attention_factor") is None and mscale and mscale_all and factor > 1:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return scaling.get("attention_factor")


def _write_rope(config: dict[str, Any], family: Family, model: ModelConfig) -> None:
    rope = model.rope
    config["rope_theta"] = rope.theta
    if family.model_type == "gemma3_text":
        config["rope_local_base_freq"] = rope.local_theta or rope.theta
    if rope.scaling == "none":
        config["rope_scaling"] = None
        return
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    if rope.original_max_seq_len:
        scaling["original_max_position_embeddings"] = rope.original_max_seq_len
    config["rope_scaling"] = scaling


class GGUFMetadata(Protocol):
    """What is used of `gguf.GGUFReader`: its fields and the list of its tensors."""

    @property
    def fields(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> list[Any]: ...


# Key of a GGUF, without the architecture's prefix -> key of config.json.
GGUF_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "rope.freq_base": "rope_theta",
}
GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# Layers of the Gemmas whose scores are scaled by embed_dim / num_heads; a GGUF does not hold the number itself.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


def model_from_gguf(reader: GGUFMetadata) -> ModelConfig:
    """The ModelConfig that a GGUF's metadata describes (`reader`: a gguf.GGUFReader).

    A llama GGUF may come from a Mistral: both are the same computation, except for a sliding window, of which the
    format says nothing. Raises UserError for an architecture llmos does not know and for missing metadata.
    """
    architecture = _gguf_value(reader, "general.architecture")
    known = list(dict.fromkeys(family.gguf for family in FAMILIES.values()))
    if architecture not in known:
        raise UserError(
            f"the GGUF is of a {architecture!r} model, which llmos does not know; it reads {', '.join(known)}"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    name = next(name for name, family in FAMILIES.items() if family.gguf == architecture)
    if architecture == "llama" and _gguf_value(reader, "llama.expert_count", 0):
        name = "mixtral"
    config: dict[str, Any] = {"model_type": FAMILIES[name].model_type}
    for theirs, key in (GPT2_KEYS if name == "gpt2" else GGUF_KEYS).items():
        value = _gguf_value(reader, f"{architecture}.{theirs}", None)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(f"the GGUF has {theirs} that varies by layer ({value}); llmos reads equal layers only")
            value = value[0]
        if value is not None:
            config[key] = value
    if "token_embd.weight" not in tensors:
        raise UserError("the GGUF has no token_embd.weight; it is not a whole model, pull it again")
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    config["rope_scaling"] = _gguf_rope_scaling(reader, architecture, tensors)
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["tie_word_embeddings"] = name in ("gemma2", "gpt2") or "output.weight" not in tensors
    if name == "qwen3_moe":
        config["norm_topk_prob"] = True  # the converter keeps no such key: every published model has it
    if name == "mixtral":
        config["num_local_experts"] = config.pop("num_experts")
    if name in GEMMA_27B_LAYERS:
        large = config.get("num_hidden_layers") == GEMMA_27B_LAYERS[name]
        head_dim = config.get("head_dim", 256)
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if large else head_dim
    return model_from_hf(config)


def _gguf_value(reader: GGUFMetadata, key: str, default: Any = REQUIRED) -> Any:
    if key in reader.fields:
        value = reader.fields[key].contents()
        # Numbers are stored as float32: 1e-5 would come back as 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value
    if default is REQUIRED:
        raise UserError(f"the GGUF has no {key} in its metadata; pull it again, or convert it anew")
    return default


def _gguf_rope_scaling(reader: GGUFMetadata, architecture: str, tensors: dict[str, Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(reader, architecture, np.asarray(tensors["rope_freqs.weight"].data, np.float32))
    kind = _gguf_value(reader, f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    keys = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    values = {key: _gguf_value(reader, f"{architecture}.rope.scaling.{theirs}", None) for theirs, key in keys.items()}
    return {"rope_type": kind} | {key: value for key, value in values.items() if value is not None}


def _llama3_scaling(reader: GGUFMetadata, architecture: str, divisors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's scaling, which a GGUF holds only as the number each frequency is divided by (`divisors`, H/2)."""
    theta = _gguf_value(reader, f"{architecture}.rope.freq_base", 10_000.0)
    wavelengths = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    factor, original, low, high = float(divisors.max()), 8_192, 1.0, 4.0
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UserError("the GGUF scales its rotary frequencies in a way llmos does not know; use the safetensors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": original,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }
