"""What a model costs: parameters and FLOPs by formula. What a chip can do is in chips.py.

The formulas count useful work only (Chowdhery et al., arXiv:2204.02311, appendix B): no recomputation, no masked
scores. A multiply and an add are two FLOPs.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmos_jax.config import ModelConfig
from llmos_jax.sharding import RULES


@dataclass(frozen=True)
class Weight:
    """One parameter of the model as it is stored. dims: the names of its dimensions (RULES in sharding.py)."""

    part: str  # attention | mlp | experts | router | norms | embedding | head
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    layers: int = 1  # it exists this many times

    @property
    def size(self) -> int:
        """Elements of all layers."""
        return math.prod(self.shape) * self.layers

    def local_size(self, sizes: Mapping[str, int], without: tuple[str, ...] = ()) -> float:
        """Elements of all layers that one device holds on a mesh of `sizes`, as if the axes `without` had size one."""
        axes = {axis for name in self.dims for axis in RULES[name]} - set(without)
        return self.size / math.prod(sizes[axis] for axis in axes)

    @property
    def is_matrix(self) -> bool:
        return self.part not in ("norms", "embedding")


@functools.lru_cache(maxsize=64)
def weights(model: ModelConfig) -> tuple[Weight, ...]:
    """Every parameter of `model`, those of equal layers together."""
    d, h, n, k = model.embed_dim, model.head_dim, model.num_heads, model.num_kv_heads
    depth, num_moe = model.num_layers, sum(kind == "moe" for _, kind in model.layer_kinds)
    norm = 2 if model.norm == "layernorm" else 1  # scale, and shift
    found = [
        Weight("attention", (d, n, h), ("embed", "heads", "head_dim"), depth),
        Weight("attention", (d, k, h), ("embed", "kv_heads", "head_dim"), 2 * depth),
        Weight("attention", (n, h, d), ("heads", "head_dim", "embed"), depth),
        Weight("norms", (d,), ("norm",), depth * norm * (4 if model.sandwich_norm else 2) + norm),
        Weight("embedding", (model.vocab_size, d), ("vocab", "embed")),
    ]
    if model.qkv_bias:
        found += [Weight("norms", (n, h), ("heads", "head_dim"), depth)]
        found += [Weight("norms", (k, h), ("kv_heads", "head_dim"), 2 * depth)]
    if model.attention_out_bias:
        found += [Weight("norms", (d,), ("norm",), depth)]
    if model.qk_norm:
        found += [Weight("norms", (h,), ("norm",), 2 * depth)]
    if num_moe:
        e, f = model.num_experts, model.expert_mlp_dim
        found += [Weight("experts", (e, d, f), ("experts", "embed", "mlp"), 2 * num_moe)]
        found += [Weight("experts", (e, f, d), ("experts", "mlp", "embed"), num_moe)]
        found += [Weight("router", (d, e), ("embed", "norm"), num_moe)]
    if depth > num_moe:
        f, dense = model.mlp_dim, depth - num_moe
        found += [Weight("mlp", (d, f), ("embed", "mlp"), dense * (2 if model.gated_mlp else 1))]
        found += [Weight("mlp", (f, d), ("mlp", "embed"), dense)]
        if model.mlp_bias:
            found += [Weight("norms", (f,), ("mlp",), dense), Weight("norms", (d,), ("norm",), dense)]
    if model.position == "learned":
        found += [Weight("embedding", (model.max_seq_len, d), ("norm", "embed"))]
    if not model.tie_embeddings:
        found += [Weight("head", (d, model.vocab_size), ("embed", "vocab"))]
    return tuple(found)


def matmul_params(model: ModelConfig) -> int:
    """Parameters that each token is multiplied with: the chosen experts only, the head, no embedding, no norms."""
    attention = model.embed_dim * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    matrices = 3 if model.gated_mlp else 2
    dense = matrices * model.embed_dim * model.mlp_dim
    experts = 3 * model.num_experts_per_token * model.embed_dim * model.expert_mlp_dim
    moe = experts + model.embed_dim * model.num_experts
    layers = sum(attention + (moe if kind == "moe" else dense) for _, kind in model.layer_kinds)
    return layers + model.embed_dim * model.vocab_size


def attention_pairs(seq_len: int, window: int | None) -> int:
    """Query-key pairs of one causal sequence: query t sees min(t + 1, window) keys."""
    reach = min(seq_len, window or seq_len)
    return reach * (reach + 1) // 2 + (seq_len - reach) * reach


def forward_flops(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of the forward pass of one sequence of `seq_len` tokens."""
    pairs = sum(
        attention_pairs(seq_len, model.sliding_window if kind == "local" else None) for kind, _ in model.layer_kinds
    )
    return 2.0 * matmul_params(model) * seq_len + 4.0 * model.num_heads * model.head_dim * pairs


def train_flops(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of one sequence's forward and backward pass: three times the forward."""
    return 3.0 * forward_flops(model, seq_len)
