"""Mixture of experts against a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmos_jax.models.moe import Moe, balance_sums, load_balance_loss, route
from tests import tiny

X = jax.random.normal(jax.random.key(0), (2, 5, 16))


def make(**changes) -> tuple[Moe, dict[str, np.ndarray]]:
    moe = Moe(tiny.model(tiny.MOE, **changes), nnx.Rngs(params=0))
    rng, values = np.random.default_rng(1), {}
    for name in ("router", "gate", "up", "down"):
        variable = getattr(moe, name)
        values[name] = rng.standard_normal(variable.get_value().shape).astype(np.float32)
        variable.set_value(jnp.asarray(values[name]))
    return moe, {name: value.astype(np.float64) for name, value in values.items()}


def naive(w: dict[str, np.ndarray], x, k: int, norm_topk: bool):
    """One token at a time: softmax over experts, the k largest, their gated mlps, added up by weight."""
    x = np.asarray(x, np.float64)
    out, chosen = np.zeros(x.shape), np.zeros((*x.shape[:2], k), int)
    for b, t in np.ndindex(x.shape[:2]):
        token = x[b, t]
        logits = token @ w["router"]
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen[b, t] = np.argsort(-p)[:k]
        total = p[chosen[b, t]].sum() if norm_topk else 1.0
        for e in chosen[b, t]:
            gate = token @ w["gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (token @ w["up"][e])
            out[b, t] += p[e] / total * (hidden @ w["down"][e])
    return out, chosen


@pytest.mark.compat
@pytest.mark.parametrize(("k", "norm_topk"), [(1, False), (2, True), (3, False), (8, True)])
def test_output_equals_a_loop_over_tokens(k, norm_topk):
    moe, w = make(num_experts_per_token=k, norm_topk=norm_topk)
    out, _ = moe(X, jnp.ones(X.shape[:2]))
    want, _ = naive(w, X, k, norm_topk)
    np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())


def test_no_token_is_dropped_when_all_want_the_same_expert():
    moe, w = make(num_experts_per_token=1)
    router = np.zeros((16, 8), np.float32)
    router[:, 5] = 10.0
    moe.router.set_value(jnp.asarray(router))
    x = jnp.abs(X)
    out, aux = moe(x, jnp.ones(x.shape[:2]))
    want, chosen = naive(w | {"router": router.astype(np.float64)}, x, 1, True)
    assert (chosen == 5).all()
    np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())
    assert float(aux) == pytest.approx(8.0, rel=1e-3)  # the worst there is: E f P with f = P = 1


def test_routing():
    config = tiny.model(tiny.MOE, num_experts_per_token=2)
    router = jax.random.normal(jax.random.key(1), (16, 8))
    probabilities, weights, chosen = route(config, X, router)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(chosen, np.argsort(-np.asarray(probabilities), axis=-1)[..., :2])


def test_router_probabilities_are_float32_in_a_bfloat16_model():
    config = tiny.model(tiny.MOE)
    probabilities, _, _ = route(config, X.astype(jnp.bfloat16), jnp.ones((16, 8)))
    assert probabilities.dtype == jnp.float32


def test_load_balance_loss_by_hand():
    """Three tokens, the last one padding; two experts, one choice each.

    f = (1, 1) / 2 and P = ((0.9, 0.1) + (0.4, 0.6)) / 2, so E Σ f P = 2 (0.5 * 0.65 + 0.5 * 0.35) = 1.
    """
    probabilities = jnp.array([[[0.9, 0.1], [0.4, 0.6], [1.0, 0.0]]])
    chosen, mask = jnp.array([[[0], [1], [0]]]), jnp.array([[1.0, 1.0, 0.0]])
    assert float(load_balance_loss(*balance_sums(probabilities, chosen, mask))) == pytest.approx(1.0)
    both_to_first = jnp.array([[[0], [0], [1]]])
    assert float(load_balance_loss(*balance_sums(probabilities, both_to_first, mask))) == pytest.approx(2 * 0.65)
    assert float(load_balance_loss(*balance_sums(probabilities, chosen, jnp.zeros((1, 3))))) == 0.0


def test_an_even_router_has_loss_k():
    probabilities = jnp.full((1, 4, 4), 0.25)
    chosen = jnp.array([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    assert float(load_balance_loss(*balance_sums(probabilities, chosen, jnp.ones((1, 4))))) == pytest.approx(2.0)
