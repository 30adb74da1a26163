"""Ragged batches over pages, and their attention in numpy and float64, written from the formulas alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.api import KVPages


@dataclasses.dataclass
class Batch:
    """A case: what `paged_attention` takes, and each sequence's whole keys and values [length, K, H]."""

    q: np.ndarray
    k_new: np.ndarray
    v_new: np.ndarray
    data: np.ndarray
    scales: np.ndarray | None
    block_tables: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    num_sequences: int
    keys: list[np.ndarray]
    values: list[np.ndarray]

    def arrays(self, dtype=jnp.float32, pages=jnp.float32):
        """The arguments of the operation, the pool stored in `pages`."""
        data = jnp.asarray(self.data, jnp.float32).astype(pages)
        tokens = [jnp.asarray(x, jnp.float32).astype(dtype) for x in (self.q, self.k_new, self.v_new)]
        numbers = [jnp.asarray(x, jnp.int32) for x in (self.block_tables, self.lengths, self.starts)]
        scales = None if self.scales is None else jnp.asarray(self.scales, jnp.float32)
        return (*tokens, KVPages(data, scales), *numbers, jnp.int32(self.num_sequences))


def make(
    contexts, news, *, tokens, rows, heads, kv_heads, head_dim, page_size, columns, pool, seed=0, scales=None, top=None
) -> Batch:
    """Sequences with contexts[r] tokens in the pool and news[r] new ones; all other pages are nan, or the value `top`.

    With `scales` [K, 2, H] the pool is quantised: it holds whole numbers, and so do the keys in units of the scales.
    """
    rng = np.random.default_rng(seed)
    draw = (lambda *shape: rng.normal(size=shape)) if scales is None else (lambda *shape: rng.integers(-9, 10, shape))
    poison = np.nan if scales is None else top
    data = np.full((pool, kv_heads, 2, page_size, head_dim), poison, np.float64)
    free = list(rng.permutation(pool))
    tables = rng.integers(-5, 2 * pool, (rows, columns))  # nonsense where nothing may be read
    q = rng.normal(size=(tokens, heads, head_dim))
    new = rng.normal(size=(2, tokens, kv_heads, head_dim)) * 100
    lengths, starts = rng.integers(-50, 50, rows), rng.integers(-50, 50, rows + 1)
    starts[0] = 0
    unit = np.ones((2, 1, kv_heads, 1)) if scales is None else np.asarray(scales).swapaxes(0, 1)[:, None]
    keys, values = [], []
    for r, (context, count) in enumerate(zip(contexts, news, strict=True)):
        length = context + count
        lengths[r], starts[r + 1] = length, starts[r] + count
        both = draw(2, length, kv_heads, head_dim).astype(np.float64)
        new[:, starts[r] : starts[r + 1]] = (both * unit)[:, context:]
        for at in range(length):
            if at % page_size == 0:
                tables[r, at // page_size] = free.pop()
            if at < context:
                data[tables[r, at // page_size], :, :, at % page_size] = both[:, at].swapaxes(0, 1)
        keys.append((both * unit)[0])
        values.append((both * unit)[1])
    return Batch(q, *new, data, scales, tables, lengths, starts, len(contexts), keys, values)


def expected(batch: Batch, *, window=None, softcap=None, sinks=None, scale=None) -> tuple[np.ndarray, np.ndarray]:
    """(out, data of the pool afterwards), one query and head at a time."""
    out, data = np.zeros_like(batch.q), batch.data.copy()
    heads, kv_heads = batch.q.shape[1], batch.k_new.shape[1]
    page_size = data.shape[3]
    scale = batch.q.shape[2] ** -0.5 if scale is None else scale
    unit = np.ones((kv_heads, 2, 1)) if batch.scales is None else np.asarray(batch.scales)
    for r in range(batch.num_sequences):
        first = batch.lengths[r] - (batch.starts[r + 1] - batch.starts[r])
        for token in range(batch.starts[r], batch.starts[r + 1]):
            at = first + token - batch.starts[r]
            page = batch.block_tables[r, at // page_size]
            data[page, :, 0, at % page_size] = batch.keys[r][at] / unit[:, 0]
            data[page, :, 1, at % page_size] = batch.values[r][at] / unit[:, 1]
            begin = 0 if window is None else max(0, at - window + 1)
            for n in range(heads):
                k = n // (heads // kv_heads)
                scores = batch.keys[r][begin : at + 1, k] @ batch.q[token, n] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                scores = scores if sinks is None else np.append(scores, sinks[n])
                weights = np.exp(scores - scores.max())
                weights = (weights / weights.sum())[: at + 1 - begin]
                out[token, n] = weights @ batch.values[r][begin : at + 1, k]
    return out, data
