"""The programs of a training run: initialisation, one step, one evaluation. Pure functions of (state, batch)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llmos_jax.compiler.program import Program
from llmos_jax.config import RunConfig
from llmos_jax.models.decoder import Params, abstract_params, init_params, logical_dims
from llmos_jax.sharding import batch_sharding, replicated
from llmos_jax.train.objectives import Batch, Sums, objective
from llmos_jax.train.optimizer import make_optimizer, make_schedule, state_shardings

Objective = Callable[[RunConfig, Params, Batch], Sums]


class TrainState(NamedTuple):
    """Everything that changes; saved and restored whole."""

    step: jax.Array  # int32, updates taken or skipped
    params: Params
    opt_state: Any
    rng: jax.Array  # uint32 key data, folded with `step` where an objective draws


def _optimizer(config: RunConfig) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, config.train.steps, logical_dims(config.model))


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; no memory is taken."""
    params: Any = abstract_params(config.model, mesh)
    optimizer, alone = _optimizer(config), replicated(mesh)
    shardings = state_shardings(optimizer, params, {path: leaf.sharding for path, leaf in params.items()}, alone)
    opt_state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        shardings,
    )
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=alone)
    rng: Any = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=alone)
    return TrainState(step, params, opt_state, rng)


def abstract_batch(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape, place = (config.train.batch_size, config.train.seq_len), batch_sharding(mesh)
    fields = {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "loss_mask": "float32",
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in fields.items()}


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _computation(config: RunConfig) -> RunConfig:
    """`config` without what no program depends on, so that another data set or another log compiles nothing."""
    train = dataclasses.replace(config.train, eval_every=0, eval_batches=1)
    alike = RunConfig()
    return dataclasses.replace(
        config,
        name=alike.name,
        init_from=alike.init_from,
        train=train,
        data=alike.data,
        mesh=alike.mesh,  # the program is told the real one
        checkpoint=alike.checkpoint,
        faults=alike.faults,
        log=alike.log,
    )


def init_program(config: RunConfig, mesh: Mesh) -> Program:
    """() -> TrainState with fresh parameters, every array born in its sharding."""
    places = _shardings(abstract_state(config, mesh))
    return Program("init", init, (_computation(config),), (), mesh, out_shardings=places)


def init(config: RunConfig) -> TrainState:
    return start(config, init_params(config.model, jax.random.key(config.seed)))


def start_program(config: RunConfig, mesh: Mesh) -> Program:
    """params -> TrainState, for a run that starts from a pulled model."""
    state = abstract_state(config, mesh)
    static = (_computation(config),)
    return Program("start", start, static, (state.params,), mesh, donate=(0,), out_shardings=_shardings(state))


def start(config: RunConfig, params: Params) -> TrainState:
    key = jax.random.key_data(jax.random.key(config.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, _optimizer(config).init(params), key)


def train_program(config: RunConfig, mesh: Mesh) -> Program:
    """(state, batch) -> (state, metrics); the state's buffers are reused.

    A step whose loss or gradient is not finite changes nothing but the step count. metrics: float32 scalars `loss`
    (nats a token), `aux_loss`, `grad_norm` (before clipping), `learning_rate`, `tokens`, `applied` (0 if skipped).
    """
    state = abstract_state(config, mesh)
    places, args = (_shardings(state), replicated(mesh)), (state, abstract_batch(config, mesh))
    static = (_computation(config), objective(config))
    return Program("train", step, static, args, mesh, donate=(0,), out_shardings=places)


def step(config: RunConfig, compute: Objective, state: TrainState, batch: Batch):
    optimizer, schedule = _optimizer(config), make_schedule(config.optimizer, config.train.steps)
    (nll, aux), gradients = _gradients(config, compute, state.params, batch)
    tokens = jnp.sum(batch["loss_mask"].astype(jnp.float32))
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(nll) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    metrics = {
        "loss": nll / jnp.maximum(tokens, 1.0),
        "aux_loss": aux,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "tokens": tokens,
        "applied": finite.astype(jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def _gradients(config: RunConfig, compute: Objective, params: Params, batch: Batch):
    """((nll sum, mean aux loss), gradients of the mean loss), the batch taken in `accumulate` micro-batches."""
    parts = config.train.accumulate
    total = jnp.maximum(jnp.sum(batch["loss_mask"].astype(jnp.float32)), 1.0)

    def loss(params, micro):
        sums = compute(config, params, micro)
        return sums.loss / total + config.model.router_aux_weight * sums.aux / parts, (sums.nll, sums.aux)

    differentiate = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradients, sums = differentiate(params, batch)
        return sums, gradients

    # Micro-batch i takes every parts-th row, so that no row moves to another device.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, parts, x.shape[1]).swapaxes(0, 1), batch)

    def add(total, micro):
        gradients, sums = differentiate(params, micro)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (gradients, sums)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    scalars = (jnp.zeros((), jnp.float32),) * 2
    (gradients, (nll, aux)), _ = jax.lax.scan(add, (zeros, scalars), micro_batches)
    gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)
    return (nll, aux / parts), gradients


def eval_program(config: RunConfig, mesh: Mesh) -> Program:
    """(params, batch) -> (sum of negative log-likelihood in nats, number of tokens)."""
    args = (abstract_params(config.model, mesh), abstract_batch(config, mesh))
    static = (_computation(config), objective(config))
    return Program("eval", evaluate, static, args, mesh, out_shardings=(replicated(mesh),) * 2)


def evaluate(config: RunConfig, compute: Objective, params: Params, batch: Batch):
    sums = compute(config, params, batch)
    return sums.nll, sums.tokens
