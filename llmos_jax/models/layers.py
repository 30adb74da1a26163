"""The parts every decoder is made of: parameters with named dimensions, norms, embedding, rotary positions, mlp.

Every module takes `stack`, the leading shape of its parameters: () for one layer, (R,) for R layers that are scanned.
The forward pass always sees one layer's slice.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llmos_jax.config import ModelConfig, RopeConfig
from llmos_jax.sharding import axis_size, constrain
from pallas_kernels.cpu import matmul

INIT_STD = 0.02

Stack = tuple[int, ...]


def parameter(
    rngs: nnx.Rngs, config: ModelConfig, stack: Stack, shape: tuple[int, ...], logical: tuple[str, ...], std: float
) -> nnx.Param:
    """A parameter [*stack, *shape] drawn from N(0, std²); std 0 gives zeros. `logical` names its dimensions."""
    dtype = jnp.dtype(config.param_dtype)
    full = (*stack, *shape)
    value = std * jax.random.normal(rngs.params(), full, dtype) if std else jnp.zeros(full, dtype)
    return nnx.Param(value, logical=("layers",) * len(stack) + logical)


def out_std(config: ModelConfig) -> float:
    """Of projections back into the residual stream, scaled by depth as GPT-2 does."""
    return INIT_STD / math.sqrt(2 * config.num_layers)


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm, computed in float32."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = (), size: int = 0, kind: str = ""):
        size, self.kind = size or config.embed_dim, kind or config.norm
        self.eps, self.offset = config.norm_eps, 1.0 if config.norm_offset else 0.0
        self.scale = parameter(rngs, config, stack, (size,), ("norm",), 0.0)
        self.scale.set_value(self.scale.get_value() + (1.0 - self.offset))
        self.bias = parameter(rngs, config, stack, (size,), ("norm",), 0.0) if self.kind == "layernorm" else None

    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * (self.scale[...].astype(jnp.float32) + self.offset)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding, with learned positions where the family has them; scaled where it asks for it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.scale, self.dtype = config.embed_scale, jnp.dtype(config.dtype)
        self.table = parameter(rngs, config, (), (config.vocab_size, config.embed_dim), ("vocab", "embed"), INIT_STD)
        shape, learned = (config.max_seq_len, config.embed_dim), config.position == "learned"
        self.positions = parameter(rngs, config, (), shape, ("norm", "embed"), INIT_STD) if learned else None

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = constrain(self.table[...], "vocab", None).astype(self.dtype)[tokens]
        if self.scale is not None:
            # Rounded to the compute dtype first, as the published weights were trained.
            x = x * jnp.asarray(self.scale, self.dtype)
        if self.positions is not None:
            x = x + self.positions[...].astype(self.dtype)[positions]
        return constrain(x, "batch", "sequence", None)


def activation(name: str, x: Array) -> Array:
    if name == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


def project(x: Array, weight: Array, num_in: int = 1) -> Array:
    """x [B, T, *in] times weight [*in, *out] -> [B, T, *out]; `num_in` is the number of dimensions of `in`.

    Tokens become one dimension where their order on the devices allows it: a weight's gradient is then a plain product,
    which XLA's CPU backend computes several times faster than one that contracts batch and sequence apart.
    """
    size, out = math.prod(weight.shape[:num_in]), weight.shape[num_in:]
    matrix = weight.reshape(size, -1).astype(x.dtype)
    tokens = x.shape[: x.ndim - num_in]
    flat = (-1,) if axis_size("context") == 1 else tokens
    x = x.reshape(*flat, size)
    return (matmul(x, matrix) if x.ndim == 2 else x @ matrix).reshape(*tokens, *out)


class Mlp(nnx.Module):
    """act(x gate) * (x up), or act(x up), projected down."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
        self.config = config
        d, f = config.embed_dim, config.mlp_dim
        self.gate = parameter(rngs, config, stack, (d, f), ("embed", "mlp"), INIT_STD) if config.gated_mlp else None
        self.up = parameter(rngs, config, stack, (d, f), ("embed", "mlp"), INIT_STD)
        self.down = parameter(rngs, config, stack, (f, d), ("mlp", "embed"), out_std(config))
        self.up_bias = parameter(rngs, config, stack, (f,), ("mlp",), 0.0) if config.mlp_bias else None
        self.down_bias = parameter(rngs, config, stack, (d,), ("norm",), 0.0) if config.mlp_bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up = project(x, self.up[...])
        if self.up_bias is not None:
            up = up + self.up_bias[...].astype(x.dtype)
        up = constrain(up, "batch", "sequence", "mlp")
        if self.gate is None:
            hidden = activation(self.config.activation, up)
        else:
            gate = constrain(project(x, self.gate[...]), "batch", "sequence", "mlp")
            hidden = activation(self.config.activation, gate) * up
        out = project(hidden, self.down[...])
        if self.down_bias is not None:
            out = out + self.down_bias[...].astype(x.dtype)
        return constrain(out, "batch", "sequence", None)


def rope_frequencies(rope: RopeConfig, head_dim: int, theta: float, scaled: bool = True) -> tuple[np.ndarray, float]:
    """Angular frequencies [H/2] in float32 and the factor on cos and sin (YaRN's temperature; otherwise 1)."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if not scaled or rope.scaling == "none":
        return frequencies.astype(np.float32), 1.0
    if rope.scaling == "linear":
        return (frequencies / rope.factor).astype(np.float32), 1.0
    if rope.scaling == "llama3":
        return _llama3_frequencies(rope, frequencies).astype(np.float32), 1.0
    temperature = rope.attention_factor
    if temperature is None:
        temperature = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return _yarn_frequencies(rope, frequencies, head_dim, theta).astype(np.float32), temperature


def _llama3_frequencies(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1 report)."""
    turns = rope.original_max_seq_len * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _yarn_frequencies(rope: RopeConfig, frequencies: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """Dimensions that turn more than beta_fast times over the original context are kept, those below beta_slow scaled."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / max(high - low, 0.001)
    keep = 1.0 - np.clip(ramp, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def rope_tables(rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"], local: bool):
    """cos and sin [B, T, 1, H/2] in float32 for the layers of one kind."""
    theta = rope.local_theta if local and rope.local_theta is not None else rope.theta
    frequencies, factor = rope_frequencies(rope, head_dim, theta, scaled=not (local and rope.local_theta is not None))
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: Float[Array, "B T N H"], tables: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), the layout of published weights."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
