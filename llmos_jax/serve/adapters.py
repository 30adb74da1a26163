"""LoRA adapters as the PEFT library writes them, to arrays under our names (LoRA, arXiv:2106.09685). No device."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from llmos_jax.config import ModelConfig, UserError
from llmos_jax.models.weights.names import Entry, family_names, sizes

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")

# Settings of adapter_config.json with another value than these would compute something else.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
}

Pair = tuple[np.ndarray, np.ndarray]  # A [in, rank], B [rank, out]
Places = dict[str, list[tuple[int, Entry]]]


class Adapter(NamedTuple):
    """Additions to projections: x A B with the adapter's scale inside B. float32; ranks below `rank` are zeros.

    layers: for each layer of the model, A [in, rank] and B [rank, out] by the projection's name ("q" .. "down"), with
    heads and head_dim as one dimension.
    """

    name: str
    rank: int
    layers: tuple[dict[str, Pair], ...]


def load_adapter(path: Path | str, model: ModelConfig, name: str = "") -> Adapter:
    """The adapter in a PEFT folder (adapter_config.json, adapter_model.safetensors). `name`: the folder's by default.

    Raises UserError for what is missing or damaged, for kinds of adapters other than plain LoRA of attention and dense
    mlp projections, and for shapes other than the model's.
    """
    path = Path(path)
    config, places = _read_config(path), _places(model)
    pairs = _pairs(path, model, places)
    rank = max(pair["A"].shape[0] for pair in pairs.values())
    layers: tuple[dict[str, Pair], ...] = tuple({} for _ in range(model.num_layers))
    for module, pair in pairs.items():
        scale = _scale(path, config, module, pair["A"].shape[0])
        for layer, entry in places[module]:
            layers[layer][_projection(entry)] = _additions(pair, entry, scale, rank)
    return Adapter(name or path.name, rank, layers)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); give a folder that PEFT has saved") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no JSON object; give a folder that PEFT has saved")
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise UserError(
                f"{file} has {key}={config[key]!r}, which llmos does not serve (only {key}={plain[0]!r}); "
                "merge the adapter into the model and serve that, or train it as plain LoRA"
            )
    if "peft_type" not in config:
        raise UserError(f"{file} has no peft_type; give a folder that PEFT has saved")
    return config


def _pairs(path: Path, model: ModelConfig, places: Places) -> dict[str, dict[str, np.ndarray]]:
    """A [rank, in] and B [out, rank] of each module that is adapted, by its name in the model's own files."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, value in _read_tensors(path).items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        module = family_names(model).canonical(f"{match[1]}.weight").removesuffix(".weight") if match else ""
        if match is None or module not in places:
            known = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in places))
            raise UserError(
                f"{path} has {name.removeprefix(PREFIX)}, which llmos cannot apply to this model; of a {model.family} "
                f"model of {model.num_layers} layers it takes LoRA of {known}"
            )
        pairs.setdefault(module, {})[match[2]] = value
    if not pairs:
        raise UserError(f"{path / WEIGHTS} holds no tensors; save the adapter again")
    for module, pair in pairs.items():
        _check(path, module, pair, places[module][0][1].file_shape(sizes(model)), _is_transposed(places[module][0][1]))
    return pairs


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    file = path / WEIGHTS
    if not file.exists():
        pickled = (path / "adapter_model.bin").exists()
        what = "its weights as a pickle (.bin), which llmos does not open" if pickled else f"no {WEIGHTS}"
        raise UserError(f"{path} has {what}; save the adapter again with safe_serialization=True")
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tensors.get_tensor(name).astype(np.float32) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short ({error}); copy it again") from error


def _places(model: ModelConfig) -> Places:
    """Which layer and projections each module of the model's files holds: several where it holds q, k and v."""
    entries = [e for e in family_names(model).entries if e.ours.startswith(("*.attention.", "*.mlp."))]
    places: Places = {}
    for layer in range(model.num_layers):
        for entry in entries:
            if _projection(entry) in PROJECTIONS:
                places.setdefault(entry.name(layer).removesuffix(".weight"), []).append((layer, entry))
    return places


def _projection(entry: Entry) -> str:
    return entry.ours.rpartition(".")[2]


def _is_transposed(entry: Entry) -> bool:
    """Whether the model's file holds [out, in], as torch's Linear does; GPT-2's files hold [in, out]."""
    layout = entry.layout
    return layout.file[-1] == layout.ours[: len(layout.file[-1])]


def _check(path: Path, module: str, pair: dict[str, np.ndarray], shape: tuple[int, ...], transposed: bool) -> None:
    num_out, num_in = shape if transposed else shape[::-1]
    if set(pair) != {"A", "B"}:
        raise UserError(f"{path} has only one of the two LoRA matrices of {module}; save the adapter again")
    rank = len(pair["A"])
    got, wanted = [pair[side].shape for side in "AB"], [(rank, num_in), (num_out, rank)]
    if got != wanted:
        raise UserError(
            f"{path} has matrices of shapes {got[0]} and {got[1]} for {module}, where this model needs (rank, {num_in}) "
            f"and ({num_out}, rank); the adapter is of another model"
        )
    if not all(np.isfinite(value).all() for value in pair.values()):
        raise UserError(f"{path} has values for {module} that are not finite; train or copy the adapter again")


def _scale(path: Path, config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
    said, alpha = (
        _setting(path, config, *keys, module) for keys in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    if said != rank:
        raise UserError(
            f"{path} has LoRA matrices of rank {rank} for {module}, and {said} in its adapter_config.json; the two files "
            "are not of one adapter"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(path: Path, config: dict[str, Any], key: str, exceptions: str, module: str) -> float:
    """The number under `key`, or under the first expression of `exceptions` that fits the end of the module's name."""
    try:
        for pattern, value in (config.get(exceptions) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(value)
        return float(config[key])
    except (re.error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} has no number under {key} and {exceptions} for {module} ({error!r}); save the adapter again"
        ) from error


def _additions(pair: dict[str, np.ndarray], entry: Entry, scale: float, rank: int) -> Pair:
    a, b = pair["A"].T, pair["B"].T * np.float32(scale)
    if entry.part is not None:
        place, count = entry.part
        b = np.split(b, count, axis=1)[place]
    missing = rank - a.shape[1]
    return np.pad(a, ((0, 0), (0, missing))), np.ascontiguousarray(np.pad(b, ((0, missing), (0, 0))))
