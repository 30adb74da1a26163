"""Tiny reference models: their weights are made anew from their names, so that the repository keeps only logits.

`scripts/make_goldens.py` fills the same weights into `transformers` and stores what it computes.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parents[1] / "goldens"


@dataclass(frozen=True)
class Golden:
    config: dict[str, Any]  # config.json
    tensors: dict[str, list[int]]  # name in the file -> shape
    tokens: np.ndarray  # [B, T]
    logits: np.ndarray  # [B, T, V], float32, computed by transformers


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> Golden:
    described = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return Golden(described["config"], described["tensors"], arrays["tokens"], arrays["logits"])


def make_tensor(name: str, shape: list[int], offset_norm: bool = False) -> np.ndarray:
    """The tensor called `name`: drawn with a seed made from the name, norms around what they start from."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    is_norm = len(shape) == 1 and name.endswith(".weight")
    if is_norm:
        return values * np.float32(0.2) + np.float32(0.0 if offset_norm else 1.0)
    return values * np.float32(1.2 / min(shape) ** 0.5 if len(shape) > 1 else 0.2)


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]]) -> Path:
    """A Hugging Face model folder with generated weights."""
    folder.mkdir(parents=True, exist_ok=True)
    offset_norm = config["model_type"].startswith("gemma")
    weights = {name: make_tensor(name, shape, offset_norm) for name, shape in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
