"""`attention`: the public function, its checks, and the choice of implementation."""

from typing import Literal, overload

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import cpu, reference, xla
from pallas_kernels.dispatch import Implementation
from pallas_kernels.later import Later
from pallas_kernels.partition import Dims, Layout

tpu, gpu = Later("pallas_kernels.attention.tpu"), Later("pallas_kernels.attention.gpu")

# In order of preference: the kernels of a platform come before what runs everywhere.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("tpu", tpu.attention, "tpu", tpu.refuse),
    Implementation("gpu", gpu.attention, "gpu", gpu.refuse),
    Implementation("cpu", cpu.attention, "cpu", cpu.refuse),
    Implementation("xla", xla.attention),
    Implementation("reference", reference.attention),
)


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = ...,
    window: int | None = ...,
    q_offset: int | Array = ...,
    q_segment_ids: Array | None = ...,
    kv_segment_ids: Array | None = ...,
    softcap: float | None = ...,
    scale: float | None = ...,
    sinks: Array | None = ...,
    alibi_slopes: Array | None = ...,
    bias: Array | None = ...,
    return_lse: Literal[False] = ...,
    implementation: dispatch.Wanted = ...,
) -> Array: ...


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = ...,
    window: int | None = ...,
    q_offset: int | Array = ...,
    q_segment_ids: Array | None = ...,
    kv_segment_ids: Array | None = ...,
    softcap: float | None = ...,
    scale: float | None = ...,
    sinks: Array | None = ...,
    alibi_slopes: Array | None = ...,
    bias: Array | None = ...,
    return_lse: Literal[True],
    implementation: dispatch.Wanted = ...,
) -> tuple[Array, Array]: ...


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = True,
    window: int | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    return_lse: bool = False,
    implementation: dispatch.Wanted = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Grouped-query attention (arXiv:2305.13245), differentiable in q, k, v, sinks and bias.

    The score of query t and key s is softcap(scale q·k) + slope (s - t) + bias, with what is not given left out.

    Args:
      q, k, v: queries and keys/values; N is a multiple of K. Scores and softmax are computed in float32.
      causal: a query sees no key after it.
      window: a query sees itself and at most the `window - 1` keys before it.
      q_offset: index of the first query among the keys, one for all or one a sequence. A Python int lets blocks
        that the mask empties be left out of the program.
      q_segment_ids, kv_segment_ids: a query sees only keys of its own segment.
      softcap: scores become softcap * tanh(scores / softcap) (arXiv:2408.00118).
      scale: of the scores; H ** -0.5 if None.
      sinks: a further score of every query of a head, which takes its share of the softmax and has no value
        (as in GPT-OSS; arXiv:2309.17453).
      alibi_slopes: of each head, times how far the key stands before the query (ALiBi, arXiv:2108.12409). These are
        constants: no gradient flows to them.
      bias: added to the scores; its gradient is summed over the dimensions it is broadcast in. -inf hides a key.
      return_lse: also return the log of the softmax's denominator, the sink's share in it, with a gradient of its own.
      implementation: its name, or names in order of preference; None takes the best for the platform.

    Returns: out [B, T, N, H] in q's dtype, zeros for a query that sees no key; with return_lse (out, lse), lse [B, N, T]
      in float32, `reference.NEG_INF` (-1e30) for a query that has neither a key nor a sink.
    Raises: ValueError for shapes that do not fit, and where no implementation that is wanted takes the call.
    """
    _check(q, k, v, window, q_segment_ids, kv_segment_ids, sinks, alibi_slopes, bias)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "causal": causal,
        "window": window,
        "q_offset": q_offset,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "softcap": softcap,
        "scale": q.shape[3] ** -0.5 if scale is None else scale,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "bias": bias,
        "return_lse": return_lse,
    }
    return dispatch.call("attention", IMPLEMENTATIONS, implementation, arguments, _layout(q_offset, bias, return_lse))


def _layout(q_offset, bias, return_lse) -> Layout:
    """Sequences and heads may be split over a mesh, positions may not (`ring_attention` is for that)."""
    of_queries, of_keys = Dims(("batch", None, "heads", None)), Dims(("batch", None, "heads", None))
    shape = () if bias is None else bias.shape
    split = ((None if size == 1 else name) for name, size in zip(("batch", "heads"), shape, strict=False))
    inputs = {
        "q": of_queries,
        "k": of_keys,
        "v": of_keys,
        "q_offset": Dims(("batch",) * getattr(q_offset, "ndim", 0)),
        "q_segment_ids": Dims(("batch", None)),
        "kv_segment_ids": Dims(("batch", None)),
        "sinks": Dims(("heads",)),
        "alibi_slopes": Dims(("heads",)),
        "bias": Dims((*split, None, None)),
    }
    return Layout(inputs, (of_queries, Dims(("batch", "heads", None))) if return_lse else of_queries)


def _check(q, k, v, window, q_segment_ids, kv_segment_ids, sinks, alibi_slopes, bias) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention takes q [B,T,N,H] and k, v [B,S,K,H], not {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} differ in batch or head_dim")
    batch, num_queries, num_heads, _ = q.shape
    if num_heads % k.shape[2]:
        raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={k.shape[2]}")
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("give both q_segment_ids and kv_segment_ids, or neither")
    for name, ids, length in ("q", q_segment_ids, num_queries), ("kv", kv_segment_ids, k.shape[1]):
        if ids is not None and ids.shape != (batch, length):
            raise ValueError(f"{name}_segment_ids {ids.shape} is not {(batch, length)}, one for each position")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    for name, of_heads in ("sinks", sinks), ("alibi_slopes", alibi_slopes):
        if of_heads is not None and of_heads.shape != (num_heads,):
            raise ValueError(f"{name} {of_heads.shape} is not ({num_heads},), one for each head")
    if bias is not None:
        whole = (batch, num_heads, num_queries, k.shape[1])
        fits = bias.ndim == 4 and bias.shape[2:] == whole[2:]
        if not fits or bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, num_heads):
            raise ValueError(f"bias {bias.shape} is not {whole}, of which the first two may be 1")
