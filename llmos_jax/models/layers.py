"""The parts every decoder is made of: parameters with named dimensions, norms, embedding, rotary positions, mlp.

Every module takes `stack`, the leading shape of its parameters: () for one layer, (R,) for R layers that are scanned.
The forward pass always sees one layer's slice.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from llmos_jax.config import ModelConfig, RopeConfig
from llmos_jax.models.quantized import QuantizedTensor, look_up, product, split_dims
from llmos_jax.sharding import axis_size, constrain, gather_tokens, sharded, sum_over_tensor, token_dims, whole
from pallas_kernels.cpu import matmul
from pallas_kernels.dispatch import current_chip

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


def present(module: nnx.Module, logical: dict[str, tuple[str, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values, and the names of their dimensions, of those parameters of a table that `module` has."""
    values = {name: getattr(module, name).get_value() for name in logical if getattr(module, name) is not None}
    return values, {name: split_dims(value, logical[name]) for name, value in values.items()}


class Adapters(NamedTuple):
    """Low-rank additions to projections (LoRA, arXiv:2106.09685) of several adapters at once.

    The A of all adapters stand side by side, their B one below another; a token's mask is 1 where its own adapter's
    ranks are, so one pair of products serves a batch of any mixture. R is the ranks of all adapters together.
    """

    mask: Float[Array, "B T R"]
    layers: tuple[dict[str, tuple[Array, Array]], ...]  # name of a projection -> A [in, R], B [R, out]


def adapted(y: Array, x: Array, w: dict[str, Any], name: str) -> Array:
    """y [B, T, out], the projection `name` of x [B, T, in], and what the adapters in `w` add to it."""
    if f"{name}.a" not in w:
        return y
    low = matmul(x.reshape(-1, x.shape[-1]), w[f"{name}.a"]) * w["adapters"].reshape(-1, w["adapters"].shape[-1])
    return y + matmul(low.astype(x.dtype), w[f"{name}.b"]).reshape(y.shape)


def add_adapters(weights: dict, names: dict, logical: dict, adapters: tuple[Array, dict] | None, dims: tuple) -> None:
    """Puts the adapters of one layer among its weights. `dims`: of the tokens."""
    if adapters is None:
        return
    mask, layer = adapters
    for name, (a, b) in layer.items():
        if name in weights:
            into = logical[name][0] if logical[name][0] in ("heads", "mlp") else None  # `whole` of what fsdp splits
            weights |= {"adapters": mask, f"{name}.a": a, f"{name}.b": b}
            out = None if into else logical[name][1]
            names |= {"adapters": (*dims, None), f"{name}.a": (into, None), f"{name}.b": (None, out)}


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm, computed in float32."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = (), size: int = 0, kind: str = ""):
        self.config, self.kind = config, kind or config.norm
        size = size or config.embed_dim
        self.scale = parameter(rngs, config, stack, (size,), ("norm",), 0.0)
        self.scale.set_value(self.scale.get_value() + (0.0 if config.norm_offset else 1.0))
        self.bias = parameter(rngs, config, stack, (size,), ("norm",), 0.0) if self.kind == "layernorm" else None

    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        return norm(self.config, x, self.scale[...], None if self.bias is None else self.bias[...], self.kind)


def norm(
    config: ModelConfig,
    x: Float[Array, "*rest D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None = None,
    kind: str = "rmsnorm",
) -> Float[Array, "*rest D"]:
    y = x.astype(jnp.float32)
    if kind == "layernorm":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    y = y * (scale.astype(jnp.float32) + (1.0 if config.norm_offset else 0.0))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding, with learned positions where the family has them; scaled where it asks for it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.scale, self.dtype = config.embed_scale, jnp.dtype(config.dtype)
        self.table = parameter(rngs, config, (), (config.vocab_size, config.embed_dim), ("vocab", "embed"), INIT_STD)
        shape, learned = (config.max_seq_len, config.embed_dim), config.position == "learned"
        self.positions = parameter(rngs, config, (), shape, ("norm", "embed"), INIT_STD) if learned else None

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        batch, sequence = token_dims(tokens.shape)
        run = functools.partial(_look_up, self.dtype, sequence)
        ids = (batch, "sequence" if sequence else None)
        weights, names = present(self, {"table": ("vocab", "embed")})
        x = sharded(run, (ids, names["table"]), (batch, sequence, None))(tokens, weights["table"])
        if self.scale is not None:
            # Rounded to the compute dtype first, as the published weights were trained.
            x = x * jnp.asarray(self.scale, self.dtype)
        if self.positions is not None:
            x = x + constrain(self.positions[...].astype(self.dtype), None, None)[positions]
        return constrain(x, batch, sequence, None)


def _look_up(dtype, sequence: str | None, tokens: Int[Array, "B T"], table: Float[Array, "V D"] | QuantizedTensor):
    """Each device of the tensor axis has the rows of its part of the vocabulary; the others add zeros."""
    table = whole(table, ("vocab", "embed"), dtype)
    if axis_size("tensor") == 1:
        return look_up(table, tokens, dtype)
    row = tokens - jax.lax.axis_index("tensor") * table.shape[0]
    ours = (row >= 0) & (row < table.shape[0])
    return sum_over_tensor(jnp.where(ours[..., None], look_up(table, jnp.where(ours, row, 0), dtype), 0), sequence)


def activation(name: str, x: Array) -> Array:
    """On a CPU in float32, where each operation on bfloat16 would be rounded on its own."""
    if x.dtype == jnp.bfloat16 and current_chip().platform == "cpu":
        x = x.astype(jnp.float32)
    if name == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


def project(x: Float[Array, "B T D"], weight: Float[Array, "D F"] | QuantizedTensor) -> Float[Array, "B T F"]:
    """x weight.

    Tokens become one dimension: a weight's gradient is then a plain product, which XLA's CPU backend computes several
    times faster than one that contracts batch and sequence apart.
    """
    rows = row_major(x.reshape(-1, x.shape[-1]))
    y = product(rows, weight) if isinstance(weight, QuantizedTensor) else matmul(rows, weight)
    return y.reshape(*x.shape[:-1], -1)


def row_major(x: Array) -> Array:
    """On a TPU, x and its gradient with the last dimension innermost.

    Left to itself the compiler lays heads of a projection out with tokens innermost, as [tokens, N * H] is no view of
    [tokens, N, H] otherwise, and then the stream and what is kept of it; it copies all that before and after kernels.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if current_chip().platform == "tpu" else x


def project_together(x: Array, weights: dict[str, Any], parts: dict[str, int]) -> dict[str, Array]:
    """`project` of x by several weights of the same input.

    A server on one device has their outputs side by side in the first, and the others empty: one product takes less
    time than several. parts: how the first's outputs are then shared out.
    """
    first, *others = parts
    if not others or weights[others[0]].shape[-1]:
        return {name: project(x, weights[name]) for name in parts}
    joined = project(x, weights[first])
    ends = np.cumsum(list(parts.values())) * (joined.shape[-1] // sum(parts.values()))
    return dict(zip(parts, jnp.split(joined, ends[:-1].tolist(), axis=-1), strict=True))


MLP_WEIGHTS = {
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "up_bias": ("mlp",),
    "down_bias": ("norm",),
}


class Mlp(nnx.Module):
    """act(x gate) * (x up), or act(x up), projected down."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
        self.config = config
        d, f = config.embed_dim, config.mlp_dim

        def make(name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
            return parameter(rngs, config, stack, shape, MLP_WEIGHTS[name], std)

        self.gate = make("gate", (d, f), INIT_STD) if config.gated_mlp else None
        self.up = make("up", (d, f), INIT_STD)
        self.down = make("down", (f, d), out_std(config))
        self.up_bias = make("up_bias", (f,), 0.0) if config.mlp_bias else None
        self.down_bias = make("down_bias", (d,), 0.0) if config.mlp_bias else None

    def __call__(self, x: Float[Array, "B T D"], adapters: tuple[Array, dict] | None = None) -> Float[Array, "B T D"]:
        weights, names = present(self, MLP_WEIGHTS)
        stream = (*token_dims(x.shape), None)
        add_adapters(weights, names, MLP_WEIGHTS, adapters, (stream[0], None))
        run = functools.partial(_mlp, self.config.activation, stream[1])
        return sharded(run, (stream, names), stream)(x, weights)


def _mlp(act: str, sequence: str | None, x: Float[Array, "B T D"], w: dict[str, Any]) -> Float[Array, "B T D"]:
    """One device's part of the inside of the mlp, over all tokens of its tensor axis."""
    weight = {name: whole(value, MLP_WEIGHTS[name], x.dtype) for name, value in w.items() if name in MLP_WEIGHTS}
    x = gather_tokens(x, sequence)

    inner = project_together(x, weight, {name: 1 for name in ("up", "gate") if name in weight})
    inner = {name: adapted(y, x, w, name) for name, y in inner.items()}
    up = checkpoint_name(inner["up"] + weight["up_bias"] if "up_bias" in weight else inner["up"], "up")
    gate = checkpoint_name(inner["gate"], "gate") if "gate" in inner else None
    hidden = activation(act, up) if gate is None else activation(act, gate) * up
    hidden = hidden.astype(x.dtype)
    out = sum_over_tensor(adapted(project(hidden, weight["down"]), hidden, w, "down"), sequence)
    return checkpoint_name(out + weight["down_bias"] if "down_bias" in weight else out, "mlp_out")


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

    def tables(angles: Array) -> tuple[Array, Array]:
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

    if current_chip().platform != "cpu":
        return tables(angles)
    # XLA's CPU compiler would compute them anew for each head of each layer, in the loops that use them, and heeds no
    # optimization_barrier. A branch stays where it is; positions are never negative.
    return lax.cond(jnp.max(positions) >= 0, tables, lambda angles: (angles, angles), angles)
