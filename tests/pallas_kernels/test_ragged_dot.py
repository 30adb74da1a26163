"""The grouped matrix product against a loop over its groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, ragged_dot
from pallas_kernels.quantized_matmul.tensor import dequantize, quantize
from pallas_kernels.ragged_dot import gpu, tiles, tpu, trips
from pallas_kernels.schedule import KernelSchedule, Region

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


IMPLEMENTATIONS = {
    name: differentiated(functools.partial(ragged_dot, implementation=name)) for name in ("xla", "tpu", "reference")
}


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


def test_double_precision_is_kept_by_the_reference():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w, d_out = (rng.standard_normal(shape) for shape in ((ROWS, 3), (EXPERTS, 3, OUT), (ROWS, OUT)))
        sizes = np.array([2, 0, 4, 1])
        got = differentiated(functools.partial(ragged_dot, implementation="reference"))(x, w, sizes, d_out)
        for a, b in zip(got, looped(x, w, sizes, d_out), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 50), min_size=3, max_size=3), tile=st.sampled_from([4, 16, 64]))
def test_visits_cover_every_row_and_group_once(cuts, tile):
    sizes = np.diff([0, *sorted(cuts)]).astype(np.int32)
    for of_groups in (False, True):
        table, count = tiles.visits(jnp.asarray(sizes), 50, tile, of_groups=of_groups)
        found = [(int(g), int(t) * tile + r) for t, g, low, high in zip(*(np.asarray(f)[: int(count)] for f in table[:4]),
                 strict=True) for r in range(int(low), int(high))]  # fmt: skip
        owner = np.repeat(np.arange(4), [*sizes, 50 - sizes.sum()])
        assert found == [(g, row) for row, g in enumerate(owner) if g < 3 or not of_groups]
        if of_groups:
            assert set(np.asarray(table.group)[: int(count)].tolist()) == {0, 1, 2}
            assert np.asarray(table.first)[: int(count)].sum() == np.asarray(table.last)[: int(count)].sum() == 3


def test_static_cycles_count_every_run_of_every_body():
    """Chunks begin at multiples of 16, and their last body is the smallest that holds what is left."""
    assert [(v.low, v.high) for v in trips.visits([300, 244, 480], 512)] == [(0, 300), (300, 512), (0, 32), (32, 512)]
    slots = {"MXU": 1}
    bodies = [Region("branch", 0, cost, None, cost, slots, slots, ()) for cost in (10, 20, 30, 40)]
    loop = Region("loop", 0, 110, None, 3, {"MXU": 0}, slots, tuple(bodies))
    grid = Region("loop", 0, 150, None, 5, {"MXU": 0}, slots, (loop,))
    kernel = KernelSchedule("ragged_dot", Region("kernel", 0, 150, None, 7, {"MXU": 0}, slots, (grid,)), 0)
    got = trips.cycles(kernel, {"tile": 512, "chunk": 512, "columns": 128}, [300, 244, 480], (64, 256))
    assert got == 2 * (4 * (5 + 3) + 30 + 20 + 10 + 40)
    assert trips._runs(trips.Visit(0, 700, True, True), 512, [100, 110, 20, 25], sums=True) == [100, 25, 25]


BLOCKS = tpu.RowBlocks(32, 16, 128), tpu.WeightBlocks(32, 16, 16, 128)
MANY = (70, 24, 200), np.array([5, 0, 33, 20], np.int32)  # M, K, N: none is a multiple of a block


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_tpu_kernels_blocks_need_not_divide_anything(dtype, monkeypatch):
    """Nor do they read what was never written, or race: memory is nan at first and every access is watched."""
    monkeypatch.setattr(tpu, "row_candidates", lambda *args: [BLOCKS[0]])
    monkeypatch.setattr(tpu, "weight_candidates", lambda *args: [BLOCKS[1]])
    if dtype == np.float32:
        monkeypatch.setattr(tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
    (rows, features, out), sizes = MANY
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, features), (4, features, out), (rows, out))]
    got = differentiated(functools.partial(ragged_dot, implementation="tpu"))(*arrays[:2], sizes, arrays[2])
    tolerance = 1e-5 if dtype == np.float32 else 2e-2
    for a, b in zip(got, looped(*arrays[:2], sizes, arrays[2]), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.slow
def test_the_gpu_kernel_interpreted(monkeypatch):
    """Groups that begin inside a tile, rows of no group, and sizes that no block divides."""
    monkeypatch.setattr(gpu, "row_candidates", lambda *args: [gpu.RowBlocks(64, 64, 64, 2)])
    rng, sizes = np.random.default_rng(3), jnp.array([37, 20], jnp.int32)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((70, 56), (2, 56, 48)))
    out = ragged_dot(x, w, sizes, implementation="gpu")
    want = looped(x, w, sizes, np.zeros((70, 48)))[0]
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2e-2, atol=2e-2 * np.abs(want).max())


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(70, 56, 48, [37, 0, 20]), (1000, 512, 384, [300, 1, 0, 599]), (8, 64, 64, [3, 4])])
def test_the_gpu_kernels_on_a_gpu(case):
    rows, features, out, sizes = case
    rng, sizes = np.random.default_rng(4), np.array(sizes, np.int32)
    shapes = (rows, features), (len(sizes), features, out), (rows, out)
    x, w, d_out = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    got = differentiated(functools.partial(ragged_dot, implementation="gpu"))(x, w, sizes, d_out)
    for a, b in zip(got, looped(x, w, sizes, d_out), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2e-2, atol=2e-2 * np.abs(b).max())


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_quantised_weights_equal_their_dequantised_ones(name, group_size, monkeypatch):
    monkeypatch.setattr(tpu, "row_candidates", lambda *args: [tpu.RowBlocks(32, 16, 128)])
    rng = np.random.default_rng(2)
    x, w, d_out = (rng.standard_normal(s).astype(np.float32) for s in ((40, 150), (3, 150, 20), (40, 20)))
    quantised, sizes = quantize(jnp.asarray(w), 8, group_size), np.array([7, 20, 9], np.int32)
    out, pull = jax.vjp(lambda x: ragged_dot(x, quantised, jnp.asarray(sizes), implementation=name), jnp.asarray(x))
    want_out, want_dx, _ = looped(x, dequantize(quantised), sizes, d_out)
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pull(jnp.asarray(d_out))[0], want_dx, rtol=1e-4, atol=1e-4)


@pytest.mark.compat
def test_rows_past_the_last_group_may_hold_anything():
    x = np.full((6, 3), np.nan, np.float32)
    x[:2] = 1
    for name in ("xla", "tpu"):
        out, dx, dw = IMPLEMENTATIONS[name](x, np.ones((2, 3, 4), np.float32), np.array([1, 1]), np.ones((6, 4), "f4"))
        assert np.isfinite(out).all() and np.isfinite(dx).all() and np.isfinite(dw).all()
        assert (np.asarray(out)[2:] == 0).all() and (np.asarray(dx)[2:] == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_what_a_kernel_does_not_take_it_names():
    specs = jax.ShapeDtypeStruct((8, 16), jnp.float16), jax.ShapeDtypeStruct((2, 16, 16), jnp.float16)
    with pytest.raises(ValueError, match="multiplies bfloat16 and float32, not float16"):
        dispatch.explain(ragged_dot, *specs, jax.ShapeDtypeStruct((2,), jnp.int32), implementation="tpu")
    with pytest.raises(ValueError, match=r"takes quantised w with bits=8, .*, not bits=4"):
        ragged_dot(jnp.ones((8, 16)), quantize(jnp.ones((2, 16, 16)), 4), jnp.ones(2, jnp.int32))


@pytest.mark.parametrize("changes", [{"x": (9, 4)}, {"x": (9,)}, {"w": (3, 5)}, {"sizes": (3,)}])
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused(changes):
    shapes = {"x": (9, 3), "w": (4, 3, 5), "sizes": (4,)} | changes
    x, w = jnp.zeros(shapes["x"]), jnp.zeros(shapes["w"])
    with pytest.raises(ValueError, match=r"ragged_dot takes x \[M,K\], w \[E,K,N\], sizes \[E\]"):
        ragged_dot(x, w, jnp.zeros(shapes["sizes"], jnp.int32))
