"""Operations under a mesh: a kernel is not partitioned by the compiler, so each device runs it on its own part.

With explicit axes (`jax.make_mesh`'s default) the arguments' types say how they are split, and the operation runs in
`shard_map` with specs derived from them. Inside a `shard_map` of the caller's there is nothing to do. Over auto axes
a traced argument does not tell how it is split: kernels are passed over there (see `auto_axes`) for plain XLA.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec


class Dims(tuple[str | None, ...]):
    """The names of an array's dimensions. Dimensions of one name are split alike; None is never split."""


class Layout(NamedTuple):
    """How an operation may be split.

    inputs: argument -> its Dims, or a pytree of Dims for an argument that is one; what is left out is no array.
    outputs: Dims, or a pytree of them. Where a name of the inputs is missing in an output, that output is a sum over
    it and is added up over the devices.
    """

    inputs: dict[str, Any]
    outputs: Any


def auto_axes() -> tuple[str, ...]:
    """The axes of the mesh in use over which the compiler may have split an argument without our knowing."""
    return _axes(AxisType.Auto)


def varying_axes(arguments: Any) -> tuple[str, ...]:
    """The axes that arrays among `arguments` are known to vary over, inside a shard_map that checks it."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array)]
    return tuple(sorted({str(axis) for kind in types for axis in kind.manual_axis_type.varying}))


def run_on_parts(run: Callable[..., Any], arguments: dict[str, Any], layout: Layout) -> Any:
    """run(**arguments), each device on its part of them."""
    explicit = _axes(AxisType.Explicit)
    if not explicit:
        return run(**arguments)
    names = [name for name in layout.inputs if _is_array(arguments[name])]
    rest = {name: value for name, value in arguments.items() if name not in names}
    arrays, dims = [arguments[name] for name in names], [layout.inputs[name] for name in names]
    split = _splits(jax.tree.leaves(dims, is_leaf=_is_dims), jax.tree.leaves(arrays))

    def specs(of: Any) -> Any:
        return jax.tree.map(lambda names: PartitionSpec(*(split.get(name) for name in names)), of, is_leaf=_is_dims)

    def local(arrays):
        outputs = run(**dict(zip(names, arrays, strict=True)), **rest)
        return jax.tree.map(functools.partial(_add_up, split), outputs, layout.outputs)

    arrays = jax.tree.map(jax.sharding.reshard, arrays, specs(dims))
    return jax.shard_map(
        local, in_specs=(specs(dims),), out_specs=specs(layout.outputs), axis_names=set(explicit), check_vma=False
    )(arrays)


def _axes(kind: AxisType) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    named = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis in named if axis == kind and mesh.shape[name] > 1)


def _is_dims(x: Any) -> bool:
    return isinstance(x, Dims)


def _is_array(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def _splits(dims: list[Dims], arrays: list[jax.Array]) -> dict[str | None, tuple[str, ...]]:
    """The mesh axes of each named dimension: as the first argument has it, where it divides that of every argument."""
    sizes: dict[str, list[int]] = {}
    wanted: dict[str, tuple[str, ...]] = {}
    for names, array in zip(dims, arrays, strict=True):
        spec = jax.typeof(array).sharding.spec
        for name, size, axes in zip(names, array.shape, (*spec, *[None] * (array.ndim - len(spec))), strict=True):
            if name is not None:
                sizes.setdefault(name, []).append(size)
                if axes is not None:
                    wanted.setdefault(name, (axes,) if isinstance(axes, str) else tuple(axes))
    mesh = jax.sharding.get_abstract_mesh()
    taken: set[str] = set()
    split: dict[str | None, tuple[str, ...]] = {}
    for name, axes in wanted.items():
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if not taken & set(axes) and all(size % parts == 0 for size in sizes[name]):
            split[name] = axes
            taken |= set(axes)
    return split


def _add_up(split: dict[str | None, tuple[str, ...]], x: jax.Array, dims: Dims) -> jax.Array:
    missing = [axis for name, axes in split.items() if name not in dims for axis in axes]
    return jax.lax.psum(x, tuple(missing)) if missing else x
