"""Small models, runs, batches and meshes, so that a test names only what it is about."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from llmos_jax.config import MeshConfig, ModelConfig, RunConfig, TrainConfig
from llmos_jax.models.decoder import init_params
from llmos_jax.sharding import make_mesh

DENSE = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_dim=32,
    max_seq_len=32,
)
MOE = dataclasses.replace(DENSE, num_experts=8, moe_mlp_dim=16, num_dense_layers=1, router_aux_weight=0.01)


def model(base: ModelConfig = DENSE, **changes: Any) -> ModelConfig:
    return dataclasses.replace(base, **changes)


def run(model: ModelConfig = DENSE, batch_size: int = 8, seq_len: int = 16, **changes: Any) -> RunConfig:
    """Fields of `train` that are not given keep their defaults; other groups are given whole."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    train = {name: changes.pop(name) for name in list(changes) if name in names}
    return RunConfig(model=model, train=TrainConfig(batch_size=batch_size, seq_len=seq_len, **train), **changes)


def mesh(**axes: int) -> jax.sharding.Mesh:
    """A mesh of the first devices, as many as the axes multiply to; axes that are not named have size one."""
    config = MeshConfig(**{"fsdp": 1, **axes})
    return make_mesh(config, jax.devices()[: math.prod(axes.values())])


def params(model: ModelConfig, seed: int = 0, spread: float = 5.0) -> dict[str, jax.Array]:
    """Fresh parameters, every one of them away from what it starts with, so that none is without effect.

    The small initial weights are multiplied by `spread`: a tiny model with them would hardly look at its input.
    """
    rng = np.random.default_rng(seed)
    fresh = jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))
    return {
        path: (
            value * (spread if value.ndim > 2 or path.startswith(("embed.", "head.")) else 1.0)
            + (0.1 * rng.standard_normal(value.shape)).astype(value.dtype)
        ).astype(value.dtype)
        for path, value in fresh.items()
    }


def batch(config: RunConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows: two documents and some padding each, cut elsewhere in every row."""
    rng = np.random.default_rng(seed)
    rows, length = config.train.batch_size, config.train.seq_len
    tokens = rng.integers(0, config.model.vocab_size, (rows, length + 1)).astype(np.int32)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        cut, end = length // 4 + row % (length // 2), length - row % 3
        segments[row, :cut], segments[row, cut:end] = 1, 2
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
    next_segments = np.concatenate([segments[:, 1:], np.zeros((rows, 1), np.int32)], axis=1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "positions": positions,
        "loss_mask": ((segments > 0) & (segments == next_segments)).astype(np.float32),
    }


def relative_error(got: Any, want: Any) -> float:
    """Largest difference over the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got - want).max(initial=0.0) / max(np.abs(want).max(initial=0.0), 1e-30))
