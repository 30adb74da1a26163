"""Where every array lives: the mesh, and the one table from logical dimension names to mesh axes.

Models name the dimensions of their parameters and activations ("embed", "heads", ...); only this table knows which
mesh axis a name is split over. Nothing here is told the size of the model: the compiler partitions by these specs.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmos_jax.config import MESH_AXES, MeshConfig, UserError, mesh_shape

Logical = tuple[str | None, ...]

# Batch is split over every axis that holds different sequences; the expert axis holds some of them too, and its
# devices exchange tokens only inside a mixture-of-experts layer.
RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "residual": ("context", "tensor"),  # the sequence between layers, which the tensor axis splits too
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "norm": (),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with every axis of `MESH_AXES`, those of size one included, so that one set of specs fits all.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = mesh_shape(config, len(devices))
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(logical: Logical) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are named `logical` (None: not split)."""
    axes = [RULES[name] if name is not None else () for name in logical]
    return PartitionSpec(*(group[0] if len(group) == 1 else (group or None) for group in axes))


def sharding(mesh: Mesh, logical: Logical) -> NamedSharding:
    return NamedSharding(mesh, spec(logical))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins `x` to the table's sharding inside a program; outside of a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical))


def axis_size(name: str) -> int:
    """Size of a mesh axis of the surrounding mesh, 1 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def sharded(function, in_logical: tuple[Any, ...], out_logical: Any):
    """`function` as a `shard_map` over the surrounding mesh; the function itself where there is none.

    Args:
      function: takes and returns per-device blocks; may use the mesh axes in collectives.
      in_logical, out_logical: the names of the dimensions of each argument and result (any pytree). A dimension that
        is named None arrives whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    specs = functools.partial(jax.tree.map, spec, is_leaf=_is_logical)
    return jax.shard_map(function, mesh=mesh, in_specs=specs(in_logical), out_specs=specs(out_logical), check_vma=False)


def _is_logical(value) -> bool:
    return isinstance(value, tuple) and all(name is None or isinstance(name, str) for name in value)


def token_dims(shape: tuple[int, ...]) -> Logical:
    """The names of the first two dimensions of activations [B, T, ...]: "residual" splits T over the tensor axis too.

    A dimension that the mesh does not divide (one sequence, one new token) stays whole.
    """

    def fits(name: str, size: int) -> bool:
        return size % math.prod(map(axis_size, RULES[name])) == 0

    batch = "batch" if fits("batch", shape[0]) else None
    return batch, next((name for name in ("residual", "sequence") if fits(name, shape[1])), None)


# Collectives, inside `sharded`. Each is left out where its axis has one device. Their transposes are each other's, so
# that a layer's backward pass has the same few: what is gathered forward is summed and scattered backward.


def whole(weight: Any, logical: Logical, dtype) -> Any:
    """A weight in `dtype` with the dimensions that `fsdp` splits gathered; those of other axes stay split.

    A quantized weight (a pytree of arrays) is for serving, where `fsdp` splits nothing, and stays as it is.
    """
    if not isinstance(weight, jax.Array):
        return weight
    weight = weight.astype(dtype)
    if axis_size("fsdp") == 1:
        return weight
    for dim, name in enumerate(logical):
        if name is not None and "fsdp" in RULES[name]:
            # Gathered as the first dimension: only there do TPUs scatter the gradient's sums, elsewhere they add up all
            # of it on every device and slice. The move itself is a choice of layout, not a copy.
            first = jax.lax.all_gather(jnp.moveaxis(weight, dim, 0), "fsdp", axis=0, tiled=True)
            weight = jnp.moveaxis(first, 0, dim)
    return weight


def gather_tokens(x: jax.Array, sequence: str | None) -> jax.Array:
    """[B, T, ...] between layers -> with all tokens that the tensor axis's devices work on together."""
    if sequence != "residual" or axis_size("tensor") == 1:
        return x
    if x.shape[0] == 1:
        return jax.lax.all_gather(x[0], "tensor", axis=0, tiled=True)[None]
    return jax.lax.all_gather(x, "tensor", axis=1, tiled=True)


def sum_over_tensor(x: jax.Array, sequence: str | None) -> jax.Array:
    """Adds up the parts [B, T, D] that the tensor axis's devices computed, back into the layout between layers."""
    if axis_size("tensor") == 1:
        return x
    if sequence != "residual":
        return jax.lax.psum(x, "tensor")
    if x.shape[0] == 1:  # as a matrix: see `whole`
        return jax.lax.psum_scatter(x[0], "tensor", scatter_dimension=0, tiled=True)[None]
    return jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a [B, T] batch."""
    return sharding(mesh, ("batch", "sequence"))


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The contiguous rows of the global batch that this process's devices hold.

    Every process must feed whole rows, so the batch dimension is the outermost one of the mesh; a mesh that splits a
    sequence or a tensor over processes makes several of them read the same rows, which this allows.
    """
    index_map = batch_sharding(mesh).addressable_devices_indices_map((batch_size, 2**20))
    rows = [index[0].indices(batch_size)[:2] for index in index_map.values() if index is not None]
    start, stop = min(r[0] for r in rows), max(r[1] for r in rows)
    covered = np.zeros(batch_size, bool)
    for a, b in rows:
        covered[a:b] = True
    if not covered[start:stop].all():
        raise UserError(
            "the mesh gives a process rows of the batch that are not side by side; put mesh.data or mesh.fsdp over the "
            "processes, and mesh.tensor, mesh.context and mesh.expert inside of one"
        )
    return slice(start, stop)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows [B_local, T] as global arrays [B, T], each device receiving its own part only."""
    target = batch_sharding(mesh)
    start = process_rows(mesh, batch_size).start

    def place(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, *rows.shape[1:])

        def block(index):
            first, last, _ = index[0].indices(batch_size)
            return rows[(slice(first - start, last - start), *index[1:])]

        return jax.make_array_from_callback(shape, target, block)

    return {name: place(rows) for name, rows in batch.items()}
