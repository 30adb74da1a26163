"""Weights as a server holds them: each layer's as arrays of their own, in the dtype of computation or quantized."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.compiler.program import Program
from llmos_jax.config import ModelConfig
from llmos_jax.models.decoder import Params, Unstacked, abstract_params, logical_dims
from llmos_jax.models.quantized import QuantizedTensor, quantize_leaf, split_dims
from llmos_jax.sharding import sharding

# On one device these lie side by side in the first, and the others are empty (`models.layers.project_together`).
_TOGETHER = (("q", "k", "v"), ("up", "gate"))


def joined(mesh: Mesh, path: str, paths: Collection[str]) -> tuple[str, ...]:
    """The parameters whose outputs are served under `path`; none where another one has them."""
    prefix, _, name = path.rpartition(".")
    for group in _TOGETHER:
        found = tuple(f"{prefix}.{one}" for one in group if f"{prefix}.{one}" in paths)
        if name in group and len(found) > 1 and mesh.size == 1 and not prefix.endswith(".moe"):
            return found if name == group[0] else ()
    return (path,)


def split_layers(model: ModelConfig, path: str, stacks: tuple[jax.Array, ...]) -> Any:
    """A stack of layers as a tuple of one layer's each; what is no stack as it is served. stacks: see `joined`."""
    if not path.startswith("segments."):
        return quantize_leaf(model, path, stacks[0])

    def layer(i: int) -> Any:
        if len(stacks) == 1:
            return quantize_leaf(model, path, stacks[0][i])
        return quantize_leaf(model, path, jnp.concatenate([x[i].reshape(x.shape[1], -1) for x in stacks], axis=-1))

    return tuple(layer(i) for i in range(stacks[0].shape[0]))


def _empty(model: ModelConfig, stack: Any) -> tuple[Any, ...]:
    """Of each layer, in place of weights that lie beside others."""
    return (np.zeros((stack.shape[1], 0), model.dtype),) * stack.shape[0]


def abstract_served_params(model: ModelConfig, mesh: Mesh) -> Unstacked:
    """Shapes, dtypes and shardings of `served_params`."""
    names, leaves = logical_dims(model), abstract_params(model)

    def of(path: str) -> Any:
        sources = tuple(leaves[source] for source in joined(mesh, path, leaves))
        with jax.set_mesh(mesh):  # how weights lie depends on the chip
            found = (
                jax.eval_shape(lambda x: split_layers(model, path, x), sources)
                if sources
                else _empty(model, leaves[path])
            )
        parts = found if isinstance(found, tuple) else (found,)
        placed = tuple(_placed(mesh, part, names[path][isinstance(found, tuple) :]) for part in parts)
        return placed if isinstance(found, tuple) else placed[0]

    return {path: of(path) for path in leaves}


def _placed(mesh: Mesh, part: Any, logical: tuple[str | None, ...]) -> Any:
    dims = split_dims(part, logical)
    if not isinstance(part, QuantizedTensor):
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding(mesh, dims))
    return jax.tree.map(
        lambda leaf, name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, name)), part, dims
    )


def convert_program(model: ModelConfig, mesh: Mesh, path: str, stacks: Any, served: Any) -> Program:
    places = jax.tree.map(lambda leaf: leaf.sharding, served)
    return Program("serve_weights", split_layers, (model, path), (stacks,), mesh, out_shardings=places)


def served_params(model: ModelConfig, params: Params, mesh: Mesh) -> Unstacked:
    """`params` (emptied on the way) as a server holds them.

    On one CPU without quantization the layers are slices that the host takes: nothing is compiled for it.
    """
    by_host = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" and model.quantize == "none"
    served: dict[str, Any] = {}
    places = abstract_served_params(model, mesh)
    sources = {path: joined(mesh, path, params) for path in params}
    for path, needed in sources.items():
        stacks = tuple(params.pop(source) for source in needed)
        layers: Any = places[path]
        if not stacks:
            served[path] = tuple(jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding) for leaf in layers)
        elif by_host and path.startswith("segments."):
            parts = [np.asarray(stack).reshape(*stack.shape[: 2 if len(stacks) > 1 else 1], -1) for stack in stacks]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
            shaped = [part.reshape(leaf.shape) for part, leaf in zip(whole, layers, strict=True)]
            served[path] = tuple(jax.device_put(shaped, [leaf.sharding for leaf in layers]))
        elif by_host:
            served[path] = stacks[0]
        else:
            shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in stacks)
            served[path] = convert_program(model, mesh, path, shapes, places[path]).compile()(stacks)
    return served
