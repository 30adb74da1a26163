"""Operations under a mesh equal those on one device, whatever their arguments are split over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.partition import Dims, Layout

LAYOUT = Layout({"x": Dims(("rows", None)), "w": Dims((None, "columns"))}, (Dims(("rows", "columns")), Dims(())))


def compute(x, w, power):
    """A product, and a sum over everything."""
    y = jnp.sin(x @ w) ** power
    return y, jnp.sum(y)


IMPLEMENTATIONS = [Implementation("kernel", compute, platform="cpu"), Implementation("xla", compute)]


def toy(x, w, power=2, implementation=None):
    return call("toy", IMPLEMENTATIONS, implementation, {"x": x, "w": w, "power": power}, LAYOUT)


def loss(x, w):
    y, total = toy(x, w)
    return total + jnp.sum(jnp.cos(y))


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((8, 6)), jnp.float32), jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)


@pytest.mark.parametrize(
    ("x_spec", "w_spec", "out_spec"),
    [
        (P("data"), P(None, "tensor"), P("data", "tensor")),
        (P(("data", "tensor")), P(), P(("data", "tensor"), None)),
        (P(None, "data"), P("data"), P(None, None)),  # the contracted dimension is gathered
        (P("data"), P(None, "data"), P("data", None)),  # one axis cannot split both
        (P("tensor"), P(None, "data"), P("tensor", "data")),
    ],
)
@pytest.mark.compat
def test_explicit_axes(arrays, x_spec, w_spec, out_spec):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    expected = *compute(*arrays, 2), *jax.grad(loss, (0, 1))(*arrays)
    with jax.sharding.set_mesh(mesh):
        x, w = (jax.device_put(a, spec) for a, spec in zip(arrays, (x_spec, w_spec), strict=True))
        y, total = jax.jit(toy)(x, w)
        gradients = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    assert jax.typeof(y).sharding.spec == out_spec
    for got, want in zip((y, total, *gradients), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_size_that_the_axes_do_not_divide_is_not_split(arrays):
    x, w = arrays
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.sharding.set_mesh(mesh):
        y, _ = jax.jit(toy)(x, jax.device_put(w[:, :4], P()))
        odd, _ = jax.jit(toy)(x[:7], w)
    np.testing.assert_allclose(odd, compute(x[:7], w, 2)[0], rtol=1e-6)
    np.testing.assert_allclose(y, compute(x, w, 2)[0], rtol=1e-6)


def test_auto_axes_pass_the_kernel_over(arrays):
    from pallas_kernels.dispatch import explain

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    assert explain(toy, *arrays).name == "kernel"
    with jax.sharding.set_mesh(mesh):
        choice = explain(toy, *arrays)
        y = jax.jit(lambda x, w: toy(x, w)[0], in_shardings=(P("data"), P()))(*arrays)
        inside = jax.shard_map(
            lambda x, w: toy(x, w)[0] if explain(toy, x, w).name == "kernel" else x * jnp.nan,
            in_specs=(P("data"), P()),
            out_specs=P("data"),
        )(*arrays)
    assert choice.name == "xla" and "auto axes (data)" in choice.passed_over["kernel"]
    np.testing.assert_allclose(y, compute(*arrays, 2)[0], rtol=1e-5)
    np.testing.assert_allclose(inside, y, rtol=1e-5)
