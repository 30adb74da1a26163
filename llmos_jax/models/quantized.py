"""Weights quantized for serving: which become what, how they are multiplied, and the names of their dimensions.

int8: one scale an output, activations quantized by row, exact sums (W8A8, arXiv:2208.07339). int4: groups of 128 with
zero points, activations in floating point (W4A16). Norms, biases and routers keep their dtype.
"""

import dataclasses
import math
from typing import Any

from jaxtyping import Array, Float, Int

from llmos_jax.config import ModelConfig, UserError
from pallas_kernels import QuantizedTensor, dequantize, quantize, quantized_matmul
from pallas_kernels.dispatch import current_chip

KINDS = ("none", "int8", "int4")
GROUP = 128
# Projections by the last part of their path, with how many dimensions are summed over.
_INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
# Served as a matrix [in, heads x head_dim] in any dtype: TPUs lay an array with heads of its own out anew at every step.
_BY_HEADS = ("q", "k", "v")
# The output layer decides every token and is read whole at each step: eight bits for both kinds. Axis of the groups.
_OUTPUT = {"embed.table": -1, "head.kernel": -2}


def product(x: Float[Array, "*batch K"], w: QuantizedTensor, out_dtype: Any = None) -> Float[Array, "*batch N"]:
    w = dataclasses.replace(w, size=min(w.size, w.padded_size))  # a device that has a part of the inputs
    activations = "int8" if w.bits == 8 else None
    return quantized_matmul(x, w, activations=activations, out_dtype=out_dtype)


def look_up(table: Float[Array, "V D"] | QuantizedTensor, ids: Int[Array, "*ids"], dtype) -> Float[Array, "*ids D"]:
    """Rows of an embedding table."""
    if not isinstance(table, QuantizedTensor):
        return table[ids]
    flat = ids.reshape(-1)
    rows = dataclasses.replace(
        table,
        data=table.data[flat],
        scales=table.scales[:, flat],
        zeros=None if table.zeros is None else table.zeros[:, flat],
    )
    return dequantize(rows, dtype).reshape(*ids.shape, -1)


def split_dims(value: Any, logical: tuple[str | None, ...]) -> Any:
    """The names of the dimensions of a parameter as it is trained or served; of a quantized one, of codes and scales."""
    if not isinstance(value, QuantizedTensor):
        is_matrix = value.ndim < len(logical)  # heads and head_dim became one
        return tuple(name for name in logical if name != "head_dim") if is_matrix else logical
    lead = logical[: value.ndim - 2]
    rest = [name for name in logical[value.ndim - 2 :] if name != "head_dim"]  # heads and head_dim became one
    codes: Any = (*lead, *rest)
    if value.axis == -1 and "vocab" not in logical:  # a projection, [out, in]; a table is [vocab, embed] anyway
        rest = rest[::-1]
        codes = (*lead, *rest)
    into, out = rest if value.axis == -2 else reversed(rest)
    scales: Any = (*lead, into if value.group_size else None, out)
    return dataclasses.replace(value, data=codes, scales=scales, zeros=None if value.zeros is None else scales)


def quantize_leaf(config: ModelConfig, path: str, value: Array) -> Array | QuantizedTensor:
    """One layer's parameter as it is served: quantized, or in the dtype of computation."""
    name = path.rsplit(".", 1)[-1]
    if config.quantize == "none" or (name not in _INPUTS and path not in _OUTPUT):
        value = value.astype(config.dtype)
        return value.reshape(value.shape[0], -1) if name in _BY_HEADS else value
    platform = current_chip().platform
    if path in _OUTPUT:
        return _unpadded(quantize(value, 8, axis=_OUTPUT[path]), platform)
    experts = value.shape[:1] if ".moe." in path else ()
    shape = value.shape[len(experts) :]
    matrix = value.reshape(*experts, math.prod(shape[: 1 if experts else _INPUTS[name]]), -1)
    if config.quantize == "int4":
        if platform == "gpu" and not experts:  # its kernel streams [out, in]
            return quantize(matrix.mT, 4, group_size=GROUP, symmetric=False, axis=-1)
        return quantize(matrix, 4, group_size=GROUP, symmetric=False)
    # A CPU's int8 products of a few rows read [out, in] up to three times as fast, and a GPU takes nothing else.
    return quantize(matrix, 8) if experts or platform == "tpu" else _unpadded(quantize(matrix.mT, 8, axis=-1), platform)


def _unpadded(w: QuantizedTensor, platform: str) -> QuantizedTensor:
    """On a CPU no kernel asks for whole blocks, and to pad the activations costs as much as to quantize them."""
    if platform != "cpu" or w.axis != -1:
        return w
    return dataclasses.replace(w, data=w.data[..., : w.size])


def check_quantize(config: ModelConfig, tensor: int) -> None:
    """UserError where the weights cannot be quantized so, or not be split over `tensor` devices."""
    if config.quantize not in KINDS:
        raise UserError(f"model.quantize={config.quantize} is unknown; use {', '.join(KINDS)}")
    size = GROUP * tensor
    for what, inputs in (("heads x head_dim", config.num_heads * config.head_dim), ("mlp_dim", config.mlp_dim)):
        if config.quantize != "none" and tensor > 1 and inputs % size:
            raise UserError(
                f"{what}={inputs} is not a multiple of {size}, which quantized weights over {tensor} devices need; "
                "use fewer devices or leave out quantization"
            )
