"""The mesh, the table of rules, and how a batch reaches its devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from llmos_jax.config import MESH_AXES, MeshConfig, UserError
from llmos_jax.models.decoder import logical_dims
from llmos_jax.sharding import (
    RULES,
    axis_size,
    batch_sharding,
    constrain,
    make_mesh,
    process_rows,
    put_batch,
    sharded,
    spec,
)
from tests import tiny

pytestmark = pytest.mark.usefixtures("eight_devices")


def test_a_mesh_has_every_axis():
    mesh = make_mesh(MeshConfig(tensor=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1, "expert": 1}
    with pytest.raises(UserError, match="multiply to 3, which does not divide the 8 devices"):
        make_mesh(MeshConfig(tensor=3))


def test_names_become_mesh_axes():
    assert spec(("batch", "sequence", None)) == P(("data", "fsdp", "expert"), "context", None)
    assert spec(("layers", "embed", "heads", "head_dim")) == P(None, "fsdp", "tensor", None)
    assert spec(()) == P()


def test_the_table_covers_every_parameter_and_splits_no_array_twice_over_an_axis():
    for model in (tiny.DENSE, tiny.MOE, tiny.model(position="learned", norm="layernorm", mlp_bias=True, qkv_bias=True)):
        for path, dims in logical_dims(model).items():
            axes = [axis for name in dims for axis in RULES[name]]
            assert len(axes) == len(set(axes)) and set(axes) <= set(MESH_AXES), path


def test_outside_of_a_mesh_nothing_is_done():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "sequence") is x
    assert axis_size("tensor") == 1

    def function(x):
        return x

    assert sharded(function, (("batch",),), ("batch",)) is function


def test_inside_of_a_mesh():
    mesh = tiny.mesh(data=2, tensor=4)
    x = jnp.arange(16.0).reshape(4, 4)

    def local(x):
        assert x.shape == (2, 4)  # this device's rows
        return x * 2, jax.lax.psum(x.sum(), ("data", "fsdp", "expert", "context"))

    with jax.set_mesh(mesh):
        assert axis_size("tensor") == 4 and axis_size("nowhere") == 1
        run = sharded(local, (("batch", None),), (("batch", None), ()))
        doubled, total = jax.jit(run)(x)
        pinned = jax.jit(lambda x: constrain(x, "batch", "mlp"))(x)
    np.testing.assert_array_equal(doubled, 2 * x)
    assert float(total) == 120.0
    assert {shard.data.shape for shard in pinned.addressable_shards} == {(2, 1)}


@given(st.permutations([2, 2, 2, 1, 1]))
def test_each_device_receives_its_part_of_a_batch(sizes):
    mesh = tiny.mesh(**dict(zip(MESH_AXES, sizes, strict=True)))
    rows = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    batch = put_batch({"tokens": rows}, mesh, 8)["tokens"]
    assert batch.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(batch, rows)
    shape = dict(mesh.shape)
    parts = (8 // math.prod(shape[a] for a in ("data", "fsdp", "expert")), 4 // shape["context"])
    for shard in batch.addressable_shards:
        assert shard.data.shape == parts
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    assert process_rows(mesh, 8) == slice(0, 8)


def test_an_abstract_mesh_is_enough_for_shapes():
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 4), ("data", "tensor"))):
        assert axis_size("tensor") == 4
