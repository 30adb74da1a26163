"""The kernels in C++ for the host's processor: their numbers, what they refuse, and machines that cannot build them."""

import concurrent.futures
import functools
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention, cpu, dispatch, quantize, quantized_matmul
from pallas_kernels.native import SOURCES, _built, _why, native
from pallas_kernels.paged_attention.api import cascade_attention, paged_attention
from pallas_kernels.quantized_matmul import cpu as quantized_cpu
from tests.pallas_kernels.host import here, needs_compiler, needs_tiles
from tests.pallas_kernels.ragged_pages import expected, make

SIZES = {"tokens": 300, "rows": 4, "page_size": 16, "columns": 24, "pool": 96}
# (tokens in the pool, new tokens): decoding, whole prompts, chunks whose borders lie inside pages and blocks of keys
mixes = st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0, 1, 1, 3, 17, 70])), min_size=0, max_size=4)
HEADS = [(4, 2), (2, 2), (6, 1)]
OPTIONS = [{}, {"window": 150, "softcap": 3.0}, {"window": 1}, {"scale": 0.3}]


@functools.cache
def program(op, **options):
    return jax.jit(functools.partial(op, implementation="cpu", **options))


@needs_compiler
@settings(max_examples=60)
@given(
    mix=mixes,
    heads=st.sampled_from(HEADS),
    head_dim=st.sampled_from([16, 64, 80]),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 99),
)
def test_paged_attention_in_float32(mix, heads, head_dim, options, seed):
    contexts, news = [c for c, _ in mix], [n for _, n in mix]
    batch = make(contexts, news, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, seed=seed, **SIZES)
    out, pages = program(paged_attention, **options)(*batch.arrays())
    want, data = expected(batch, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=3e-5, rtol=3e-5)
    np.testing.assert_array_equal(pages.data, data.astype(np.float32))


@needs_compiler
@settings(max_examples=60)
@given(
    mix=mixes,
    heads=st.sampled_from(HEADS),
    head_dim=st.sampled_from([16, 64, 96]),
    options=st.sampled_from(OPTIONS),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_paged_attention_over_the_bits_of_bfloat16(mix, heads, head_dim, options, dtype, seed):
    """Against float64 of the rounded numbers; what is left is the rounding of weights, and that of the result."""
    contexts, news = [c for c, _ in mix], [n for _, n in mix]
    batch = make(contexts, news, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, seed=seed, **SIZES)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (batch.q, batch.k_new, batch.v_new)]
    batch.q, batch.k_new, batch.v_new = rounded
    batch.keys, batch.values = (
        [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in of] for of in (batch.keys, batch.values)
    )
    q, k, v, pages, *where = batch.arrays(dtype=dtype, pages=jnp.bfloat16)
    bits = pages._replace(data=jax.lax.bitcast_convert_type(pages.data, jnp.uint16))
    out, found = program(paged_attention, **options)(q, k, v, bits, *where)
    want, data = expected(batch, **options)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2e-2, rtol=1e-2)
    stored = jax.lax.bitcast_convert_type(found.data, jnp.bfloat16)
    np.testing.assert_array_equal(
        np.asarray(stored, np.float32), np.asarray(jnp.asarray(data, jnp.bfloat16), np.float32)
    )


@needs_compiler
@pytest.mark.parametrize("news", [[1, 7, 3], [40, 1, 90]])
def test_sinks_and_a_shared_prefix(news):
    sizes = SIZES | {"head_dim": 32, "heads": 4, "kv_heads": 2}
    prefix = make([32], [0], seed=1, **sizes)
    batch = make([3, 0, 5], news, **(sizes | {"pool": 64}))
    q, k, v, pages, tables, lengths, starts, count = batch.arrays()
    pages = pages._replace(data=jnp.concatenate([pages.data, jnp.asarray(prefix.data, jnp.float32)]))
    head = jnp.asarray(prefix.block_tables[0, :3], jnp.int32) + 64
    arguments = q, k, v, pages, head, jnp.int32(32), tables, lengths, starts, count
    options = {"sinks": jnp.asarray([0.5, -1.0, 3.0, 0.0]), "softcap": 2.0}
    got = cascade_attention(*arguments, implementation="cpu", **options)
    want = cascade_attention(*arguments, implementation="reference", **options)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_array_equal(got[1].data, want[1].data)


@needs_compiler
@pytest.mark.parametrize("news", [[1, 7, 3], [40, 1, 90]])
def test_a_pool_of_int8(news):
    scales = 2.0 ** np.random.default_rng(7).integers(-4, 3, (2, 2, 32))
    batch = make([5, 0, 9], news, heads=4, kv_heads=2, head_dim=32, scales=scales, top=100, **SIZES)
    out, pages = paged_attention(*batch.arrays(pages="int8"), implementation="cpu")
    want, data = expected(batch)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(pages.data, data)


@needs_compiler
@pytest.mark.parametrize(("donated", "copies"), [((), 1), ((3,), 0)])
def test_a_donated_pool_is_updated_in_place(donated, copies):
    arguments = make([5, 0, 9], [1, 7, 3], heads=4, kv_heads=2, head_dim=32, **SIZES).arrays()
    run = jax.jit(functools.partial(paged_attention, implementation="cpu"), donate_argnums=donated)
    program = run.lower(*arguments).compile().as_text()
    assert len(re.findall(r"f32\[96,2,2,16,32\]\S* copy\(", program)) == copies


@needs_compiler
def test_many_threads_at_once_get_their_own_answers():
    """More callers than threads in XLA's pool: none may wait for work that only it could begin."""
    batches = [make([60, 0, 9], [1, 70, 3], heads=4, kv_heads=2, head_dim=32, seed=i, **SIZES) for i in range(8)]
    run = program(paged_attention)

    def ask(batch):
        return [np.asarray(run(*batch.arrays())[0]) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for batch, answers in zip(batches, pool.map(ask, batches), strict=True):
            for answer in answers:
                np.testing.assert_allclose(answer, expected(batch)[0], atol=3e-5)


@needs_compiler
@settings(max_examples=60)
@given(
    rows=st.sampled_from([1, 2, 16, 17, 33, 48, 49, 64, 300]),
    inputs=st.sampled_from([64, 100, 576]),
    outputs=st.sampled_from([1, 16, 31, 32, 100, 513]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    out_dtype=st.sampled_from(["float32", "bfloat16"]),
    tiles=st.sampled_from([False, here.tiles]),
    seed=st.integers(0, 99),
)
def test_w8a8_products(rows, inputs, outputs, dtype, out_dtype, tiles, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, inputs)), dtype)
    w = quantize(jnp.asarray(rng.standard_normal((outputs, inputs)), jnp.float32), axis=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_cpu, "native", lambda: here._replace(tiles=tiles))
        out = quantized_matmul(x, w, activations="int8", out_dtype=out_dtype, implementation="cpu")
    values = np.asarray(x, np.float32)
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.round(values * (np.float32(1) / scale)).astype(np.int64)
    sums = codes @ np.asarray(w.data[:, :inputs], np.int64).T
    want = sums.astype(np.float32) * np.asarray(w.scales) * scale
    np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=8e-3 if out_dtype == "bfloat16" else 1e-6)


@needs_compiler
@settings(max_examples=40)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 17, 48]),
    inputs=st.sampled_from([64, 100, 576]),
    outputs=st.sampled_from([1, 31, 32, 513]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_w8a16_products(rows, inputs, outputs, dtype, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, inputs)), dtype)
    w = quantize(jnp.asarray(rng.standard_normal((outputs, inputs)), jnp.float32), axis=-1)
    out = quantized_matmul(x, w, out_dtype="float32", implementation="cpu")
    want = np.asarray(x, np.float64) @ np.asarray(w.data[:, :inputs], np.float64).T * np.asarray(w.scales, np.float64)
    np.testing.assert_allclose(out, want, atol=1e-6 * np.abs(want).max())


@needs_compiler
def test_a_bias_an_activation_and_a_gradient():
    rng = np.random.default_rng(0)
    x, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 128), (96,)))
    w = quantize(jnp.asarray(rng.standard_normal((96, 128)), jnp.float32), axis=-1)

    def loss(x, bias, implementation):
        out = quantized_matmul(x, w, bias=bias, activations="int8", activation="silu", implementation=implementation)
        return jnp.sum(out**2)

    got, want = (jax.value_and_grad(loss, (0, 1))(x, bias, name) for name in ("cpu", "xla"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-3), got, want)


@needs_tiles
@settings(max_examples=40)
@given(
    rows=st.sampled_from([1, 2, 16, 17, 33, 48, 49, 64, 300]),
    inputs=st.sampled_from([32, 96, 576]),
    outputs=st.sampled_from([1, 16, 31, 32, 100, 513]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bfloat16_products(rows, inputs, outputs, transposed, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, inputs)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((outputs, inputs) if transposed else (inputs, outputs)), jnp.bfloat16)
    want = np.asarray(x, np.float64) @ np.asarray(w.T if transposed else w, np.float64)
    out = cpu.matmul_float32(x, w, transposed)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())
    if not transposed:
        out = cpu.matmul(x, w)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=4e-3, atol=1e-5 * np.abs(want).max())


@needs_tiles
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_a_product_in_float32(transposed):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 32)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((16, 32) if transposed else (32, 16)), jnp.bfloat16)
    g = jnp.asarray(rng.standard_normal((2, 3, 16)), jnp.float32)
    out, pull = jax.vjp(lambda x, w: cpu.matmul_float32(x, w, transposed), x, w)
    matrix = (w.T if transposed else w).astype(jnp.float32)
    want, pull_plain = jax.vjp(lambda x, w: x @ w, x.astype(jnp.float32), matrix)
    np.testing.assert_allclose(out, want, atol=1e-4)
    dx, dw = pull_plain(g)
    for got, grad in zip(pull(g), (dx, dw.T if transposed else dw), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), grad, atol=3e-2 * np.abs(grad).max())


@needs_compiler
def test_what_is_not_a_number_stays_so():
    """In its own row: nothing may look healthy that is not."""
    w = quantize(jnp.ones((32, 64)), axis=-1)
    x = jnp.ones((3, 64)).at[1, 5].set(jnp.nan)
    out = np.asarray(quantized_matmul(x, w, activations="int8", implementation="cpu"))
    assert np.isnan(out[1]).all() and not np.isnan(out[[0, 2]]).any()
    batch = make([5, 0], [1, 40], heads=4, kv_heads=2, head_dim=32, **SIZES)
    for name in ("q", "k_new", "v_new"):
        arrays = dict(zip(("q", "k_new", "v_new"), batch.arrays()[:3], strict=True))
        arrays[name] = arrays[name].at[0].set(jnp.nan)
        for pages in (batch.arrays()[3], batch.arrays(pages=jnp.bfloat16)[3]):
            out = np.asarray(paged_attention(**arrays, **rest(batch, pages), implementation="cpu")[0])
            assert np.isnan(out[0]).all() and not np.isnan(out[1:]).any()


@needs_compiler
@pytest.mark.parametrize(("of", "rows"), [("q", slice(5, 6)), ("v", slice(5, None))])
def test_attention_over_what_is_not_a_number_is_none(of, rows):
    arrays = {name: jnp.ones((1, 20, 2, 16)) for name in "qkv"}
    arrays[of] = arrays[of].at[0, 5, 0, 3].set(jnp.nan)
    out, lse = attention(**arrays, return_lse=True, implementation="cpu")
    bad = np.zeros(20, bool)
    bad[rows] = True
    if of == "q":  # zeros times NaN: a value that is hidden spoils the block of those that see it
        np.testing.assert_array_equal(np.isnan(out[0, :, 0]).any(axis=-1), bad)
        np.testing.assert_array_equal(np.isnan(lse[0, 0]), bad)
    else:
        assert np.isnan(out[0, bad, 0, 3]).all()
    assert not np.isnan(out[0, :, 1]).any()


def rest(batch, pages) -> dict:
    names = ("block_tables", "lengths", "starts", "num_sequences")
    return {"pages": pages} | dict(zip(names, batch.arrays()[4:], strict=True))


@needs_compiler
def test_a_row_of_zeros_is_zeros():
    w = quantize(jnp.ones((32, 64)), axis=-1)
    assert not np.asarray(quantized_matmul(jnp.zeros((2, 64)), w, activations="int8", implementation="cpu")).any()


@needs_compiler
def test_it_is_what_a_cpu_takes():
    batch = make([5], [1], heads=4, kv_heads=2, head_dim=32, **SIZES)
    assert dispatch.explain("paged_attention", *batch.arrays()).name == "cpu"
    odd = make([5], [1], heads=4, kv_heads=2, head_dim=24, **SIZES)
    choice = dispatch.explain("paged_attention", *odd.arrays())
    assert choice.name == "xla"
    assert choice.passed_over["cpu"] == "takes head dims in steps of 16, not 24"


MACHINE = """
import logging, os
logging.basicConfig()
import jax, jax.numpy as jnp
from pallas_kernels import dispatch, native, new_pages
z = jnp.zeros((1, 1, 16))
pages = new_pages(1, 4, 1, 16, "float32")
choice = dispatch.explain("paged_attention", z, z, z, pages, *(jnp.zeros(n, jnp.int32) for n in ((1, 1), 1, 2)), 1)
print(choice.name, choice.passed_over.get("cpu"))
"""


def on_a_machine(tmp_path, **variables) -> subprocess.CompletedProcess:
    """What a process says that has an empty cache and the environment's variables changed."""
    env = os.environ | {"PALLAS_KERNELS_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run([sys.executable, "-c", MACHINE], env=env, capture_output=True, text=True, check=True)


def test_a_machine_without_a_compiler_takes_xla(tmp_path):
    said = on_a_machine(tmp_path, PATH=str(tmp_path))
    assert said.stdout.strip() == "xla needs a C++ compiler (g++), and there is none"


def test_a_compiler_that_fails_is_a_warning(tmp_path):
    (tmp_path / "g++").write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'error: no such header' >&2; exit 1\n")
    (tmp_path / "g++").chmod(0o755)
    said = on_a_machine(tmp_path, PATH=f"{tmp_path}:/bin:/usr/bin")
    assert said.stdout.startswith("xla could not be built")
    assert "error: no such header" in said.stderr
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_compiler_that_takes_too_long_is_told_as_one():
    late = subprocess.TimeoutExpired(["g++"], 300, stderr=b"still going")
    assert _why(late) == "still going"


def test_it_can_be_switched_off(tmp_path):
    assert on_a_machine(tmp_path, PALLAS_KERNELS_NATIVE="0").stdout.startswith("xla is switched off")
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_it_is_built_once(tmp_path):
    """By a compiler that makes nothing and hands out what the real one made for these tests."""
    real = shutil.which("g++") or shutil.which("c++")
    (tmp_path / "g++").write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && exec {real} --version
echo called >> {tmp_path}/calls
while [ "$1" != -o ]; do shift; done
cp {_built(real, native().digest)} "$2"
"""
    )
    (tmp_path / "g++").chmod(0o755)
    for _ in range(2):
        assert on_a_machine(tmp_path, PATH=f"{tmp_path}:/bin:/usr/bin").stdout.startswith("cpu ")
        (library,) = (tmp_path / "cache").glob("*.so")
        found = library.stat().st_mtime_ns
    assert library.stat().st_mtime_ns == found
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [library.name]
    assert (tmp_path / "calls").read_text().count("called") == len(list(SOURCES.glob("*.cc"))) + 1
