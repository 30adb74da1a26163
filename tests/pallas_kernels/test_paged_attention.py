"""Paged attention over ragged batches, against numpy; and what its callers get wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention.api import cascade_attention, new_pages, paged_attention
from tests.pallas_kernels.ragged_pages import expected, make

SIZES = {"tokens": 20, "rows": 4, "head_dim": 8, "page_size": 4, "columns": 6, "pool": 20}
# By key head, keys or values, and channel; powers of two, so that whole numbers of them are exact.
SCALES = 2.0 ** np.random.default_rng(7).integers(-4, 3, (2, 2, 8))
# (tokens in the pool, new tokens) of each sequence: decoding, whole prompts, chunks whose borders lie inside pages
mixes = st.lists(st.tuples(st.integers(0, 13), st.sampled_from([0, 1, 1, 2, 5])), min_size=0, max_size=4)
HEADS = [(4, 2), (2, 2), (6, 1)]
OPTIONS = [{}, {"window": 5, "softcap": 3.0}, {"window": 1}, {"scale": 0.3}]


@functools.cache
def program(op, implementation, **options):
    return jax.jit(functools.partial(op, implementation=implementation, **options))


def check(batch, out, pages, tolerance=2e-5, **options):
    want, data = expected(batch, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(pages.data.astype(jnp.float32)), data, atol=tolerance, rtol=tolerance)


@pytest.mark.compat
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@settings(max_examples=40)
@given(mix=mixes, heads=st.sampled_from(HEADS), options=st.sampled_from(OPTIONS), seed=st.integers(0, 99))
def test_a_ragged_batch(implementation, mix, heads, options, seed):
    contexts, news = [c for c, _ in mix], [n for _, n in mix]
    batch = make(contexts, news, heads=heads[0], kv_heads=heads[1], seed=seed, **SIZES)
    out, pages = program(paged_attention, implementation, **options)(*batch.arrays())
    check(batch, out, pages, **options)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_pool_of_the_bits_of_bfloat16_is_one_of_bfloat16(implementation):
    batch = make([5, 0, 9], [1, 7, 3], heads=4, kv_heads=2, **SIZES)
    q, k, v, pages, *where = batch.arrays()
    q, k, v, pages = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (q, k, v, pages))
    want, floats = paged_attention(q, k, v, pages, *where, implementation=implementation)
    bits = pages._replace(data=jax.lax.bitcast_convert_type(pages.data, jnp.uint16))
    out, found = paged_attention(q, k, v, bits, *where, implementation=implementation)
    assert found.data.dtype == jnp.uint16
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(found.data, jax.lax.bitcast_convert_type(floats.data, jnp.uint16))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sinks(implementation):
    batch = make([5, 0, 9], [1, 7, 3], heads=4, kv_heads=2, **SIZES)
    sinks = np.array([0.5, -1.0, 3.0, 0.0])
    out, pages = paged_attention(*batch.arrays(), sinks=jnp.asarray(sinks, jnp.float32), implementation=implementation)
    check(batch, out, pages, sinks=sinks)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_quantised_pool(implementation, dtype, kv_heads):
    scales = SCALES[:kv_heads]
    batch = make(
        [5, 0, 9], [1, 7, 3], heads=4, kv_heads=kv_heads, scales=scales, top=100 if dtype == "int8" else 96.0, **SIZES
    )
    out, pages = paged_attention(*batch.arrays(pages=dtype), implementation=implementation)
    assert pages.data.dtype == dtype
    check(batch, out, pages, tolerance=1e-4)  # scores of some hundred, so that a rounding moves a weight by 2e-5


def test_values_that_a_quantised_pool_cannot_hold_are_kept_in_its_range():
    pages = new_pages(2, 4, 1, 8, "int8", scales=jnp.ones((1, 2, 8)))
    ones = jnp.ones((1, 1, 8))
    numbers = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.array([0, 1], jnp.int32)
    _, pages = paged_attention(ones, ones * 1e4, ones * -1e4, pages, *numbers, 1)
    assert np.asarray(pages.data[0, 0, :, 0, 0]).tolist() == [127, -127]


def test_the_reference_in_float64():
    with jax.enable_x64(True):
        batch = make([5, 0, 9], [1, 7, 3], heads=4, kv_heads=2, **SIZES)
        q, k, v, pages, *numbers = batch.arrays()
        q, k, v = (jnp.asarray(x, jnp.float64) for x in (batch.q, batch.k_new, batch.v_new))
        pages = pages._replace(data=jnp.asarray(batch.data))
        out, pages = paged_attention(q, k, v, pages, *numbers, implementation="reference")
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, expected(batch)[0], atol=1e-12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("shared", [0, 8])
def test_a_shared_prefix_is_the_same_as_repeating_it(implementation, shared):
    prefix = make([8], [0], heads=4, kv_heads=2, seed=1, **SIZES)
    batch = make([3, 0, 5], [1, 7, 4], heads=4, kv_heads=2, **(SIZES | {"pool": 12}))
    q, k, v, pages, tables, lengths, starts, count = batch.arrays()
    pages = pages._replace(data=jnp.concatenate([pages.data, jnp.asarray(prefix.data, jnp.float32)]))
    head = jnp.asarray(prefix.block_tables[0, :3], jnp.int32) + 12
    options = {"sinks": jnp.arange(4.0), "softcap": 2.0}
    joined = jnp.concatenate([jnp.broadcast_to(head[: shared // 4], (4, shared // 4)), tables], axis=1)
    want = paged_attention(q, k, v, pages, joined, lengths + shared, starts, count, **options)
    run = program(cascade_attention, implementation, softcap=2.0)
    got = run(q, k, v, pages, head, jnp.int32(shared), tables, lengths, starts, count, sinks=options["sinks"])
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_array_equal(got[1].data, want[1].data)


def test_the_pool_is_updated_in_place():
    batch = make([5, 0, 9], [1, 7, 3], heads=4, kv_heads=2, **SIZES)
    arguments = batch.arrays()
    compiled = jax.jit(paged_attention, donate_argnums=3).lower(*arguments).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= arguments[3].data.nbytes


def good():
    batch = make([5, 0, 9], [1, 7, 3], heads=4, kv_heads=2, **SIZES)
    names = ("q", "k_new", "v_new", "pages", "block_tables", "lengths", "starts", "num_sequences")
    return dict(zip(names, batch.arrays(), strict=True))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((20, 4))}, "takes q"),
        ({"v_new": jnp.zeros((20, 1, 8))}, "takes q"),
        ({"q": jnp.zeros((19, 4, 8))}, "differ in tokens or head_dim"),
        ({"q": jnp.zeros((20, 5, 8))}, "num_heads=5 is not a multiple of num_kv_heads=2"),
        ({"pages": new_pages(3, 4, 1, 8, "float32")}, "differ in num_kv_heads or head_dim"),
        ({"block_tables": jnp.zeros((4, 6))}, "block_tables takes integers of 2 dimensions"),
        ({"lengths": jnp.zeros(3, jnp.int32)}, "block_tables of 4 rows needs lengths"),
        ({"starts": jnp.zeros(4, jnp.int32)}, "block_tables of 4 rows needs lengths"),
        ({"num_sequences": jnp.zeros(1, jnp.int32)}, "num_sequences takes integers of 0 dimensions"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"sinks": jnp.zeros(2)}, "sinks takes one score a head"),
        ({"implementation": "cuda"}, "'cuda' of paged_attention is not known"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**(good() | change))


@pytest.mark.usefixtures("unchecked")
def test_pools_that_do_not_fit():
    with pytest.raises(ValueError, match="pages of int8 need scales"):
        new_pages(2, 4, 2, 8, "int8")
    with pytest.raises(ValueError, match="pages of bfloat16 take no scales"):
        new_pages(2, 4, 2, 8, "bfloat16", scales=jnp.ones((2, 2, 8)))
    with pytest.raises(ValueError, match="pages of int16 are not supported"):
        new_pages(2, 4, 2, 8, "int16")
    with pytest.raises(ValueError, match=r"pages.scales takes \[K, 2, H\] = \(2, 2, 8\)"):
        new_pages(2, 4, 2, 8, "int8", scales=jnp.ones(2))
    pages = good()["pages"]
    with pytest.raises(ValueError, match=r"pages.data takes \[P, K, 2, page_size, H\]"):
        paged_attention(**(good() | {"pages": pages._replace(data=pages.data[0])}))


@pytest.mark.usefixtures("unchecked")
def test_prefixes_that_do_not_fit():
    with pytest.raises(ValueError, match="prefix_length=6 is not a multiple of page_size=4"):
        cascade_attention(**good(), prefix_table=jnp.zeros(3, jnp.int32), prefix_length=6)
    with pytest.raises(ValueError, match="prefix_table takes integers"):
        cascade_attention(**good(), prefix_table=jnp.zeros((1, 3), jnp.int32), prefix_length=4)
