"""Weights as a server holds them: each layer's as arrays of their own, in the dtype of computation or quantized."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llmos_jax.compiler.program import Program
from llmos_jax.config import ModelConfig
from llmos_jax.models.decoder import Params, Unstacked, abstract_params, logical_dims
from llmos_jax.models.quantized import QuantizedTensor, quantize_leaf, split_dims
from llmos_jax.sharding import sharding


def split_layers(model: ModelConfig, path: str, stack: jax.Array) -> Any:
    """A stack of layers as a tuple of one layer's each; what is no stack as it is served."""
    if not path.startswith("segments."):
        return quantize_leaf(model, path, stack)
    return tuple(quantize_leaf(model, path, stack[i]) for i in range(stack.shape[0]))


def abstract_served_params(model: ModelConfig, mesh: Mesh) -> Unstacked:
    """Shapes, dtypes and shardings of `served_params`."""
    names = logical_dims(model)

    def of(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        with jax.set_mesh(mesh):  # how weights lie depends on the chip
            found = jax.eval_shape(lambda x: split_layers(model, path, x), leaf)
        parts = found if isinstance(found, tuple) else (found,)
        placed = tuple(_placed(mesh, part, names[path][isinstance(found, tuple) :]) for part in parts)
        return placed if isinstance(found, tuple) else placed[0]

    return {path: of(path, leaf) for path, leaf in abstract_params(model).items()}


def _placed(mesh: Mesh, part: Any, logical: tuple[str | None, ...]) -> Any:
    dims = split_dims(part, logical)
    if not isinstance(part, QuantizedTensor):
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding(mesh, dims))
    return jax.tree.map(
        lambda leaf, name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, name)), part, dims
    )


def convert_program(model: ModelConfig, mesh: Mesh, path: str, stack: Any, served: Any) -> Program:
    places = jax.tree.map(lambda leaf: leaf.sharding, served)
    return Program("serve_weights", split_layers, (model, path), (stack,), mesh, out_shardings=places)


def served_params(model: ModelConfig, params: Params, mesh: Mesh) -> Unstacked:
    """`params` (emptied on the way) as a server holds them.

    On one CPU without quantization the layers are slices that the host takes: nothing is compiled for it.
    """
    by_host = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" and model.quantize == "none"
    served: dict[str, Any] = {}
    places = abstract_served_params(model, mesh)
    for path in list(params):
        stack = params.pop(path)
        if by_host and path.startswith("segments."):
            layers: Any = places[path]
            parts = [part.reshape(leaf.shape) for part, leaf in zip(np.asarray(stack), layers, strict=True)]
            served[path] = tuple(jax.device_put(parts, [leaf.sharding for leaf in layers]))
        elif by_host:
            served[path] = stack
        else:
            shape = jax.ShapeDtypeStruct(stack.shape, stack.dtype, sharding=stack.sharding)
            served[path] = convert_program(model, mesh, path, shape, places[path]).compile()(stack)
    return served
