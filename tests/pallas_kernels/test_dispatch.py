"""The choice of an implementation: the order, the platform, refusals, what is asked for by name, and its explanation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import attention, blocks, dispatch
from pallas_kernels.dispatch import Chip, Choice, Implementation

KINDS = {"cpu": None, "tpu": "TPU v6 lite", "gpu": "NVIDIA H200", "cuda": "NVIDIA H200"}


def refuse_int8(chip: Chip, arguments: dispatch.Arguments) -> str | None:
    return f"{chip.kind} has no int8" if arguments["dtype"] == "int8" else None


IMPLEMENTATIONS = (
    Implementation("fast_tpu", lambda dtype: f"fast_tpu of {dtype}", "tpu", refuse_int8),
    Implementation("plain_tpu", lambda dtype: f"plain_tpu of {dtype}", "tpu"),
    Implementation("hopper", lambda dtype: f"hopper of {dtype}", "gpu"),
    Implementation("xla", lambda dtype: f"xla of {dtype}"),
)


class operation(NamedTuple):
    """Calls the operation as a chip of `platform` would; the chip is only described."""

    platform: str = "cpu"

    def __call__(self, dtype: str = "bf16", implementation: dispatch.Wanted = None):
        kind = KINDS[self.platform]
        device = None if kind is None else AbstractDevice(device_kind=kind, num_cores=1, platform=self.platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            return dispatch.call("operation", IMPLEMENTATIONS, implementation, {"dtype": dtype})


@pytest.mark.compat
@pytest.mark.parametrize(
    ("platform", "dtype", "wanted", "name"),
    [
        ("cpu", "bf16", None, "xla"),
        ("tpu", "bf16", None, "fast_tpu"),
        ("tpu", "int8", None, "plain_tpu"),
        ("gpu", "int8", None, "hopper"),
        ("cuda", "bf16", None, "hopper"),
        ("cpu", "bf16", "fast_tpu", "fast_tpu"),  # interpreted
        ("cpu", "int8", ("fast_tpu", "hopper"), "hopper"),
        ("tpu", "bf16", "xla", "xla"),
        ("gpu", "bf16", ["fast_tpu", "xla", "hopper"], "xla"),
    ],
)
def test_the_first_that_takes_the_call_runs(platform, dtype, wanted, name):
    assert operation(platform)(dtype, wanted) == f"{name} of {dtype}"
    assert dispatch.explain(operation(platform), dtype, implementation=wanted).name == name


def test_a_call_on_arrays_is_one_program():
    traced = []

    def double(x, factor):
        traced.append(isinstance(x, jax.core.Tracer))
        return factor * x

    def call(x, factor=2):
        return dispatch.call("double", [Implementation("xla", double)], None, {"x": x, "factor": factor})

    assert call(jnp.float32(3)) == 6 and call(jnp.float32(4)) == 8 and call(jnp.float32(4), 3) == 12
    assert traced == [True, True]  # once for each factor
    inside = jax.make_jaxpr(lambda x: call(x, 5))(jnp.float32(1))
    assert [str(one.primitive) for one in inside.eqns] == ["mul"]  # no program within a program


def test_a_gpu_kernel_is_traced_once_for_all_layers():
    """And anew for other options, and for block sizes that are forced."""
    traced = []

    def run(x, scale):
        traced.append(scale)
        return x * scale

    def layers(x, *scales):
        for scale in scales:
            x = dispatch.call("operation", [Implementation("hopper", run, "gpu")], None, {"x": x, "scale": scale})
        return x

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=1, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        jax.eval_shape(lambda x: layers(x, 2, 2, 2, 3), jnp.ones(4))
        assert traced == [2, 3]
        with blocks.forced("operation.forward", {"m": 8}):
            jax.eval_shape(lambda x: layers(x, 2), jnp.ones(4))
    assert traced == [2, 3, 2]


@pytest.mark.parametrize(
    ("platform", "dtype", "wanted", "message"),
    [
        ("tpu", "int8", "fast_tpu", r"operation cannot run here as asked \(fast_tpu: TPU v6 lite has no int8\)"),
        ("gpu", "bf16", "fast_tpu", r"\(fast_tpu: is written for a tpu, not for NVIDIA H200\)"),
        ("cpu", "int8", "fast_tpu", r"fast_tpu: \w+ has no int8"),
        ("gpu", "bf16", ("fast_tpu", "plain_tpu"), r"fast_tpu: is written for .*; plain_tpu: is written for a tpu"),
        ("cpu", "bf16", "magic", "'magic' of operation is not known; use one of fast_tpu, plain_tpu, hopper, xla"),
        ("cpu", "bf16", ("xla", "magic"), "'magic' of operation is not known"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(platform, dtype, wanted, message):
    for run in operation(platform), lambda *args: dispatch.explain(operation(platform), dtype, implementation=wanted):
        with pytest.raises(ValueError, match=message):
            run(dtype, wanted)


def test_every_implementation_passed_over_has_a_reason():
    assert dispatch.explain(operation("tpu"), "int8") == Choice(
        "plain_tpu",
        {
            "fast_tpu": "TPU v6 lite has no int8",
            "hopper": "plain_tpu comes before it",
            "xla": "plain_tpu comes before it",
        },
    )
    found = dispatch.explain(operation("gpu"), "bf16", implementation=["fast_tpu", "xla"])
    assert found.passed_over == {
        "fast_tpu": "is written for a tpu, not for NVIDIA H200",
        "plain_tpu": "not asked for",
        "hopper": "not asked for",
    }


@pytest.mark.compat
@pytest.mark.usefixtures("unchecked")
def test_a_public_function_is_explained_without_arrays():
    q = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    assert dispatch.explain(attention, q, q, q, implementation="reference").passed_over["xla"] == "not asked for"
    assert dispatch.explain("attention", q, q, q, implementation="xla").name == "xla"
    with pytest.raises(ValueError, match=r"attention takes q \[B,T,N,H\]"):
        dispatch.explain(attention, jax.ShapeDtypeStruct((1, 4, 2), jnp.float32), q, q)


def test_only_operations_are_explained():
    with pytest.raises(ValueError, match="is no operation of this package"):
        dispatch.explain(lambda implementation: jnp.zeros(()))


def test_what_a_cpu_runs_is_interpreted():
    assert dispatch.interpreted() == (dispatch.current_chip().platform == "cpu")
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert not dispatch.interpreted()
        assert dispatch.current_chip() == Chip("tpu", "TPU v6 lite")
