"""Attention and its gradients in numpy and float64, written from the formulas and from nothing in the packages."""

from typing import NamedTuple

import numpy as np


def sees(num_queries, num_keys, *, causal, window, offset, q_ids=None, kv_ids=None) -> np.ndarray:
    """Which key each query sees, [B, T, S], by asking one pair at a time. offset: of each sequence."""
    seen = np.zeros((len(offset), num_queries, num_keys), bool)
    for b, t, s in np.ndindex(seen.shape):
        at = t + offset[b]
        seen[b, t, s] = not (
            (causal and s > at)
            or (window is not None and at - s >= window)
            or (q_ids is not None and q_ids[b, t] != kv_ids[b, s])
        )
    return seen


class Result(NamedTuple):
    out: np.ndarray  # [B, T, N, H]
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    lse: np.ndarray  # [B, N, T]
    d_sinks: np.ndarray  # [N]
    d_bias: np.ndarray  # [B, N, T, S], not summed over what the bias was broadcast in


def attention(q, k, v, d_out, seen, *, scale, softcap=None):
    """(out, dq, dk, dv) for q, d_out [B, T, N, H], k, v [B, S, K, H] and seen [B, T, S]; d_out is out's cotangent."""
    return everything(q, k, v, d_out, seen, scale=scale, softcap=softcap)[:4]


def everything(
    q, k, v, d_out, seen, *, scale, softcap=None, sinks=None, slopes=None, offset=None, bias=None, d_lse=None
) -> Result:
    """As `attention`. sinks, slopes: [N]; offset: of each sequence, for slopes; bias: [B or 1, N or 1, T, S]."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    batch, queries, heads, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    sinks = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    slopes = np.zeros(heads) if slopes is None else np.asarray(slopes, np.float64)
    offset = np.zeros(batch, int) if offset is None else offset
    bias = np.zeros((1, 1, queries, keys)) if bias is None else np.asarray(bias, np.float64)
    bias = np.broadcast_to(bias, (batch, heads, queries, keys))
    d_lse = np.zeros((batch, heads, queries)) if d_lse is None else np.asarray(d_lse, np.float64)
    found = Result(
        np.zeros_like(q),
        np.zeros_like(q),
        np.zeros_like(k),
        np.zeros_like(v),
        np.zeros((batch, heads, queries)),
        np.zeros(heads),
        np.zeros((batch, heads, queries, keys)),
    )
    for b, n, t in np.ndindex(batch, heads, queries):
        keys_, values = k[b, :, n // group], v[b, :, n // group]
        scores, slope = keys_ @ q[b, t, n] * scale, 1.0
        if softcap is not None:
            squashed = np.tanh(scores / softcap)
            scores, slope = softcap * squashed, 1 - squashed**2
        scores = scores + slopes[n] * (np.arange(keys) - t - offset[b]) + bias[b, n, t]
        scores = np.where(seen[b, t], scores, -np.inf)
        top = max(scores.max(), sinks[n])
        if top == -np.inf:
            found.lse[b, n, t] = -1e30
            continue
        p, p_sink = np.exp(scores - top), np.exp(sinks[n] - top)
        total = p.sum() + p_sink
        p, p_sink = p / total, p_sink / total
        out, dp = p @ values, values @ d_out[b, t, n]
        change = d_out[b, t, n] @ out - d_lse[b, n, t]
        ds = p * (dp - change)
        found.out[b, t, n], found.lse[b, n, t] = out, top + np.log(total)
        found.d_bias[b, n, t] = ds
        found.d_sinks[n] -= p_sink * change
        found.dq[b, t, n] = ds * slope * scale @ keys_
        found.dk[b, :, n // group] += np.outer(ds * slope * scale, q[b, t, n])
        found.dv[b, :, n // group] += np.outer(p, d_out[b, t, n])
    return found
