"""Paged attention on Hopper GPUs: new keys and values are written by XLA, then one kernel reads every key once.

`gpu_plan` cuts the keys of all sequences into equal shares, `gpu_attend` computes them, and here the parts of each
token are merged by their log-sum-exp.
"""

import functools

import jax.numpy as jnp
from jax import Array

from pallas_kernels import blocks, dispatch, hopper
from pallas_kernels.attention import gpu
from pallas_kernels.dispatch import Arguments, Chip
from pallas_kernels.paged_attention import gpu_plan
from pallas_kernels.paged_attention.gpu_plan import Form
from pallas_kernels.paged_attention.reference import NEG_INF, KVPages, Located, locate, merge, stored, values

PAGE_SIZES = (16, 32, 64, 128, 256)
INTERPRETED_PROGRAMS = 2  # each is compiled on its own, and the cut between two goes through an item


def refuse(chip: Chip, arguments: Arguments) -> str | None:
    """Why the kernel does not take a call, or None."""
    q, pages, tables = arguments["q"], arguments["pages"].data, arguments["block_tables"]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes queries of bfloat16 and float16, not {q.dtype}"
    if pages.dtype.itemsize == 1:
        return f"takes no quantised pages ({pages.dtype}): wgmma reads keys from shared memory as they are"
    if pages.dtype != q.dtype and not (pages.dtype == jnp.uint16 and q.dtype == jnp.bfloat16):
        return f"pages of {pages.dtype} and queries of {q.dtype} differ"
    if q.shape[2] not in gpu.HEAD_DIMS:
        return f"head_dim={q.shape[2]} is not one of {', '.join(map(str, gpu.HEAD_DIMS))}"
    if pages.shape[3] not in PAGE_SIZES:
        return f"page_size={pages.shape[3]} is not one of {', '.join(map(str, PAGE_SIZES))}"
    if q.shape[1] // pages.shape[1] > gpu_plan.MAX_ROWS:
        return f"takes up to {gpu_plan.MAX_ROWS} query heads a kv head, not {q.shape[1] // pages.shape[1]}"
    if 0 in (*q.shape, *pages.shape, *tables.shape):
        return f"q {q.shape}, pages {pages.shape} or block_tables {tables.shape} is empty"
    return hopper.refuse(chip)


def paged_attention(
    q, k_new, v_new, pages, block_tables, lengths, starts, num_sequences, *, prefix, window, softcap, sinks, scale
):
    """See `api.paged_attention`."""
    at = locate(q.shape[0], lengths, starts, num_sequences)
    pages = _write(k_new, v_new, pages, block_tables, at)
    options = {"softcap": softcap, "scale": scale}
    numbers = (lengths, starts, num_sequences)
    out, lse = _attend(q, pages, block_tables, *numbers, at, sinks, causal=True, window=window, **options)
    if prefix is not None:
        used = jnp.sum(at.real, dtype=jnp.int32)
        numbers = (prefix[1][None], jnp.stack([jnp.zeros_like(used), used]), jnp.int32(1))
        all_tokens = locate(q.shape[0], *numbers)
        shared = _attend(q, pages, prefix[0][None], *numbers, all_tokens, None, causal=False, window=None, **options)
        out = merge(out, lse, *shared)
    return out.astype(q.dtype), pages


def _attend(
    q, pages: KVPages, tables, lengths, starts, num_sequences, at: Located, sinks, *, causal, window, softcap, scale
) -> tuple[Array, Array]:
    """(out [M, N, H], log-sum-exp [M, N]) in float32; zeros for tokens of no sequence."""
    from pallas_kernels.attention.gpu_tiles import Options
    from pallas_kernels.paged_attention.gpu_attend import PROGRAMS, attend, candidates

    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, _, page_size, _ = pages.data.shape
    group = num_heads // num_kv_heads
    key = {"heads": num_heads, "kv_heads": num_kv_heads, "head_dim": head_dim, "page_size": page_size}
    interpret = dispatch.interpreted()
    programs = INTERPRETED_PROGRAMS if interpret else PROGRAMS
    size = blocks.pick("paged_attention.forward", key, candidates(head_dim, programs))
    rows, tokens = gpu_plan.item_shape(num_tokens, lengths.shape[0], group)
    form = Form(
        num_items=gpu_plan.most_items(num_tokens, lengths.shape[0], tokens),
        rows=rows,
        tokens=tokens,
        group=group,
        kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        keys=size.keys,
        programs=size.programs,
        causal=causal,
        window=window,
    )
    options = Options(
        causal=False,  # masks are the kernel's own: here each item has its place
        window=None,
        offset=0,
        softcap=softcap,
        scale=float(scale),
        num_queries=rows,
        num_keys=size.keys,
        segments=False,
        alibi=False,
        interpret=interpret,
    )
    made = gpu_plan.plan(form, lengths, starts, num_sequences)
    found = attend(form, size, options, made, tables, _pairs_of(form, made, q), values(pages.data))
    return _merged(form, made, at, starts, sinks, *found)


def _write(k_new, v_new, pages: KVPages, tables, at: Located) -> KVPages:
    """As `reference.write`, keys and values in one scatter: on a GPU each is a kernel."""
    num_pages, _, _, page_size, _ = pages.data.shape
    page = jnp.where(at.real, tables[at.sequence, at.position // page_size], num_pages)  # past the end: dropped
    new = jnp.stack([stored(x, pages.data.dtype) for x in (k_new, v_new)], axis=2)
    return pages._replace(data=pages.data.at[page, :, :, at.position % page_size].set(new, mode="drop"))


def _pairs_of(form: Form, made: gpu_plan.Plan, q: Array) -> Array:
    """Queries of each (item, kv head) pair [I * K, rows, H]: those of the first token, of the second, ..."""
    token = jnp.minimum(made.token[:, None] + jnp.arange(form.tokens), q.shape[0] - 1)
    of_items = q[jnp.maximum(token, 0)].reshape(form.num_items, form.tokens, form.kv_heads, form.group, form.head_dim)
    pairs = of_items.transpose(0, 2, 1, 3, 4).reshape(form.num_items * form.kv_heads, -1, form.head_dim)
    return jnp.pad(pairs, ((0, 0), (0, form.rows - pairs.shape[1]), (0, 0)))


def _merged(form: Form, made: gpu_plan.Plan, at: Located, starts, sinks, out, lse) -> tuple[Array, Array]:
    """What `_attend` returns, of the parts of each unit: out [units, 2, rows, H], lse [units, 2, rows]."""
    num_tokens = at.real.shape[0]
    of = gpu_plan.parts(form, made)
    inside = jnp.where(at.real, jnp.arange(num_tokens) - starts[at.sequence], 0)
    item = jnp.where(at.real, made.first_item[at.sequence] + inside // form.tokens, 0)
    row = (inside % form.tokens)[:, None] * form.group + jnp.arange(form.group)  # [M, G]
    shape = (num_tokens, form.kv_heads, form.group)
    first, count = (x[item][:, :, None] for x in of)  # [M, K, 1]
    # Written out, so that XLA adds all parts up in one kernel and stores none of them.
    found = []
    for part in range(form.most_parts):
        live = at.real[:, None, None] & (part < count)
        unit = jnp.broadcast_to(jnp.where(live, first + part, 0), shape)
        for half in range(2):
            place = unit, half, jnp.broadcast_to(row[:, None], shape)
            found.append((place, jnp.where(live, lse[place], NEG_INF)))
    top = functools.reduce(jnp.maximum, [weight for _, weight in found])
    total = jnp.zeros_like(top)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(form.kv_heads, form.group)
        top = jnp.maximum(top, sink)
        total = jnp.where(at.real[:, None, None], jnp.exp(sink - top), 0)
    merged = jnp.zeros((*shape, form.head_dim), jnp.float32)
    for place, weight in found:
        weight = jnp.where(weight > NEG_INF / 2, jnp.exp(weight - top), 0)
        total += weight
        merged += jnp.where(weight[..., None] > 0, out[place].astype(jnp.float32), 0) * weight[..., None]
    one = jnp.where(total == 0, 1, total)
    merged /= one[..., None]
    lse = jnp.where(total == 0, NEG_INF, top + jnp.log(one))
    return merged.reshape(num_tokens, -1, form.head_dim), lse.reshape(num_tokens, -1)
