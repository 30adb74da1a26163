"""Paged attention on a TPU: one Mosaic kernel that writes the new keys and values and attends.

It has one grid step a core and walks the batch by itself. The unit of work is an item, up to `queries` tokens of one
sequence, against blocks of `pages` pages. While a block is computed, the copies of the next one run, across items
and sequences too. An item of one token (decoding) has a form of its own: its few rows are not padded to a prompt's,
all heads are in one straight piece of code, and its key and value enter the block on its way to the products, so that
only one tile of rows goes back to the pool. Sequences with more new tokens write whole pages before anything attends.

The pages stand heads first, so a head's keys and values are matrices as the MXU takes them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, dispatch
from pallas_kernels.paged_attention import tpu_attend, tpu_write
from pallas_kernels.paged_attention.reference import KVPages, merge, stored
from pallas_kernels.paged_attention.tpu_form import LANES, Blocks, Form, Refs, candidates, round_up, tile_rows

LN2 = 0.6931471805599453
INTERPRET: Any = True  # where there is no chip; or pltpu.InterpretParams


def refuse(chip: dispatch.Chip, arguments: dict[str, Any]) -> str | None:
    q, pages = arguments["q"], arguments["pages"]
    page_size, head_dim = pages.data.shape[3:]
    dtype = pages.data.dtype
    if q.dtype.name not in ("bfloat16", "float32"):
        return f"queries of {q.dtype.name} are not supported"
    if dtype.name not in ("bfloat16", "float32", "int8", "float8_e4m3fn", "float8_e5m2"):
        return f"pages of {dtype.name} are not supported"
    if page_size % tile_rows(dtype):
        return f"page_size={page_size} is not a multiple of {tile_rows(dtype)}, the rows of a tile of {dtype.name}"
    if head_dim % LANES:
        return f"head_dim={head_dim} is not a multiple of {LANES}"
    if chip.platform != "tpu":
        return None
    info = pltpu.get_tpu_info()
    if dtype.name.startswith("float8") and not info.is_matmul_supported(jnp.bfloat16, dtype):
        return f"{chip.kind} has no {dtype.name}"
    return None


def paged_attention(
    q, k_new, v_new, pages, block_tables, lengths, starts, num_sequences, *, prefix, window, softcap, sinks, scale
):
    """See `api.paged_attention`."""
    options = {"softcap": softcap, "scale": scale}
    new = stored(k_new, pages.data.dtype), stored(v_new, pages.data.dtype)
    table = (block_tables, lengths, starts, num_sequences)
    if prefix is None:
        out, _, pages = _call(q, new, pages, *table, sinks, causal=True, window=window, with_lse=False, **options)
        return out, pages
    out, lse, pages = _call(q, new, pages, *table, sinks, causal=True, window=None, with_lse=True, **options)
    used = jnp.where(num_sequences > 0, starts[jnp.maximum(num_sequences, 0)], 0)
    begin = jnp.stack([jnp.zeros_like(used), used])
    one = (prefix[0][None], prefix[1][None], begin, jnp.int32(1))
    shared = _call(q, None, pages, *one, None, causal=False, window=None, with_lse=True, **options)[:2]
    real = (jnp.arange(q.shape[0]) < used)[:, None]  # nobody wrote the log-sum-exp of padding
    out = merge(out, jnp.where(real, lse, 0), shared[0], jnp.where(real, shared[1], 0))
    return out, pages


def _cores() -> int:
    return 1 if dispatch.interpreted() else pltpu.get_tpu_info().num_cores


def _call(
    q, new, pages: KVPages, tables, lengths, starts, num_sequences, sinks, *, causal, window, with_lse, softcap, scale
) -> tuple[Array, Array, KVPages]:
    """(out, log-sum-exp [M, N] or empty, pages) of the kernel; new is None where nothing is to be written."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, _, page_size, _ = pages.data.shape
    parts = _cores() if num_kv_heads % _cores() == 0 else 1
    compute = jnp.promote_types(q.dtype, jnp.bfloat16 if pages.data.dtype.itemsize == 1 else pages.data.dtype)
    form = Form(
        num_tokens=num_tokens,
        columns=tables.shape[1],
        parts=parts,
        kv_heads=num_kv_heads // parts,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        causal=causal,
        writes=new is not None,
        window=window,
        softcap=softcap,
        scale=scale,
        with_sinks=sinks is not None,
        with_lse=with_lse,
        q_dtype=q.dtype.name,
        pool_dtype=pages.data.dtype.name,
        compute_dtype=compute.name,
    )
    capacity = 64 * 2**20 if dispatch.interpreted() else pltpu.get_tpu_info().vmem_capacity_bytes
    key = {"heads": form.heads, "kv_heads": form.kv_heads, "head_dim": head_dim, "page_size": page_size}
    key |= {"dtype": form.pool_dtype, "tokens_a_row": round_up(max(1, num_tokens // lengths.shape[0]), 64)}
    block = blocks.pick("paged_attention.forward", key, candidates(form, lengths.shape[0], capacity))
    return _run(form, block, capacity, q, new, pages, tables, lengths, starts, num_sequences, sinks)


def _run(form: Form, block: Blocks, capacity: int, q, new, pages, tables, lengths, starts, num_sequences, sinks):
    num_tokens, num_heads, head_dim = q.shape
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    scalars = [lengths, starts, tables.reshape(-1), num_sequences.reshape(1)]
    inputs = [q.reshape(num_tokens, form.parts, form.heads, head_dim), pages.data]
    specs = [in_hbm, in_hbm]
    if form.with_sinks:
        rows = sinks.astype(jnp.float32).reshape(form.parts, form.kv_heads, form.group, 1) / LN2
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, form.few_rows - form.group), (0, 0)))
        inputs.append(jnp.broadcast_to(rows, (*rows.shape[:3], LANES)))
        specs.append(pl.BlockSpec((1, *rows.shape[1:3], LANES), lambda part, *_: (part, 0, 0, 0)))
    if form.writes:
        inputs += tpu_write.prepared(form, block, new)
        specs += [in_hbm] * 3
    outputs = [jax.ShapeDtypeStruct(inputs[0].shape, q.dtype), jax.ShapeDtypeStruct(pages.data.shape, pages.data.dtype)]
    if form.with_lse:
        outputs.append(jax.ShapeDtypeStruct((*inputs[0].shape[:3], LANES), jnp.float32))
    out, data, *lse = pl.pallas_call(
        functools.partial(_kernel, form, block),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(form.parts,),
            in_specs=specs,
            out_specs=[in_hbm] * len(outputs),
            scratch_shapes=Refs.scratch(form, block),
        ),
        input_output_aliases={len(scalars) + 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) if form.parts > 1 else ("arbitrary",),
            vmem_limit_bytes=int(capacity * 0.9),
        ),
        interpret=dispatch.interpreted() and INTERPRET,
        name="paged_attention",
    )(*scalars, *inputs)
    sums = lse[0][..., 0].reshape(num_tokens, num_heads) if lse else jnp.zeros(0)
    return out.reshape(q.shape), sums, pages._replace(data=data)


def _kernel(form: Form, block: Blocks, *refs):
    at = Refs.of(form, refs)
    if form.writes:
        tpu_write.chunks(form, block, at)
    tpu_attend.walk(form, block, at)
    tpu_attend.zero_rest(form, block, at)
