"""Optimizers and learning-rate schedules by name, from optax."""

import jax
import optax

from llmos_jax.config import OptimizerConfig

Logical = dict[str, tuple[str | None, ...]]


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to the peak, then the schedule down to `final_ratio` of it.

    wsd (warm-up, stable, decay; arXiv:2404.06395) stays at the peak and falls linearly over the last `decay_steps`.
    """
    peak, last = config.learning_rate, config.learning_rate * config.final_ratio
    after = max(steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, after, config.final_ratio)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, last, after)
    elif config.schedule == "wsd":
        decay = min(config.decay_steps or max(steps // 10, 1), after)
        main = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)], [after - decay]
        )
    else:
        main = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return main
    # The first update already moves: step 0 has 1/warmup of the peak, not 0.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def is_matrix(path: str, logical: tuple[str | None, ...]) -> bool:
    """Whether weight decay and muon apply: the projections of layers and head; no norm, bias or embedding."""
    return "embed" in logical and not path.startswith("embed.")


def make_optimizer(config: OptimizerConfig, steps: int, logical: Logical) -> optax.GradientTransformation:
    """`logical` names the dimensions of each parameter (models.decoder.logical_dims)."""
    schedule = make_schedule(config, steps)
    decay, matrices = config.weight_decay, {path: is_matrix(path, dims) for path, dims in logical.items()}
    if config.name == "adamw":
        update = optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=decay, mask=matrices)
    elif config.name == "lion":
        update = optax.lion(schedule, config.b1, config.b2, weight_decay=decay, mask=matrices)
    elif config.name == "adafactor":
        # Adafactor's own decay is not scaled by the learning rate; adding it before the scaling makes it so, as in adamw.
        update = optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            # adafactor ends in a descent step (a sign change); the decay joins it with the same sign
            optax.add_decayed_weights(-decay, matrices),
            optax.scale_by_schedule(schedule),
        )
    elif config.name == "muon":
        update = optax.contrib.muon(
            schedule,
            beta=config.b1,
            weight_decay=decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=_muon_dimensions(logical),
            consistent_rms=0.2,  # update size of AdamW (arXiv:2502.16982), so that one learning rate serves both
        )
    else:
        update = optax.chain(optax.add_decayed_weights(decay, matrices), optax.sgd(schedule, config.b1 or None))
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return update


def _muon_dimensions(logical: Logical):
    """Each matrix as (inputs, outputs): the embedding dimension is one side, all others but stack and experts the other."""

    def dimensions(path: str, dims: tuple[str | None, ...]):
        if not is_matrix(path, dims) or path.startswith("head."):
            return None
        embed = dims.index("embed")
        others = tuple(i for i, name in enumerate(dims) if name not in ("layers", "experts", "embed"))
        inputs, outputs = ((embed,), others) if embed < others[0] else (others, (embed,))
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return {path: dimensions(path, dims) for path, dims in logical.items()}


def state_shardings(
    optimizer: optax.GradientTransformation, params: dict[str, jax.ShapeDtypeStruct], shardings, otherwise
):
    """Shardings of the optimizer's state: what has a parameter's shape lives where the parameter does.

    params: abstract. otherwise: the sharding of everything else (counters, factored moments).
    """

    def place(path, leaf):
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
        return shardings[name] if name in params and leaf.shape == params[name].shape else otherwise

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
