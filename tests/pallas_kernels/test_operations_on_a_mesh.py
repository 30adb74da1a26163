"""Every operation called on sharded arguments, with no `shard_map` by the caller, equals itself on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def attention():
    q, k, v = normal(2, 6, 4, 8), normal(2, 6, 2, 8, seed=1), normal(2, 6, 2, 8, seed=2)
    spec = P("data", None, "tensor")
    return lambda q, k, v: pk.attention(q, k, v), (q, k, v), (spec, spec, spec)


def ragged_dot():
    sizes = jnp.asarray([3, 0, 4], jnp.int32)
    specs = (P("data"), P(None, None, "tensor"))
    return lambda x, w: pk.ragged_dot(x, w, sizes), (normal(8, 6), normal(3, 6, 4, seed=1)), specs


def ragged_dot_quantized():
    sizes, w = jnp.asarray([3, 0, 4], jnp.int32), pk.quantize(normal(3, 6, 4, seed=1))
    return lambda x: pk.ragged_dot(x, w, sizes), (normal(8, 6),), (P("data"),)


def linear_cross_entropy():
    labels, weights = jnp.arange(8) % 5, jnp.linspace(0.0, 1.0, 8)
    specs = (P("data"), P(None, "tensor"))
    return lambda x, w: pk.linear_cross_entropy(x, w, labels, weights)[0], (normal(8, 6), normal(6, 12, seed=1)), specs


CASES = [attention, ragged_dot, ragged_dot_quantized, linear_cross_entropy]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)


@pytest.mark.parametrize("case", CASES)
def test_sharded_arguments_give_the_same_results_and_gradients(case, mesh):
    run, arrays, specs = case()
    every = tuple(range(len(arrays)))

    def both(*arrays):
        loss = jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(run(*arrays))), every)
        return run(*arrays), *jax.tree.leaves(loss(*arrays))

    expected = jax.jit(both)(*arrays)
    with jax.sharding.set_mesh(mesh):
        split = [jax.device_put(a, spec) for a, spec in zip(arrays, specs, strict=True)]
        computed = jax.jit(both)(*split)
    for got, want in zip(computed, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_quantized_weights_split_over_their_outputs(mesh):
    w = pk.quantize(normal(16, 8, seed=1), bits=4, group_size=8, symmetric=False)
    x, bias = normal(4, 16), normal(8, seed=2)

    def run(x, w, bias):
        return pk.quantized_matmul(x, w, bias=bias, activation="silu")

    expected = run(x, w, bias)
    with jax.sharding.set_mesh(mesh):
        split = jax.tree.map(lambda a: jax.device_put(a, P(None, "tensor")), w)
        out = jax.jit(run)(jax.device_put(x, P("data")), split, jax.device_put(bias, P("tensor")))
    assert jax.typeof(out).sharding.spec == P("data", "tensor")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_pages_split_by_heads(mesh):
    pages = pk.new_pages(4, 4, 2, 8, jnp.float32)
    q, k_new, v_new = normal(3, 4, 8), normal(3, 2, 8, seed=1), normal(3, 2, 8, seed=2)
    batch = jnp.asarray([[2, 0], [1, 3]]), jnp.asarray([2, 1]), jnp.asarray([0, 2, 3]), jnp.asarray(2)

    def run(q, k_new, v_new, pages):
        return pk.paged_attention(q, k_new, v_new, pages, *batch)

    expected, expected_pages = jax.jit(run)(q, k_new, v_new, pages)
    with jax.sharding.set_mesh(mesh):
        heads = P(None, "tensor")
        split = [jax.device_put(a, heads) for a in (q, k_new, v_new, pages)]
        out, new = jax.jit(run)(*split)
    assert jax.typeof(new.data).sharding.spec == P(None, "tensor", None, None, None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new.data, expected_pages.data)
