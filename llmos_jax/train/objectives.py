"""What a run minimises. An objective takes (config, params, batch) and returns sums, so that parts can be added up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from llmos_jax.config import RunConfig, UserError
from llmos_jax.models.decoder import Params, bind
from llmos_jax.sharding import axis_size, gather_tokens, sharded, token_dims, whole

Batch = dict[str, jax.Array]


class Sums(NamedTuple):
    """Sums over the tokens of a batch, float32 scalars."""

    loss: Array  # what is differentiated: negative log-likelihood and z-loss
    nll: Array  # nats
    tokens: Array
    aux: Array  # mean load-balance loss of the MoE layers; not a sum over tokens


def causal_lm(config: RunConfig, params: Params, batch: Batch) -> Sums:
    """Next-token prediction over packed rows.

    batch: tokens, targets, segment_ids, positions int32 [B, T]; loss_mask [B, T], 0 where the target is padding or
    belongs to another document.
    """
    model = bind(config.model, params)
    output = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    weight, transposed = model.output_weight()
    assert isinstance(weight, jax.Array), "quantized weights are not trained"
    mask = batch["loss_mask"].astype(jnp.float32)
    loss, nll = _cross_entropy(config, output.hidden, weight, transposed, batch["targets"], mask)
    return Sums(loss, nll, jnp.sum(mask), output.aux_loss)


def _cross_entropy(
    config: RunConfig,
    hidden: Float[Array, "B T D"],
    weight: Array,
    transposed: bool,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
):
    """The fused projection and loss, each device over its own tokens and its part of the vocabulary."""
    stream, kernel = (*token_dims(hidden.shape), None), ("vocab", "embed") if transposed else ("embed", "vocab")

    def local(hidden, weight, targets, mask):
        hidden = gather_tokens(hidden, stream[1])
        sums = pallas_kernels.linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            whole(weight, kernel, hidden.dtype),
            targets.reshape(-1),
            mask.reshape(-1),
            transposed=transposed,
            z_loss=config.train.z_loss,
            softcap=config.model.logit_softcap,
            vocab_axis="tensor" if axis_size("tensor") > 1 else None,
        )
        axes = ("data", "fsdp", "expert", "context")
        return jax.lax.psum(sums, axes) if not jax.sharding.get_abstract_mesh().empty else sums

    tokens = ("batch", "sequence")
    run = sharded(local, (stream, kernel, tokens, tokens), ((), ()))
    with jax.named_scope("loss"):
        if axis_size("fsdp") > 1:
            hidden, weight = _gradients_together(hidden, weight)
        return run(hidden, weight, targets, mask)


@jax.custom_vjp
def _gradients_together(hidden: Array, weight: Array) -> tuple[Array, Array]:
    """As they are. The layers' backward pass takes the gradient of `hidden` when that of `weight` is summed and scattered,
    too: left to itself the compiler does so after the layers, and holds the whole gradient on each device meanwhile."""
    return hidden, weight


_gradients_together.defvjp(
    lambda hidden, weight: ((hidden, weight), None), lambda _, gradients: jax.lax.optimization_barrier(gradients)
)


OBJECTIVES = {"causal_lm": causal_lm}


def objective(config: RunConfig):
    if config.train.objective not in OBJECTIVES:
        raise UserError(f"train.objective={config.train.objective!r} is not known; use {', '.join(OBJECTIVES)}")
    return OBJECTIVES[config.train.objective]
