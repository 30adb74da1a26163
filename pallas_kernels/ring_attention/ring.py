"""Ring attention (arXiv:2310.01889): keys and values go round the devices, partial results meet by log-sum-exp.

Each device keeps its queries. In the forward pass the keys at hand give a partial output and log-sum-exp, merged into
what there is. The backward pass knows the log-sum-exp of the whole row, so each piece gives its exact gradients: those
of the queries stay, those of the keys and values travel with them and come home. No device ever holds all keys.

The next keys and the gradients of the step before are sent while a step computes: it needs neither.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import dispatch
from pallas_kernels.attention import cpu, xla
from pallas_kernels.attention.api import attention
from pallas_kernels.attention.reference import NEG_INF
from pallas_kernels.later import Later
from pallas_kernels.ring_attention.order import Order
from pallas_kernels.ring_attention.plan import Piece, Plan

# backward(q, k, v, d_out, lse, delta, **options) -> (dq, dk, dv) of a block, by the name of attention's implementation.
# One that is not here runs its block forward once more, for its own log-sum-exp.
BACKWARDS: dict[str, Callable[..., tuple[Array, Array, Array]]] = {
    "cpu": cpu.backward,
    "xla": xla.backward,
    "tpu": Later("pallas_kernels.attention.tpu").backward,
}


class Settings(NamedTuple):
    axis_name: str
    order: Order
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    implementation: str | tuple[str, ...] | None


class Keys(NamedTuple):
    """What goes round."""

    k: Array  # [B, T, K, H]
    v: Array
    ids: Array | None  # [B, T]

    def part(self, keys: slice) -> "Keys":
        return jax.tree.map(lambda x: x[:, keys], self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(settings: Settings, q: Array, k: Array, v: Array, ids: Array | None) -> tuple[Array, Array]:
    """out [B, T, N, H] in q's dtype and lse [B, N, T] in float32, of this device's queries."""
    return _forward(settings, q, k, v, ids)[0]


def _forward(settings, q, k, v, ids):
    def update(piece, keys, gradients, state):
        return gradients, _attend(settings, piece, q, ids, keys, state)

    batch, length, num_heads, _ = q.shape
    zero = _zero(settings, q, k, v)
    nothing = jnp.broadcast_to(zero, q.shape), jnp.broadcast_to(zero + NEG_INF, (batch, num_heads, length))
    _, (out, lse) = _go_round(settings, update, Keys(k, v, ids), (), nothing)
    out = out.astype(q.dtype)
    return (out, lse), (q, k, v, ids, out, lse)


def _backward(settings, residuals, cotangents):
    q, k, v, ids, out, lse = residuals
    d_out, d_lse = cotangents
    delta = jnp.einsum("btnh,btnh->bnt", d_out, out, preferred_element_type=jnp.float32) - d_lse

    def update(piece, keys, gradients, state):
        return _differentiate(settings, piece, (q, ids, d_out, lse, delta), keys, gradients, state)

    zero = _zero(settings, q, k, v, d_out, d_lse)
    dk, dv, dq = (jnp.broadcast_to(zero, x.shape) for x in (k, v, q))
    (dk, dv), dq = _go_round(settings, update, Keys(k, v, ids), (dk, dv), dq)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring.defvjp(_forward, _backward)


def _go_round(settings: Settings, update, keys: Keys, zeros, state) -> tuple[Any, Any]:
    """The gradients of this device's keys and the state of its queries, after the keys have been everywhere.

    update(piece, keys, gradients, state) -> (gradients, state), both with the piece added; zeros: no gradients yet.
    """
    plan = Plan(settings.order, lax.axis_size(settings.axis_name), keys.k.shape[1], settings.causal, settings.window)
    device, last = lax.axis_index(settings.axis_name), plan.num_steps - 1
    send = functools.partial(_send, settings.axis_name, plan.parts)

    def compute(step, keys, state):
        gradients = zeros
        for piece in plan.pieces(device, step):
            found = functools.partial(update, piece, keys)
            if piece.when is True:
                gradients, state = found(gradients, state)
            else:
                gradients, state = lax.cond(piece.when, found, lambda *same: same, gradients, state)
        return gradients, state

    def go_on(step, keys, gradients, state):
        arriving = send(gradients, 1)
        found, state = compute(step, keys, state)
        return jax.tree.map(jnp.add, arriving, found), state

    def body(step, carried):
        keys, gradients, state = carried
        following = send(keys, 1)
        return following, *go_on(step, keys, gradients, state)

    gradients, state = compute(0, keys, state)
    if last == 0:
        return gradients, state
    carried = send(keys, 1), gradients, state
    if plan.all_steps_alike:
        carried = lax.fori_loop(1, last, body, carried)
    else:
        for step in range(1, last):
            carried = body(step, carried)
    gradients, state = go_on(last, *carried)
    return send(gradients, -last), state


def _send(axis_name: str, parts: int, tree, distance: int):
    """Everything in `tree` to the device so many places on."""
    places = [(device, (device + distance) % parts) for device in range(parts)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, places), tree)


def _zero(settings: Settings, *arrays: Array) -> Array:
    """A zero that jax takes to differ between the devices as the arrays do, and along the ring.

    `jax.shard_map` keeps count of what differs where; a plain constant is the same everywhere, so no step of a loop
    could write over it. XLA leaves none of this arithmetic.
    """
    of_arrays = (jnp.where(x.reshape(-1)[0] == 0, 0.0, 0.0) for x in arrays)
    return sum(of_arrays, jnp.where(lax.axis_index(settings.axis_name) == 0, 0.0, 0.0)).astype(jnp.float32)


def _options(settings: Settings, piece: Piece, q_ids: Array | None, keys: Keys) -> dict[str, Any]:
    return {
        "causal": piece.causal,
        "window": piece.window,
        "q_offset": piece.offset,
        "q_segment_ids": q_ids,
        "kv_segment_ids": keys.ids,
        "softcap": settings.softcap,
        "scale": settings.scale,
    }


def _attend(settings: Settings, piece: Piece, q, ids, keys: Keys, state):
    """(out, lse) with a piece merged into the rows of its queries: the average weighted by exp(lse)."""
    rows, keys = piece.queries, keys.part(piece.keys)
    options = _options(settings, piece, None if ids is None else ids[:, rows], keys)
    part, part_lse = attention(
        q[:, rows], keys.k, keys.v, return_lse=True, implementation=settings.implementation, **options
    )
    out, lse = state
    merged = jnp.logaddexp(lse[:, :, rows], part_lse)
    before, now = (jnp.exp(x - merged).mT[..., None] for x in (lse[:, :, rows], part_lse))
    out = out.at[:, rows].set(before * out[:, rows] + now * part.astype(jnp.float32))
    return out, lse.at[:, :, rows].set(merged)


def _differentiate(settings: Settings, piece: Piece, of_queries, keys: Keys, gradients, dq):
    """((dk, dv), dq) with those of a piece added."""
    q, ids, d_out, lse, delta = of_queries
    rows, keys = piece.queries, keys.part(piece.keys)
    q, d_out, lse, delta = q[:, rows], d_out[:, rows], lse[:, :, rows], delta[:, :, rows]
    options = _options(settings, piece, None if ids is None else ids[:, rows], keys)
    name = dispatch.explain(attention, q, keys.k, keys.v, implementation=settings.implementation, **options).name
    run = BACKWARDS.get(name, functools.partial(_by_recomputing, name))
    d_rows, *d_keys = run(q, keys.k, keys.v, d_out, lse, delta, **options)
    dk, dv = (total.at[:, piece.keys].add(part) for total, part in zip(gradients, d_keys, strict=True))
    return (dk, dv), dq.at[:, rows].add(d_rows)


def _by_recomputing(name: str, q, k, v, d_out, lse, delta, **options):
    """The gradients of a piece from its own output and log-sum-exp, which weigh exp(own - whole) in the whole."""
    call = functools.partial(attention, return_lse=True, implementation=name, **options)
    (out, own_lse), pull = jax.vjp(call, q, k, v)
    weight = jnp.exp(own_lse - lse)
    of_out = jnp.einsum("btnh,btnh->bnt", d_out, out, preferred_element_type=jnp.float32)
    return pull(((d_out * weight.mT[..., None]).astype(out.dtype), weight * (of_out - delta)))
