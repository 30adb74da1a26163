"""Attention on the host's processor (`native/attention.cc`), differentiable."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention.reference import visible_pairs
from pallas_kernels.attention.residuals import kept
from pallas_kernels.attention.xla import FEW_QUERIES
from pallas_kernels.cpu import refuse_natively
from pallas_kernels.dispatch import Arguments, Chip
from pallas_kernels.native import native


class Options(NamedTuple):
    """What a call is made for."""

    causal: bool
    window: int
    softcap: float
    scale: float
    pairs: int  # of a query and a key that it can see, a head: what is computed

    def attributes(self, products: int, q: Array) -> dict:
        """products: of the head's size, for each pair."""
        return {
            "causal": self.causal,
            "window": np.int64(self.window),
            "softcap": np.float32(self.softcap),
            "scale": np.float32(self.scale),
            "flops": np.int64(2 * products * self.pairs * q.shape[0] * q.shape[2] * q.shape[3]),
        }


def attention(
    q,
    k,
    v,
    *,
    causal,
    window,
    q_offset,
    q_segment_ids,
    kv_segment_ids,
    softcap,
    scale,
    sinks,
    alibi_slopes,
    bias,
    return_lse,
):
    """See `api.attention`."""
    del alibi_slopes, bias  # none: `refuse`
    options = _options(q, k, causal, window, q_offset, softcap, scale)
    sinks = jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    out, lse = _attention(options, q, k, v, sinks, _positions(q, q_offset, q_segment_ids, kv_segment_ids))
    return (out, lse) if return_lse else out


def backward(
    q, k, v, d_out, lse, delta, *, causal, window, q_offset, q_segment_ids, kv_segment_ids, softcap, scale
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of a block of keys out of many: see `xla.backward`."""
    options = _options(q, k, causal, window, q_offset, softcap, scale)
    return _gradients(options, q, k, v, d_out, lse, delta, _positions(q, q_offset, q_segment_ids, kv_segment_ids))


def _options(q, k, causal, window, q_offset, softcap, scale) -> Options:
    pairs = visible_pairs(q.shape[1], k.shape[1], causal, window, q_offset if isinstance(q_offset, int) else None)
    return Options(causal, min(window or 0, 2**30), softcap or 0.0, scale, pairs)


def _positions(q, q_offset, *segment_ids) -> tuple[Array, ...]:
    """Where the queries of each sequence begin among the keys, and the segments of both; none are empty."""
    ids = (jnp.zeros((0, 0), jnp.int32) if x is None else x.astype(jnp.int32) for x in segment_ids)
    return jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), q.shape[0]), *ids


def refuse(chip: Chip, arguments: Arguments) -> str | None:
    q, k, v = (arguments[name] for name in "qkv")
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"takes float32 or bfloat16 throughout, not {q.dtype}, {k.dtype}, {v.dtype}"
    if arguments["bias"] is not None or arguments["alibi_slopes"] is not None:
        return "takes neither a bias nor slopes"
    if q.shape[1] <= FEW_QUERIES:
        return f"takes more than {FEW_QUERIES} queries, not {q.shape[1]}"
    if q.dtype == jnp.bfloat16 and native().tiles:
        return "leaves bfloat16 to XLA, whose products use this processor's AMX"
    return refuse_natively(arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, sinks, positions):
    return _forward(options, q, k, v, sinks, positions)[0]


def _forward(options, q, k, v, sinks, positions):
    batch, num_queries, num_heads, _ = q.shape
    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
    )
    call = jax.ffi.ffi_call("pallas_kernels.attention", results, vmap_method="sequential")
    out, lse = kept(*call(q, k, v, *positions, sinks, **options.attributes(2, q)))
    return (out, lse), (q, k, v, sinks, positions, out, lse)


def _backward(options, residuals, cotangents):
    q, k, v, sinks, positions, out, lse = residuals
    d_out, d_lse = cotangents
    # The log-sum-exp's gradient adds p d_lse to that of a score, p (dp - delta): it only changes delta.
    delta = jnp.einsum("btnh,btnh->bnt", d_out.astype(jnp.float32), out.astype(jnp.float32)) - d_lse
    dq, dk, dv = _gradients(options, q, k, v, d_out, lse, delta, positions)
    d_sinks = -jnp.sum(jnp.exp(sinks[:, None] - lse) * delta, axis=(0, 2)) if sinks.size else jnp.zeros_like(sinks)
    return dq, dk, dv, d_sinks, None


_attention.defvjp(_forward, _backward)


def _gradients(options, q, k, v, d_out, lse, delta, positions):
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    call = jax.ffi.ffi_call("pallas_kernels.attention_backward", results, vmap_method="sequential")
    return call(q, k, v, d_out.astype(q.dtype), lse, delta, *positions, **options.attributes(5, q))
