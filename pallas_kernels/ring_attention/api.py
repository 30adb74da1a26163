"""`ring_attention`: the public function, its checks, and what is done around the ring."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.ring_attention import reference
from pallas_kernels.ring_attention.order import Order
from pallas_kernels.ring_attention.ring import Settings, ring


def _ring(
    q, k, v, *, axis_name, order, causal, window, segment_ids, softcap, scale, sinks, return_lse, block_implementation
):
    named = block_implementation is None or isinstance(block_implementation, str)
    blocks = block_implementation if named else tuple(block_implementation)
    settings = Settings(axis_name, order, causal, window, softcap, scale, blocks)
    out, lse = ring(settings, q, k, v, segment_ids)
    if sinks is not None:  # a last key without a value
        with_sink = jnp.logaddexp(lse, sinks.astype(jnp.float32)[:, None])
        out = (out * jnp.exp(lse - with_sink).mT[..., None]).astype(q.dtype)
        lse = with_sink
    return (out, lse) if return_lse else out


def _reference(*args, block_implementation, **options):
    return reference.ring_attention(*args, **options)


IMPLEMENTATIONS = (Implementation("ring", _ring), Implementation("reference", _reference))


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    axis_name: str,
    order: Order = "zigzag",
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    return_lse: bool = False,
    implementation: dispatch.Wanted = None,
    block_implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Self-attention over a sequence split between the devices of a mesh axis (arXiv:2310.01889).

    To be called inside `jax.shard_map` (with check_vma=False where the pieces run in Pallas kernels); differentiable in
    q, k, v and sinks. A device holds its own queries, one part of the keys, and the one that it is being sent; never
    all of them.

    Args:
      q, k, v: this device's part of the sequence, T positions of it; N is a multiple of K.
      axis_name: the mesh axis over which the sequence is split.
      order: "zigzag", in which device i of P holds chunks i and 2 P - 1 - i of 2 P (see `zigzag`), gives every device
        the same work under a causal mask. "contiguous", in which device i holds part i, is better with a window: keys
        are sent no further than it reaches.
      causal, window, softcap, scale, sinks: as in `attention`, over the whole sequence.
      segment_ids: of this device's positions; a query sees only keys of its own segment.
      return_lse: also return the log of the softmax's denominator.
      implementation: "ring", or "reference", which gathers all keys on every device.
      block_implementation: of the `attention` of each piece: a name, or names in order of preference.

    Returns: out [B, T, N, H] in q's dtype; with return_lse (out, lse), lse [B, N, T] in float32.
    Raises: ValueError for shapes that do not fit, an unknown order, and a part of odd length in zig-zag order.
    """
    _check(q, k, v, order, window, segment_ids, sinks)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "axis_name": axis_name,
        "order": order,
        "causal": causal,
        "window": window,
        "segment_ids": segment_ids,
        "softcap": softcap,
        "scale": q.shape[3] ** -0.5 if scale is None else scale,
        "sinks": sinks,
        "return_lse": return_lse,
        "block_implementation": block_implementation,
    }
    return dispatch.call("ring_attention", IMPLEMENTATIONS, implementation, arguments)


def _check(q, k, v, order, window, segment_ids, sinks) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"ring_attention takes q [B,T,N,H] and k, v [B,T,K,H], not {q.shape}, {k.shape}, {v.shape}")
    batch, length, num_heads, head_dim = q.shape
    if k.shape[:2] != (batch, length) or k.shape[3] != head_dim:
        raise ValueError(f"q {q.shape} and k {k.shape} differ in batch, length or head_dim")
    if num_heads % k.shape[2]:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={k.shape[2]}")
    if order not in ("zigzag", "contiguous"):
        raise ValueError(f"order={order!r} is not known; use zigzag or contiguous")
    if order == "zigzag" and length % 2:
        raise ValueError(f"zig-zag order takes two chunks a device, but {length} positions are odd")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids {segment_ids.shape} is not {(batch, length)}, one for each position")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks {sinks.shape} is not ({num_heads},), one for each head")
