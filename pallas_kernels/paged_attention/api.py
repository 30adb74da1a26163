"""`paged_attention` and `cascade_attention`: the public functions, their checks, and the choice of implementation."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.later import Later
from pallas_kernels.paged_attention import cpu, reference, xla
from pallas_kernels.paged_attention.reference import KVPages
from pallas_kernels.partition import Dims, Layout

tpu, gpu = Later("pallas_kernels.paged_attention.tpu"), Later("pallas_kernels.paged_attention.gpu")

IMPLEMENTATIONS = (
    Implementation("tpu", tpu.paged_attention, "tpu", tpu.refuse),
    Implementation("cpu", cpu.paged_attention, "cpu", cpu.refuse),
    Implementation("gpu", gpu.paged_attention, "gpu", gpu.refuse),
    Implementation("xla", xla.paged_attention),
    Implementation("reference", reference.paged_attention),
)
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")


def new_pages(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: Any, scales=None) -> KVPages:
    """An empty pool. scales [K, 2, H] are needed for a quantised dtype: largest |key|, |value| / dtype's largest.

    Raises: ValueError where scales are missing, or given for a dtype that has none.
    """
    data = jnp.zeros((num_pages, num_kv_heads, 2, page_size, head_dim), dtype)
    pages = KVPages(data, None if scales is None else jnp.asarray(scales, jnp.float32))
    _check_pages(pages)
    return pages


def paged_attention(
    q: Float[Array, "M N H"],
    k_new: Float[Array, "M K H"],
    v_new: Float[Array, "M K H"],
    pages: KVPages,
    block_tables: Int[Array, "R C"],
    lengths: Int[Array, "R"],
    starts: Int[Array, "R+1"],
    num_sequences: int | Int[Array, ""],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    scale: float | None = None,
    implementation: dispatch.Wanted = None,
) -> tuple[Float[Array, "M N H"], KVPages]:
    """Causal attention of the new tokens of many sequences over their pages (arXiv:2309.06180), in one ragged batch.

    The new tokens stand one after another, sequence by sequence: one a sequence that decodes, many of a prompt or a
    chunk of it. Their keys and values are written into the pages, then each token attends to its sequence so far. All
    shapes are fixed, so one program serves every batch of at most M tokens and R sequences. Donate the pages
    (`jax.jit(..., donate_argnames="pages")`) and they are updated in place. It is not differentiable.

    Args:
      q, k_new, v_new: of the new tokens; N is a multiple of K. Scores and softmax are computed in float32.
      pages: the pool, in floating point, the bits of bfloat16, int8 or float8 (with scales).
      block_tables: the pages of a sequence in order; entries past its length are never read and may hold anything.
        A page that gets new tokens belongs to one sequence only; full pages may be shared.
      lengths: of each sequence in tokens, the new ones included; at most C * page_size.
      starts: sequence r has the new tokens starts[r] to starts[r + 1] (none is allowed); starts[0] is 0.
      num_sequences: how many of the R rows are in use. Entries after them may hold anything.
      window: a token sees itself and at most the `window - 1` tokens before it. Pages wholly before it are not read.
      softcap: scores become softcap * tanh(scores / softcap) (arXiv:2408.00118).
      sinks: a score of each head that takes part in the softmax and has no value (arXiv:2309.17453).
      scale: of the scores; H ** -0.5 if None.
      implementation: "tpu", "cpu", "gpu", "xla" or "reference", or several in order of preference; None takes the best.

    Returns: out [M, N, H] in q's dtype, zeros for tokens past the last sequence, which write nothing; and the pages.
      In the last page of a sequence, rows after its end may have become zeros.
    Raises: ValueError for arguments that do not fit.
    """
    arguments = {
        "q": q,
        "k_new": k_new,
        "v_new": v_new,
        "pages": pages,
        "block_tables": block_tables,
        "lengths": lengths,
        "starts": starts,
        "num_sequences": _integer(num_sequences),
        "prefix": None,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "scale": scale,
    }
    _check(**arguments)
    return _run("paged_attention", implementation, arguments)


def cascade_attention(
    q: Float[Array, "M N H"],
    k_new: Float[Array, "M K H"],
    v_new: Float[Array, "M K H"],
    pages: KVPages,
    prefix_table: Int[Array, "D"],
    prefix_length: int | Int[Array, ""],
    block_tables: Int[Array, "R C"],
    lengths: Int[Array, "R"],
    starts: Int[Array, "R+1"],
    num_sequences: int | Int[Array, ""],
    *,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    scale: float | None = None,
    implementation: dispatch.Wanted = None,
) -> tuple[Float[Array, "M N H"], KVPages]:
    """`paged_attention` of sequences that begin with the same tokens, which are read once for all of them.

    The prefix is one dense block of all new tokens against its keys; the rest of each sequence is merged with it by
    log-sum-exp (arXiv:2501.01005). It is the same as `paged_attention` with the prefix's pages in front of each row of
    `block_tables` and `prefix_length` added to `lengths`.

    Args:
      prefix_table: the pages of the shared tokens in order; entries past their number may hold anything.
      prefix_length: how many tokens are shared; a multiple of the page size, because a page that is shared is full.
      block_tables, lengths: of each sequence's own tokens, the prefix left out.
      others: as for `paged_attention`.
    """
    arguments = {
        "q": q,
        "k_new": k_new,
        "v_new": v_new,
        "pages": pages,
        "block_tables": block_tables,
        "lengths": lengths,
        "starts": starts,
        "num_sequences": _integer(num_sequences),
        "prefix": (prefix_table, _integer(prefix_length)),
        "window": None,
        "softcap": softcap,
        "sinks": sinks,
        "scale": scale,
    }
    if prefix_table.ndim != 1 or not jnp.issubdtype(prefix_table.dtype, jnp.integer):
        raise ValueError(f"prefix_table takes integers [D], not {prefix_table.dtype} {prefix_table.shape}")
    _check(**arguments)
    if isinstance(prefix_length, int) and prefix_length % pages.data.shape[3]:
        raise ValueError(f"prefix_length={prefix_length} is not a multiple of page_size={pages.data.shape[3]}")
    return _run("cascade_attention", implementation, arguments)


def _run(op: str, implementation: dispatch.Wanted, arguments: dict[str, Any]):
    if arguments["scale"] is None:
        arguments["scale"] = arguments["q"].shape[2] ** -0.5
    scales = arguments["pages"].scales
    if scales is None:
        return dispatch.call(op, IMPLEMENTATIONS, implementation, arguments, _layout())
    # (q scale) . (k / scale) is q . k, so the implementations see whole numbers only.
    q, k_new, v_new = (arguments[name] for name in ("q", "k_new", "v_new"))
    of_keys, of_values = (jnp.repeat(scales[:, kv], q.shape[1] // k_new.shape[1], axis=0) for kv in range(2))
    arguments |= {
        "q": (q * of_keys).astype(q.dtype),
        "k_new": k_new / scales[:, 0],
        "v_new": v_new / scales[:, 1],
        "pages": KVPages(arguments["pages"].data),
    }
    out, pages = dispatch.call(op, IMPLEMENTATIONS, implementation, arguments, _layout())
    return (out * of_values).astype(q.dtype), pages._replace(scales=scales)


def _layout() -> Layout:
    """Heads may be split over a mesh, with their pages; the batch is one."""
    tokens = Dims((None, "heads", None))
    make: Any = KVPages  # here of names, not of arrays
    pool = make(Dims((None, "heads", None, None, None)))
    whole = {"block_tables": 2, "lengths": 1, "starts": 1, "num_sequences": 0}
    inputs = {"q": tokens, "k_new": tokens, "v_new": tokens, "pages": pool, "sinks": Dims(("heads",))}
    inputs |= {name: Dims((None,) * rank) for name, rank in whole.items()}
    return Layout(inputs | {"prefix": (Dims((None,)), Dims(()))}, (tokens, pool))


def _integer(x):
    return jnp.asarray(x, jnp.int32) if isinstance(x, int) else x


def _check_pages(pages: KVPages) -> None:
    if pages.data.ndim != 5 or pages.data.shape[2] != 2:
        raise ValueError(f"pages.data takes [P, K, 2, page_size, H], not {pages.data.shape}")
    quantised = pages.data.dtype.name in QUANTISED
    if quantised and pages.scales is None:
        raise ValueError(f"pages of {pages.data.dtype.name} need scales")
    if not quantised and pages.scales is not None:
        raise ValueError(f"pages of {pages.data.dtype.name} take no scales")
    if not quantised and pages.data.dtype != jnp.uint16 and not jnp.issubdtype(pages.data.dtype, jnp.floating):
        raise ValueError(f"pages of {pages.data.dtype.name} are not supported; use a float, {', '.join(QUANTISED)}")
    takes = pages.data.shape[1], 2, pages.data.shape[4]
    if pages.scales is not None and pages.scales.shape != takes:
        raise ValueError(f"pages.scales takes [K, 2, H] = {takes}, not {pages.scales.shape}")


def _check(
    q, k_new, v_new, pages, block_tables, lengths, starts, num_sequences, *, prefix, window, softcap, sinks, scale
):
    del prefix, scale
    if q.ndim != 3 or k_new.ndim != 3 or k_new.shape != v_new.shape:
        shapes = f"{q.shape}, {k_new.shape}, {v_new.shape}"
        raise ValueError(f"paged_attention takes q [M,N,H] and k_new, v_new [M,K,H], not {shapes}")
    if q.shape[0] != k_new.shape[0] or q.shape[2] != k_new.shape[2]:
        raise ValueError(f"q {q.shape} and k_new {k_new.shape} differ in tokens or head_dim")
    if q.shape[1] % k_new.shape[1]:
        raise ValueError(f"num_heads={q.shape[1]} is not a multiple of num_kv_heads={k_new.shape[1]}")
    _check_pages(pages)
    if (pages.data.shape[1], pages.data.shape[4]) != k_new.shape[1:]:
        raise ValueError(f"pages.data {pages.data.shape} and k_new {k_new.shape} differ in num_kv_heads or head_dim")
    ranks = (("block_tables", block_tables, 2), ("lengths", lengths, 1), ("starts", starts, 1))
    for name, array, rank in (*ranks, ("num_sequences", num_sequences, 0)):
        if array.ndim != rank or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} takes integers of {rank} dimensions, not {array.dtype} {array.shape}")
    rows = block_tables.shape[0]
    if lengths.shape[0] != rows or starts.shape[0] != rows + 1:
        raise ValueError(
            f"block_tables of {rows} rows needs lengths [{rows}] and starts [{rows + 1}], "
            f"not {lengths.shape} and {starts.shape}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks takes one score a head, [{q.shape[1]}], not {sinks.shape}")
