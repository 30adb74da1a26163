"""What a checkpoint policy keeps by name so that attention's forward kernel is not run again in the backward pass."""

from jax import Array
from jax.ad_checkpoint import checkpoint_name

NAME = "attention"


def kept(out: Array, lse: Array) -> tuple[Array, Array]:
    """The residuals that the kernel makes, under `NAME` for `jax.checkpoint_policies.save_only_these_names`."""
    return checkpoint_name(out, NAME), checkpoint_name(lse, NAME)
