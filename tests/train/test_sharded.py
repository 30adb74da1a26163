"""Eight simulated devices compute what one does: every mesh axis, and every pair of them."""

import functools
import itertools

import jax
import numpy as np
import pytest

from llmos_jax.config import MESH_AXES, ModelConfig, OptimizerConfig, RunConfig
from llmos_jax.models.decoder import abstract_params
from llmos_jax.sharding import put_batch
from llmos_jax.train import step
from tests import tiny

pytestmark = pytest.mark.usefixtures("eight_devices")

MODELS = {
    "dense": tiny.DENSE,
    "moe": tiny.MOE,  # one dense layer, then one of experts
    "tied": tiny.model(
        num_heads=16,
        layer_pattern=("local", "global"),
        sliding_window=5,
        tie_embeddings=True,
        qk_norm=True,
        sandwich_norm=True,
        logit_softcap=3.0,
        attention_softcap=5.0,
    ),
}
SINGLES = [{axis: 8} for axis in MESH_AXES]
PAIRS = [{a: 2, b: 4} for a, b in itertools.combinations(MESH_AXES, 2)]


def sharded_run(name: str, accumulate: int = 1) -> RunConfig:
    return tiny.run(MODELS[name], accumulate=accumulate, batch_size=8 * accumulate, z_loss=0.01)


@functools.cache
def start(name: str) -> dict[str, jax.Array]:
    return tiny.params(MODELS[name])


def computed(name: str, axes: dict[str, int], accumulate: int = 1):
    """(nll, aux loss, global norm, gradients by path), on a mesh with these axes."""
    config, mesh = sharded_run(name, accumulate), tiny.mesh(**axes)
    places = {path: leaf.sharding for path, leaf in abstract_params(config.model, mesh).items()}
    params = jax.device_put(start(name), places)
    batch = put_batch(tiny.batch(config), mesh, config.train.batch_size)

    @functools.partial(jax.jit, out_shardings=(None, places))
    def run(params, batch):
        (nll, aux), gradients = step._gradients(config, step.objective(config), params, batch)
        return (nll, aux, step.optax.global_norm(gradients)), gradients

    with jax.set_mesh(mesh):
        return jax.device_get(run(params, batch))


single = functools.cache(lambda name, accumulate: computed(name, {"data": 1}, accumulate))


def check(name: str, axes: dict[str, int], accumulate: int = 1) -> None:
    sums, gradients = computed(name, axes, accumulate)
    want_sums, want_gradients = single(name, accumulate)
    np.testing.assert_allclose(sums, want_sums, rtol=1e-5, err_msg="nll, aux loss, gradient norm")
    assert gradients.keys() == want_gradients.keys()
    for path, want in want_gradients.items():
        assert np.abs(want).max() > 0, f"{path} has no gradient to compare"
        assert tiny.relative_error(gradients[path], want) < 1e-5, path


def label(axes: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in axes.items())


@pytest.mark.parametrize("axes", [a for a in SINGLES + PAIRS if "expert" not in a], ids=label)
def test_dense(axes):
    check("dense", axes)


@pytest.mark.parametrize("axes", SINGLES + PAIRS, ids=label)
def test_mixture_of_experts(axes):
    check("moe", axes)


@pytest.mark.parametrize("axes", [{"tensor": 8}, {"context": 8}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=label)
def test_tied_embeddings_windows_and_caps(axes):
    check("tied", axes)


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 4, "expert": 2}], ids=label)
def test_with_accumulation(axes):
    check("moe", axes, accumulate=2)


@pytest.mark.compat
def test_a_whole_step_on_three_axes():
    """Loss, gradient norm and every parameter after three steps of AdamW."""
    config = tiny.run(MODELS["moe"], steps=3, optimizer=OptimizerConfig(learning_rate=1e-2))

    def trained(**axes: int):
        mesh = tiny.mesh(**axes)
        state = step.init_program(config, mesh).compile()()
        train = step.train_program(config, mesh).compile()
        log = []
        for seed in range(3):
            state, metrics = train(state, put_batch(tiny.batch(config, seed), mesh, config.train.batch_size))
            log.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return log, jax.device_get(state.params)

    log, params = trained(data=2, tensor=2, expert=2)
    want_log, want_params = trained(data=1)
    np.testing.assert_allclose(log, want_log, rtol=1e-4)
    for path, want in want_params.items():
        np.testing.assert_allclose(params[path], want, atol=2e-3, err_msg=path)


def held(array: jax.Array) -> set[float]:
    """The share of the array that each device holds."""
    return {shard.data.size / array.size for shard in array.addressable_shards}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_is_born_sharded(optimizer):
    """A matrix over fsdp x tensor, an expert's over expert too; its moments alike; only norms and counters are whole."""
    config = tiny.run(MODELS["moe"], optimizer=OptimizerConfig(name=optimizer))
    mesh = tiny.mesh(fsdp=2, tensor=2, expert=2)
    abstract = step.abstract_state(config, mesh)
    state = step.init_program(config, mesh).compile()()
    jax.tree.map(lambda got, want: np.testing.assert_equal(got.sharding.spec, want.sharding.spec), state, abstract)
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    for path, value in state.params.items():
        share = 1.0
        if "norm" not in path:
            share = {"moe.router": 1 / 2}.get(path[-10:], 1 / 8 if ".moe." in path else 1 / 4)
        assert held(value) == {share}, path
        same = [m for key, m in moments if any(getattr(k, "key", None) == path for k in key) and m.shape == value.shape]
        assert same and all(held(m) == {share} for m in same), path


def test_a_model_is_divided_by_fsdp():
    """What each device holds of all parameters: an eighth, and the norms."""
    mesh = tiny.mesh(fsdp=8)
    config: ModelConfig = tiny.model(embed_dim=64)
    params = abstract_params(config, mesh)
    held_elements = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in params.values())
    norms = sum(leaf.size for path, leaf in params.items() if "norm" in path)
    everything = sum(leaf.size for leaf in params.values())
    assert held_elements == (everything - norms) / 8 + norms
