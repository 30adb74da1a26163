"""Mixture of experts: top-k routing without dropped tokens, through a grouped matmul, experts split over the mesh."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import pallas_kernels
from llmos_jax.config import ModelConfig
from llmos_jax.models.layers import INIT_STD, Stack, activation, out_std, parameter
from llmos_jax.sharding import axis_size, constrain, sharded


class Moe(nnx.Module):
    """E gated mlps of which each token uses the `num_experts_per_token` that the router likes best."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
        self.config = config
        d, f, e = config.embed_dim, config.expert_mlp_dim, config.num_experts
        make = functools.partial(parameter, rngs, config, stack)
        self.router = make((d, e), ("embed", "norm"), INIT_STD)
        self.gate = make((e, d, f), ("experts", "embed", "mlp"), INIT_STD)
        self.up = make((e, d, f), ("experts", "embed", "mlp"), INIT_STD)
        self.down = make((e, f, d), ("experts", "mlp", "embed"), out_std(config))

    def __call__(
        self, x: Float[Array, "B T D"], token_mask: Float[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Returns the layer's output and its load-balance loss over the tokens of `token_mask`."""
        probabilities, weights, chosen = route(self.config, x, self.router[...])
        tokens, experts = ("batch", "sequence", None), ("experts", None, "mlp")
        run = sharded(
            functools.partial(_run_experts, self.config.num_experts, self.config.activation),
            (tokens, tokens, tokens, experts, experts, ("experts", "mlp", None)),
            tokens,
        )
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        out = run(x, weights.astype(x.dtype), chosen, gate, up, down)
        return constrain(out, "batch", "sequence", None), load_balance_loss(probabilities, chosen, token_mask)


def route(config: ModelConfig, x: Float[Array, "B T D"], router: Float[Array, "D E"]):
    """Router probabilities [B, T, E] in float32, and the weights and ids [B, T, k] of the chosen experts."""
    logits = jnp.dot(x, router.astype(x.dtype), preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, config.num_experts_per_token)
    if config.norm_topk:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probabilities, weights, chosen


def load_balance_loss(
    probabilities: Float[Array, "B T E"], chosen: Int[Array, "B T k"], token_mask: Float[Array, "B T"]
) -> Float[Array, ""]:
    """E Σ_e f_e P_e (arXiv:2101.03961, eq. 4): f_e the share of tokens sent to e (k in all), P_e its mean probability."""
    num_experts = probabilities.shape[-1]
    total = jnp.maximum(jnp.sum(token_mask), 1.0)
    picked = jnp.sum(jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32), axis=2)
    share = jnp.einsum("bte,bt->e", picked, token_mask) / total
    mean = jnp.einsum("bte,bt->e", probabilities, token_mask) / total
    return num_experts * jnp.sum(share * mean)


def _run_experts(num_experts: int, act: str, x, weights, chosen, gate, up, down):
    """One device's part: its experts over the tokens of its expert group.

    Tokens are gathered over the `expert` axis, each device computes what its own experts add to them, and the sums
    are scattered back: no token is dropped and every shape is static. `tensor` splits the inside of each expert.
    """
    split = axis_size("expert")
    shape = x.shape
    x, weights, chosen = (a.reshape(-1, a.shape[-1]) for a in (x, weights, chosen))
    first: int | jax.Array = 0
    if split > 1:
        x, weights, chosen = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, weights, chosen))
        first = jax.lax.axis_index("expert") * (num_experts // split)
    out = _grouped_mlp(act, x, weights, chosen - first, gate, up, down)
    if axis_size("tensor") > 1:
        out = jax.lax.psum(out, "tensor")
    if split > 1:
        out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
    return out.reshape(shape)


def _grouped_mlp(act: str, x, weights, chosen, gate, up, down) -> Float[Array, "M D"]:
    """Σ over a token's chosen experts among [0, E) of weight * mlp(x); ids outside belong to other devices."""
    num_local, k = gate.shape[0], chosen.shape[1]
    ours = (chosen >= 0) & (chosen < num_local)
    expert = jnp.where(ours, chosen, num_local).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=num_local + 1)[:num_local]
    rows = x[order // k]
    hidden = activation(act, pallas_kernels.ragged_dot(rows, gate, sizes)) * pallas_kernels.ragged_dot(rows, up, sizes)
    out = pallas_kernels.ragged_dot(hidden, down, sizes)
    per_choice = out[jnp.argsort(order)].reshape(-1, k, out.shape[-1])
    return jnp.einsum("mkd,mk->md", jnp.where(ours[..., None], per_choice, 0), jnp.where(ours, weights, 0))
