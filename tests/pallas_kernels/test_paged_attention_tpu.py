"""The TPU kernel of paged attention, interpreted, against numpy; and compiled, where the compiler is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import tpu, tpu_form
from pallas_kernels.paged_attention.api import cascade_attention, paged_attention
from tests.pallas_kernels.ragged_pages import expected, make

SIZES = {"tokens": 40, "rows": 4, "head_dim": 128, "page_size": 8, "columns": 6, "pool": 24}
mixes = st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0, 1, 1, 2, 10])), min_size=0, max_size=4)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of which a few tokens fill several."""
    monkeypatch.setattr(tpu, "candidates", lambda *_: [tpu_form.Blocks(queries=4, pages=2, keys=16)])


@functools.cache
def program(op, **options):
    return jax.jit(functools.partial(op, implementation="tpu", **options))


def check(batch, out, pages, tolerance=2e-5, **options):
    """The pool too: what nobody owns is as it was, but the rows after a sequence's last may have become zeros."""
    want, data = expected(batch, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=tolerance, rtol=tolerance)
    got = np.asarray(pages.data.astype(jnp.float32), np.float64)
    tail = np.zeros(data.shape, bool)
    for r in range(batch.num_sequences):
        length = batch.lengths[r]
        if length % data.shape[3]:
            tail[batch.block_tables[r, length // data.shape[3]], :, 1, length % data.shape[3] :] = True
    np.testing.assert_allclose(np.where(tail & (got == 0), data, got), data, atol=tolerance, rtol=tolerance)


@pytest.mark.compat
@settings(max_examples=15)
@given(mix=mixes, options=st.sampled_from([{}, {"window": 5, "softcap": 3.0}]), seed=st.integers(0, 99))
def test_a_ragged_batch(mix, options, seed):
    batch = make([c for c, _ in mix], [n for _, n in mix], heads=4, kv_heads=2, seed=seed, **SIZES)
    out, pages = program(paged_attention, **options)(*batch.arrays())
    check(batch, out, pages, **options)


@pytest.mark.parametrize(("dtype", "top"), [("int8", 100), ("float8_e4m3fn", 96.0)])
def test_a_quantised_pool(dtype, top):
    sizes = SIZES | {"page_size": 32, "columns": 2, "pool": 8}
    scales = 2.0 ** np.random.default_rng(7).integers(-2, 2, (1, 2, sizes["head_dim"]))
    batch = make([5, 33, 30], [1, 1, 7], heads=2, kv_heads=1, scales=scales, top=top, **sizes)
    out, pages = program(paged_attention)(*batch.arrays(pages=dtype))
    assert pages.data.dtype == dtype
    check(batch, out, pages, tolerance=1e-4)  # scores of some hundred, as in test_paged_attention


def test_bfloat16():
    sizes = SIZES | {"page_size": 16, "columns": 3, "pool": 12}
    batch = make([5, 17, 30], [1, 1, 9], heads=3, kv_heads=1, **sizes)
    out, pages = program(paged_attention)(*batch.arrays(dtype=jnp.bfloat16, pages=jnp.bfloat16))
    assert out.dtype == pages.data.dtype == jnp.bfloat16
    check(batch, out.astype(jnp.float32), pages, tolerance=4e-2)


@pytest.mark.parametrize("shared", [0, 16])
def test_a_shared_prefix(shared):
    batch = make([3, 0, 5], [1, 7, 4], heads=2, kv_heads=1, **SIZES)
    q, k, v, pages, *numbers = batch.arrays()
    prefix = jax.random.normal(jax.random.key(0), (2, *pages.data.shape[1:]))
    pages = pages._replace(data=jnp.concatenate([pages.data, prefix]))
    arguments = q, k, v, pages, jnp.array([24, 25, -7], jnp.int32), jnp.int32(shared), *numbers
    options = {"sinks": jnp.arange(2.0), "softcap": 2.0}
    want = cascade_attention(*arguments, implementation="reference", **options)[0]
    np.testing.assert_allclose(
        program(cascade_attention, softcap=2.0)(*arguments, sinks=options["sinks"])[0], want, atol=1e-5
    )


@pytest.mark.parametrize("mix", [[(9, 1), (0, 6), (20, 1)], [(0, 0), (3, 5)]])
def test_no_copy_races_with_another_or_reads_what_is_not_there(monkeypatch, mix):
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    monkeypatch.setattr(tpu, "INTERPRET", params)
    batch = make([c for c, _ in mix], [n for _, n in mix], heads=2, kv_heads=1, **SIZES)
    out, pages = paged_attention(*batch.arrays(), implementation="tpu")
    check(batch, out, pages)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert not interpreter.races.races_found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"page_size": 4}, "page_size=4 is not a multiple of 8, the rows of a tile of float32"),
        ({"head_dim": 64}, "head_dim=64 is not a multiple of 128"),
    ],
)
def test_what_it_does_not_take(change, reason):
    batch = make([2], [1], heads=2, kv_heads=1, **(SIZES | change))
    with pytest.raises(ValueError, match=reason):
        paged_attention(*batch.arrays(), implementation="tpu")
    assert dispatch.explain(paged_attention, *batch.arrays()).name in ("cpu", "xla")


@pytest.mark.parametrize("window", [None, 4096])
def test_block_sizes_fit_the_memory(window):
    form = tpu_form.Form(2048, 64, 1, 8, 8, 128, 32, True, True, window, None, 0.1, False, False, *["bfloat16"] * 3)
    found = tpu_form.candidates(form, 64, 64 * 2**20)
    assert found and all(tpu_form.vmem_bytes(form, block) < 64 * 2**20 for block in found)
    assert all(block.pages * 32 % block.keys == 0 for block in found)


def test_sinks_and_heads_split_over_two_cores(monkeypatch):
    monkeypatch.setattr(tpu, "_cores", lambda: 2)
    batch = make([9, 0, 20], [1, 6, 1], heads=4, kv_heads=2, **SIZES)
    sinks = np.array([0.5, -1.0, 3.0, 0.0])
    out, pages = paged_attention(*batch.arrays(), sinks=jnp.asarray(sinks, jnp.float32), implementation="tpu")
    check(batch, out, pages, sinks=sinks)
