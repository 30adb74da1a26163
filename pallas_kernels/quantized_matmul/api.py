"""`quantized_matmul`: the public function, its checks, its gradient, and the choice of implementation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation, Wanted
from pallas_kernels.later import Later
from pallas_kernels.partition import Dims, Layout
from pallas_kernels.quantized_matmul import cpu, reference, xla
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

tpu, gpu = Later("pallas_kernels.quantized_matmul.tpu"), Later("pallas_kernels.quantized_matmul.gpu")


def quantized_matmul(
    x: Float[Array, "*batch K"],
    w: QuantizedTensor,
    *,
    activations: str | None = None,
    bias: Float[Array, "N"] | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    implementation: Wanted = None,
) -> Float[Array, "*batch N"]:
    """activation(x w + bias) with quantised weights; differentiable in x and bias, not in w.

    Sums are in float32, or exact in int32. The gradient of x is g w^T with w dequantised, also where activations are
    quantised (a straight-through estimate, arXiv:1308.3432): adapters train on frozen quantised weights.

    Args:
      x: activations.
      w: [K, N] quantised along -2, or [N, K] along -1: always along what is summed. GPUs take the latter (`w.mT`).
      activations: "int8" or "fp8" quantises each row of x by its largest entry, so that products are of int8 (w in 8
        or 4 bits; arXiv:2208.07339) or of fp8 (w in fp8). None keeps x as it is.
      activation: "silu", "gelu" (the tanh approximation) or "relu", applied last.
      out_dtype: x's if None.
      implementation: "tpu", "gpu", "cpu", "xla" or "reference", or several in order; None takes the best for the platform.

    Returns: [..., N].
    Raises: ValueError for arguments that do not fit, or where no implementation asked for takes them.
    """
    _check(x, w, activations, bias, activation)
    options = {
        "activations": activations,
        "activation": activation,
        "out_dtype": jnp.dtype(x.dtype if out_dtype is None else out_dtype),
    }
    arguments = {"x": x.reshape(-1, x.shape[-1]), "w": w, "bias": bias, **options}
    out = dispatch.call("quantized_matmul", IMPLEMENTATIONS, implementation, arguments, _layout(w))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _layout(w: QuantizedTensor) -> Layout:
    """Rows and outputs may be split over a mesh; what is summed over stays whole, for the bias and activation after it."""
    by_group = Dims((None, "columns"))
    of_w = dataclasses.replace(
        w,
        data=by_group if w.axis == -2 else Dims(("columns", None)),
        scales=by_group,
        zeros=None if w.zeros is None else by_group,
    )
    return Layout({"x": Dims(("rows", None)), "w": of_w, "bias": Dims(("columns",))}, Dims(("rows", "columns")))


def _check(x, w, activations, bias, activation) -> None:
    if not isinstance(w, QuantizedTensor) or w.ndim != 2:
        what = f"one of shape {w.shape}" if isinstance(w, QuantizedTensor) else type(w).__name__
        raise ValueError(f"w must be a QuantizedTensor of two dimensions, not {what}")
    num_outputs = w.shape[-1 if w.axis == -2 else -2]
    if x.ndim < 1 or x.shape[-1] != w.size:
        raise ValueError(f"x {x.shape} does not end in the {w.size} inputs of w {w.shape} (axis={w.axis})")
    if bias is not None and bias.shape != (num_outputs,):
        raise ValueError(f"bias {bias.shape} is not ({num_outputs},), one for each output")
    if activations not in (None, "int8", "fp8"):
        raise ValueError(f"activations={activations!r} is not None, 'int8' or 'fp8'")
    if activations is not None and (activations == "fp8") != (w.bits == "fp8"):
        raise ValueError(f"activations={activations!r} do not go with weights of bits={w.bits!r}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not None, 'silu', 'gelu' or 'relu'")


def _differentiable(forward: Callable[..., Array], input_gradient: Callable[..., Array]) -> Callable[..., Array]:
    """forward(x, w, bias, *, activations, activation, out_dtype) with gradients of x and bias."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def product(x, w, bias, options):
        activations, activation, out_dtype = options
        return forward(x, w, bias, activations=activations, activation=activation, out_dtype=out_dtype)

    def with_residuals(x, w, bias, options):
        activations, activation, out_dtype = options
        like = (jnp.zeros((0,), x.dtype), bias)
        if activation is None:
            return product(x, w, bias, options), (None, w, like)
        precision = jnp.promote_types(jnp.float32, x.dtype)
        before = forward(x, w, bias, activations=activations, activation=None, out_dtype=precision)
        return reference.ACTIVATIONS[activation](before).astype(out_dtype), (before, w, like)

    def backward(options, residuals, g):
        before, w, (x_like, bias) = residuals
        if before is not None:
            g = jax.vjp(reference.ACTIVATIONS[options[1]], before)[1](g.astype(before.dtype))[0]
        d_bias = None if bias is None else jnp.sum(g, axis=0, dtype=jnp.promote_types(jnp.float32, g.dtype))
        dx = input_gradient(g.astype(x_like.dtype), w, x_like.dtype)
        return dx, None, None if d_bias is None else d_bias.astype(bias.dtype)

    product.defvjp(with_residuals, backward)
    return lambda x, w, bias, activations, activation, out_dtype: product(
        x, w, bias, (activations, activation, out_dtype)
    )


IMPLEMENTATIONS = (
    Implementation("tpu", _differentiable(tpu.quantized_matmul, tpu.input_gradient), "tpu", tpu.refuse),
    Implementation(
        "gpu",
        _differentiable(gpu.quantized_matmul, gpu.input_gradient),
        "gpu",
        gpu.refuse,
        unproven="was timed on a real GPU, but its results were not compared there yet",
    ),
    Implementation("cpu", _differentiable(cpu.quantized_matmul, xla.input_gradient), "cpu", cpu.refuse),
    Implementation("xla", _differentiable(xla.quantized_matmul, xla.input_gradient)),
    Implementation("reference", _differentiable(reference.quantized_matmul, reference.input_gradient)),
)
