"""Mixture of experts: top-k routing without dropped tokens, through a grouped matmul, experts split over the mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import pallas_kernels
from llmos_jax.config import ModelConfig
from llmos_jax.models.layers import INIT_STD, Stack, activation, out_std, parameter, present
from llmos_jax.sharding import axis_size, gather_tokens, sharded, sum_over_tensor, token_dims, whole

WEIGHTS = {
    "router": ("embed", "norm"),
    "gate": ("experts", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}


class Moe(nnx.Module):
    """E gated mlps of which each token uses the `num_experts_per_token` that the router likes best."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
        self.config = config
        d, f, e = config.embed_dim, config.expert_mlp_dim, config.num_experts

        def make(name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
            return parameter(rngs, config, stack, shape, WEIGHTS[name], std)

        self.router = make("router", (d, e), INIT_STD)
        self.gate = make("gate", (e, d, f), INIT_STD)
        self.up = make("up", (e, d, f), INIT_STD)
        self.down = make("down", (e, f, d), out_std(config))

    def __call__(
        self, x: Float[Array, "B T D"], token_mask: Float[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Returns the layer's output and its load-balance loss over the tokens of `token_mask`."""
        weights, names = present(self, WEIGHTS)
        batch, sequence = token_dims(x.shape)
        stream, tokens = (batch, sequence, None), (batch, "sequence" if sequence else None)
        run = functools.partial(_moe, self.config, sequence)
        out, balance = sharded(run, (stream, tokens, names), (stream, ((), (), ())))(x, token_mask, weights)
        return out, load_balance_loss(*balance)


def _moe(config: ModelConfig, sequence: str | None, x, token_mask, w: dict[str, Any]):
    """One device's part: its experts over the tokens of its expert group, its share of each expert's inside.

    Tokens are gathered over the `expert` axis, each device computes what its own experts add to them, and the sums
    are scattered back: no token is dropped and every shape is static.
    """
    weight = {name: whole(value, WEIGHTS[name], x.dtype) for name, value in w.items()}
    x = gather_tokens(x, sequence)
    shape, split = x.shape, axis_size("expert")
    probabilities, weights, chosen = route(config, x, weight["router"])
    balance = balance_sums(probabilities, chosen, token_mask)
    if not jax.sharding.get_abstract_mesh().empty:
        balance = jax.lax.psum(balance, ("data", "fsdp", "expert", "context"))
    rows, weights, chosen = (a.reshape(-1, a.shape[-1]) for a in (x, weights.astype(x.dtype), chosen))
    first: int | jax.Array = 0
    if split > 1:
        rows, weights, chosen = (jax.lax.all_gather(a, "expert", tiled=True) for a in (rows, weights, chosen))
        first = jax.lax.axis_index("expert") * (config.num_experts // split)
    experts = (weight["gate"], weight["up"], weight["down"])
    out = _grouped_mlp(config.activation, rows, weights, chosen - first, *experts)
    if split > 1:
        out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
    return checkpoint_name(sum_over_tensor(out.reshape(shape), sequence), "mlp_out"), balance


def route(config: ModelConfig, x: Float[Array, "B T D"], router: Float[Array, "D E"]):
    """Router probabilities [B, T, E] in float32, and the weights and ids [B, T, k] of the chosen experts."""
    logits = jnp.dot(x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, config.num_experts_per_token)
    if config.norm_topk:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probabilities, weights, chosen


def balance_sums(
    probabilities: Float[Array, "B T E"], chosen: Int[Array, "B T k"], token_mask: Float[Array, "B T"]
) -> tuple[Float[Array, "E"], Float[Array, "E"], Float[Array, ""]]:
    """Over the tokens of the mask: how many chose each expert, its summed probability, and how many there are."""
    picked = jnp.sum(jax.nn.one_hot(chosen, probabilities.shape[-1], dtype=jnp.float32), axis=2)
    counts, sums = (jnp.einsum("bte,bt->e", a, token_mask) for a in (picked, probabilities))
    return counts, sums, jnp.sum(token_mask)


def load_balance_loss(picked: Float[Array, "E"], probability: Float[Array, "E"], tokens: Float[Array, ""]):
    """E Σ_e f_e P_e (arXiv:2101.03961, eq. 4): f_e the share of tokens sent to e (k in all), P_e its mean probability."""
    total = jnp.maximum(tokens, 1.0)
    return picked.shape[0] * jnp.sum((picked / total) * (probability / total))


def _grouped_mlp(act: str, x, weights, chosen, gate, up, down) -> Float[Array, "M D"]:
    """Σ over a token's chosen experts among [0, E) of weight * mlp(x); ids outside belong to other devices."""
    num_local, k = gate.shape[0], chosen.shape[1]
    ours = (chosen >= 0) & (chosen < num_local)
    expert = jnp.where(ours, chosen, num_local).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=num_local + 1)[:num_local]
    rows = x[order // k]
    gated = checkpoint_name(pallas_kernels.ragged_dot(rows, gate, sizes), "gate")
    hidden = activation(act, gated) * checkpoint_name(pallas_kernels.ragged_dot(rows, up, sizes), "up")
    out = pallas_kernels.ragged_dot(hidden, down, sizes)
    per_choice = out[jnp.argsort(order)].reshape(-1, k, out.shape[-1])
    return jnp.einsum("mkd,mk->md", jnp.where(ours[..., None], per_choice, 0), jnp.where(ours, weights, 0))
