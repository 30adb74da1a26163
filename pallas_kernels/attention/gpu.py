"""Attention on Hopper GPUs: what the kernels of `gpu_forward` and `gpu_backward` take, and the call of them."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import dispatch, hopper
from pallas_kernels.dispatch import Arguments, Chip

HEAD_DIMS = (64, 128, 256)


def refuse(chip: Chip, arguments: Arguments) -> str | None:
    """Why the kernels do not take a call, or None."""
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype} differ in dtype"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim={q.shape[3]} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if 0 in (*q.shape, *k.shape):
        return f"q {q.shape} or k {k.shape} is empty"
    if not isinstance(arguments["q_offset"], int):
        return "takes a q_offset that is a Python int, not an array"
    if arguments["bias"] is not None:
        return "takes no bias"
    return hopper.refuse(chip)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    window: int | None,
    q_offset: int,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
    softcap: float | None,
    scale: float,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    bias: None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `api.attention`; differentiable in q, k, v and sinks. `refuse` says which calls it does not take.

    Lengths that are not multiples of 8 cost a copy of q, k and v.
    """
    from pallas_kernels.attention.gpu_forward import run
    from pallas_kernels.attention.gpu_tiles import PADDING, ROWS, Options, padded

    options = Options(
        causal=causal,
        window=window,
        offset=q_offset,
        softcap=softcap,
        scale=float(scale),
        num_queries=q.shape[1],
        num_keys=k.shape[1],
        segments=q_segment_ids is not None,
        alibi=alibi_slopes is not None,
        interpret=dispatch.interpreted(),
    )
    ids = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        ids = q_segment_ids.astype(jnp.int32), kv_segment_ids.astype(jnp.int32)
    slopes = None if alibi_slopes is None else lax.stop_gradient(alibi_slopes.astype(jnp.float32))
    size = ROWS if options.interpret else PADDING  # the interpreter's copies do not end with the array
    q, k, v = (padded(x, size) for x in (q, k, v))
    out, lse = run(options, q, k, v, None if sinks is None else sinks.astype(jnp.float32), slopes, ids)
    out, lse = out[:, : options.num_queries], lse[:, :, : options.num_queries]
    return (out, lse) if return_lse else out
