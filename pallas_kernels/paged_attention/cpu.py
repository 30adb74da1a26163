"""Paged attention on the host's processor (`native/paged_attention.cc`)."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import refuse_natively
from pallas_kernels.dispatch import Arguments, Chip
from pallas_kernels.paged_attention.reference import with_prefix

LANES = 16  # numbers of a vector
POOLS = ("uint16", "bfloat16", "float32", "int8")


def paged_attention(
    q, k_new, v_new, pages, block_tables, lengths, starts, num_sequences, *, prefix, window, softcap, sinks, scale
):
    """See `api.paged_attention`."""
    if prefix is not None:
        block_tables, lengths = with_prefix(pages, block_tables, lengths, *prefix)
    integers = (block_tables, lengths, starts, jnp.asarray(num_sequences).reshape(1))
    sinks = jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    call = jax.ffi.ffi_call(
        "pallas_kernels.paged_attention",
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(pages.data.shape, pages.data.dtype)),
        input_output_aliases={3: 1},
        vmap_method="sequential",
    )
    new = (x.astype(q.dtype) for x in (k_new, v_new))
    out, data = call(
        q,
        *new,
        pages.data,
        *(x.astype(jnp.int32) for x in integers),
        sinks,
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0),
        window=np.int64(window or 0),
    )
    return out, pages._replace(data=data)


def refuse(chip: Chip, arguments: Arguments) -> str | None:
    q, pages = arguments["q"], arguments["pages"]
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {q.dtype}"
    if pages.data.dtype.name not in POOLS:
        return f"takes pages of {', '.join(POOLS)}, not {pages.data.dtype.name}"
    if q.shape[2] % LANES:
        return f"takes head dims in steps of {LANES}, not {q.shape[2]}"
    return refuse_natively(arguments)
