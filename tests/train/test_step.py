"""The programs of a run on one device: what a step changes, what it leaves alone, what it reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.config import OptimizerConfig, RunConfig
from llmos_jax.sharding import put_batch
from llmos_jax.train import step
from tests import tiny

OPTIMIZER = OptimizerConfig("sgd", learning_rate=0.5, schedule="constant", warmup_steps=2, b1=0.9, weight_decay=0.1)
CONFIG = tiny.run(tiny.DENSE, steps=10, optimizer=OPTIMIZER)


@functools.cache
def compiled(config: RunConfig, build):
    return build(config, tiny.mesh(data=1)).compile()


def started(config: RunConfig = CONFIG, seed: int = 0) -> step.TrainState:
    return compiled(config, step.start_program)(tiny.params(config.model, seed))


def batch(config: RunConfig = CONFIG, seed: int = 0):
    return put_batch(tiny.batch(config, seed), tiny.mesh(data=1), config.train.batch_size)


def gradients(config: RunConfig, params, rows):
    return jax.jit(lambda p, b: step._gradients(config, step.objective(config), p, b))(params, rows)


def raw(tree) -> list[bytes]:
    """Bit for bit, so that nan equals nan."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.compat
def test_one_step_is_sgd_by_hand():
    before = jax.device_get(started())
    (nll, _), grads = jax.device_get(gradients(CONFIG, before.params, batch()))
    state, metrics = compiled(CONFIG, step.train_program)(started(), batch())
    tokens = tiny.batch(CONFIG)["loss_mask"].sum()
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "loss": nll / tokens,
            "aux_loss": 0.0,
            "grad_norm": norm,
            "learning_rate": 0.25,  # the first of two steps of warm-up
            "tokens": tokens,
            "applied": 1.0,
        },
        rel=1e-5,
    )
    assert int(state.step) == 1
    for path, p in before.params.items():
        matrix = path == "head.kernel" or path[-2:] in {".q", ".k", ".v", ".o"} or ".mlp." in path
        want = p - 0.25 * (grads[path] / max(norm, 1.0) + (0.1 * p if matrix else 0.0))
        np.testing.assert_allclose(state.params[path], want, rtol=1e-4, atol=1e-5, err_msg=path)


def test_the_gradient_is_that_of_the_mean_loss():
    """Against a central difference along a random direction, z-loss and load balance included."""
    config = tiny.run(tiny.model(tiny.MOE, num_experts_per_token=8), z_loss=0.01)  # all experts: nothing jumps
    params, rows = tiny.params(config.model, spread=2.0), batch(config)
    compute, tokens = step.objective(config), tiny.batch(config)["loss_mask"].sum()
    rng = np.random.default_rng(0)
    direction = {path: jnp.asarray(rng.standard_normal(p.shape), jnp.float32) for path, p in params.items()}

    @jax.jit
    def loss(size):
        sums = compute(config, jax.tree.map(lambda p, d: p + size * d, params, direction), rows)
        return sums.loss / tokens + config.model.router_aux_weight * sums.aux

    _, grads = gradients(config, params, rows)
    along = sum(float(jnp.vdot(grads[path], direction[path])) for path in params)
    assert (loss(1e-3) - loss(-1e-3)) / 2e-3 == pytest.approx(along, rel=1e-2)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_full_batch(parts):
    """The rows have different numbers of tokens, so a mean of means would be wrong."""
    whole, split = (tiny.run(tiny.DENSE, accumulate=n, z_loss=0.01) for n in (1, parts))
    params, rows = tiny.params(tiny.DENSE), batch(whole)
    (nll, aux), want = gradients(whole, params, rows)
    (split_nll, split_aux), got = gradients(split, params, rows)
    assert float(split_nll) == pytest.approx(float(nll), rel=1e-6) and split_aux == aux == 0
    for path in want:
        assert tiny.relative_error(got[path], want[path]) < 2e-6, path


def test_accumulated_gradients_of_bfloat16_parameters_are_summed_in_float32():
    model = tiny.model(param_dtype="bfloat16")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny.params(tiny.DENSE))
    config = tiny.run(model, accumulate=8)
    _, got = gradients(config, params, batch(config))
    _, want = gradients(tiny.run(model), params, batch(config))
    for path in want:
        assert got[path].dtype == jnp.bfloat16
        assert tiny.relative_error(got[path].astype(jnp.float32), want[path].astype(jnp.float32)) < 1.5e-2, path


def test_a_load_balance_loss_is_a_mean_over_micro_batches():
    config = tiny.run(tiny.MOE, accumulate=2, batch_size=4)
    params = tiny.params(config.model)
    rows = batch(tiny.run(tiny.MOE, batch_size=2))
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), rows)  # both micro-batches are `rows`
    (nll, aux), got = gradients(config, params, twice)
    (once, want_aux), want = gradients(tiny.run(tiny.MOE, batch_size=2), params, rows)
    assert float(nll) == pytest.approx(2 * float(once), rel=1e-6)
    assert float(aux) == pytest.approx(float(want_aux), rel=1e-6)
    for path in want:
        assert tiny.relative_error(got[path], want[path]) < 1e-5, path


@pytest.mark.compat
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(name):
    config = tiny.run(tiny.DENSE, steps=10, optimizer=OptimizerConfig(name))
    train = compiled(config, step.train_program)
    state, metrics = train(started(config), batch(config))
    assert float(metrics["applied"]) == 1.0
    broken = batch(config) | {"loss_mask": batch(config)["loss_mask"].at[0, 0].set(jnp.nan)}
    before = jax.device_get(state)
    state, metrics = train(state, broken)
    assert float(metrics["applied"]) == 0.0
    assert int(state.step) == int(before.step) + 1
    assert raw(state.params) == raw(before.params) and raw(state.opt_state) == raw(before.opt_state)
    state, metrics = train(state, batch(config))
    assert float(metrics["applied"]) == 1.0 and raw(state.params) != raw(before.params)


def test_a_gradient_that_overflows_is_skipped_too():
    """The loss is finite, and the gradient of one weight is not."""
    state = started()
    huge = state.params | {"segments.0.0.attention_norm.scale": state.params["segments.0.0.attention_norm.scale"] * 0}
    huge["segments.0.0.attention.q"] = jnp.full_like(huge["segments.0.0.attention.q"], 3e38)
    huge["segments.0.0.attention.k"] = jnp.full_like(huge["segments.0.0.attention.k"], 3e38)
    huge["segments.0.0.attention.v"] = jnp.full_like(huge["segments.0.0.attention.v"], 3e38)
    before = jax.device_get(huge)
    state, metrics = compiled(CONFIG, step.train_program)(state._replace(params=huge), batch())
    assert np.isfinite(float(metrics["loss"])) and not np.isfinite(float(metrics["grad_norm"]))
    assert float(metrics["applied"]) == 0.0 and raw(state.params) == raw(before)


def test_a_batch_without_tokens_gives_zero_loss():
    empty = batch() | {"loss_mask": jnp.zeros_like(batch()["loss_mask"])}
    state, metrics = compiled(CONFIG, step.train_program)(started(), empty)
    assert float(metrics["loss"]) == 0.0 == float(metrics["grad_norm"])
    assert all(np.isfinite(p).all() for p in state.params.values())


def test_the_buffers_of_the_state_are_reused():
    state = started()
    new, _ = compiled(CONFIG, step.train_program)(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_fresh_and_given_states():
    fresh = compiled(CONFIG, step.init_program)()
    again = compiled(CONFIG, step.init_program)()
    assert raw(fresh) == raw(again) and int(fresh.step) == 0
    given = tiny.params(CONFIG.model)
    want = raw(given)
    assert raw(started().params) == want
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), fresh)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), step.abstract_state(CONFIG, tiny.mesh(data=1)))


def test_evaluation_counts_nats_and_tokens():
    params = tiny.params(CONFIG.model)
    nll, tokens = compiled(CONFIG, step.eval_program)(params, batch())
    (want, _), _ = gradients(CONFIG, params, batch())
    assert float(nll) == pytest.approx(float(want), rel=1e-6)
    assert float(tokens) == tiny.batch(CONFIG)["loss_mask"].sum()


def test_ten_steps_learn_a_batch_by_heart():
    config = tiny.run(tiny.MOE, steps=10, optimizer=OptimizerConfig(learning_rate=3e-2))
    state, train = compiled(config, step.init_program)(), compiled(config, step.train_program)
    losses = []
    for _ in range(10):
        state, metrics = train(state, batch(config))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(64), rel=0.02)  # knows nothing yet
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16():
    """Loss and gradients against float32 products that are computed in full."""
    wide = tiny.run(tiny.model(embed_dim=64, head_dim=64, mlp_dim=128), z_loss=0.001)
    half = tiny.run(tiny.model(wide.model, dtype="bfloat16"), z_loss=0.001)
    params = tiny.params(wide.model, spread=2.0)
    (nll, _), got = gradients(half, params, batch(half))
    with jax.default_matmul_precision("highest"):
        (want_nll, _), want = gradients(wide, params, batch(wide))
    assert float(nll) == pytest.approx(float(want_nll), rel=1e-2)
    for path in want:
        assert tiny.relative_error(got[path], want[path]) < 6e-2, path
