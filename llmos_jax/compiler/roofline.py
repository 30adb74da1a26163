"""What a model costs and what a chip can do: FLOPs by formula, peaks by table.

The formulas count useful work only (Chowdhery et al., arXiv:2204.02311, appendix B): no recomputation, no masked
scores. A multiply and an add are two FLOPs.
"""

import functools
import time

from llmos_jax.config import ModelConfig

# Dense peak FLOP/s of one jax device, by what `device.device_kind` starts with, for 16-bit inputs (vendors' sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # two devices a chip
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


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


@functools.cache
def peak_flops(device_kind: str, platform: str, dtype: str) -> float:
    """Peak FLOP/s of one device for products of `dtype`; 0 where it is not known.

    The CPU's is measured once, with a large matrix product, since no table knows the host.
    """
    if platform == "cpu":
        return _measured_peak(dtype)
    for prefix in sorted(PEAK_FLOPS, key=len, reverse=True):
        if device_kind.startswith(prefix):
            return PEAK_FLOPS[prefix]
    return 0.0


def _measured_peak(dtype: str, size: int = 1536) -> float:
    import jax
    import jax.numpy as jnp

    device = jax.local_devices(backend="cpu")[0]
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)
