"""The grouped matrix product against a loop over its groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import ragged_dot
from pallas_kernels.ragged_dot import reference

ROWS, EXPERTS, FEATURES, OUT = 9, 4, 3, 5


def looped(x, w, sizes, d_out):
    """(out, dx, dw) in float64; rows past the last group belong to none."""
    x, w, d_out = (np.asarray(a, np.float64) for a in (x, w, d_out))
    out, dx, dw, start = np.zeros_like(d_out), np.zeros_like(x), np.zeros_like(w), 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows], dx[rows], dw[expert] = x[rows] @ w[expert], d_out[rows] @ w[expert].T, x[rows].T @ d_out[rows]
        start += size
    return out, dx, dw


def differentiated(function):
    @jax.jit
    def run(x, w, sizes, d_out):
        out, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, w)
        return out, *pull(d_out)

    return run


IMPLEMENTATIONS = {"api": differentiated(ragged_dot), "reference": differentiated(reference.ragged_dot)}


@pytest.mark.compat
@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=EXPERTS, max_size=EXPERTS), seed=st.integers(0, 100))
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_a_loop_over_groups_in_both_passes(name, cuts, seed):
    """Groups of any size, empty ones too; what is left over of the rows gives zeros and no gradient."""
    sizes = np.diff([0, *sorted(cuts)]).astype(np.int32)
    rng = np.random.default_rng(seed)
    shapes = (ROWS, FEATURES), (EXPERTS, FEATURES, OUT), (ROWS, OUT)
    x, w, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    for got, want in zip(IMPLEMENTATIONS[name](x, w, sizes, d_out), looped(x, w, sizes, d_out), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"x": (9, 4)}, {"x": (9,)}, {"w": (3, 5)}, {"sizes": (3,)}])
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused(changes):
    shapes = {"x": (9, 3), "w": (4, 3, 5), "sizes": (4,)} | changes
    x, w = jnp.zeros(shapes["x"]), jnp.zeros(shapes["w"])
    with pytest.raises(ValueError, match=r"ragged_dot takes x \[M,K\], w \[E,K,N\], sizes \[E\]"):
        ragged_dot(x, w, jnp.zeros(shapes["sizes"], jnp.int32))
