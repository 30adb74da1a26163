"""The fused projection and loss against float64 numpy: values, both gradients, a split vocabulary, and its memory."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import blocks, dispatch, hopper, linear_cross_entropy
from pallas_kernels.linear_cross_entropy import chunked, gpu, reference, tpu, xla


class Case(NamedTuple):
    tokens: int = 7
    features: int = 5
    vocab: int = 16
    transposed: bool = False
    z_loss: float = 0.0
    softcap: float | None = None
    seed: int = 0

    def arrays(self):
        rng = np.random.default_rng(self.seed)
        x, w = rng.standard_normal((self.tokens, self.features)), rng.standard_normal((self.features, self.vocab))
        labels = rng.integers(0, self.vocab, self.tokens).astype(np.int32)
        weights = rng.choice([0.0, 1.0, 0.25], self.tokens)
        return *(a.astype(np.float32) for a in (x, w.T if self.transposed else w)), labels, weights.astype(np.float32)

    def options(self) -> dict:
        return {"transposed": self.transposed, "z_loss": self.z_loss, "softcap": self.softcap}


def expected(case: Case, arrays=None):
    """(loss, nll, dx, dw) in float64, from the derivative of the softmax."""
    x, w, labels, weights = case.arrays() if arrays is None else arrays
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    w = w.T if case.transposed else w
    logits, slope = x @ w, 1.0
    if case.softcap is not None:
        squashed = np.tanh(logits / case.softcap)
        logits, slope = case.softcap * squashed, 1 - squashed**2
    lse = np.log(np.exp(logits).sum(axis=1))
    nll = lse - logits[np.arange(len(labels)), labels]
    d_logits = np.exp(logits - lse[:, None]) * (1 + 2 * case.z_loss * lse[:, None])
    d_logits[np.arange(len(labels)), labels] -= 1
    d_logits = d_logits * weights[:, None] * slope
    dw = x.T @ d_logits
    loss = np.sum(weights * (nll + case.z_loss * lse**2))
    return loss, np.sum(weights * nll), d_logits @ w.T, dw.T if case.transposed else dw


@functools.partial(jax.jit, static_argnums=(0, 5))
def differentiate(options, x, w, labels, weights, function=linear_cross_entropy):
    def loss(x, w):
        return function(x, w, labels, weights, **dict(options))

    (value, nll), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return value, nll, *gradients


def compare(got, want, tolerance=2e-6):
    for name, a, b in zip(("loss", "nll", "dx", "dw")[: len(want)], got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()), err_msg=name)


@pytest.mark.compat
def test_reference_equals_numpy():
    case = Case(z_loss=0.1, softcap=2.0)
    options = (("z_loss", 0.1), ("softcap", 2.0))
    compare(differentiate(options, *case.arrays(), reference.linear_cross_entropy), expected(case))


@pytest.mark.compat
@pytest.mark.parametrize("transposed", [False, True])
def test_one_chunk_equals_numpy(transposed):
    case = Case(transposed=transposed, z_loss=0.01)
    compare(differentiate(tuple(case.options().items()), *case.arrays()), expected(case))


@settings(max_examples=40)
@given(
    case=st.builds(
        Case,
        tokens=st.sampled_from([1, 7, 12]),
        features=st.just(5),
        vocab=st.sampled_from([2, 16]),
        transposed=st.booleans(),
        z_loss=st.sampled_from([0.0, 0.1]),
        softcap=st.sampled_from([None, 2.0]),
        seed=st.integers(0, 100),
    ),
    chunk_tokens=st.sampled_from([1, 3, 5, 12]),
)
def test_chunks_that_do_not_divide_the_tokens_equal_numpy(case, chunk_tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "CPU_CHUNK", chunk_tokens * case.vocab)
        options = (*case.options().items(),)
        compare(jax.jit(functools.partial(differentiate.__wrapped__, options))(*case.arrays()), expected(case))
        compare(jax.jit(functools.partial(linear_cross_entropy, **case.options()))(*case.arrays()), expected(case)[:2])


def interpreted_with(monkeypatch, block=(16, 16, 128), watch=False):
    """The TPU kernels in blocks of that size; watched, memory is nan until it is written, and races are errors."""
    monkeypatch.setattr(tpu, "candidates", lambda *args: [tpu.Blocks(*block)])
    if watch:
        monkeypatch.setattr(tpu, "INTERPRET", pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))


on_tpu = functools.partial(linear_cross_entropy, implementation="tpu")


@pytest.mark.compat
@pytest.mark.parametrize("transposed", [False, True])
def test_tpu_kernels_equal_numpy_where_no_block_divides(transposed, monkeypatch):
    interpreted_with(monkeypatch)
    case = Case(tokens=21, vocab=200, transposed=transposed, z_loss=0.1, softcap=2.0)
    compare(differentiate((*case.options().items(),), *case.arrays(), on_tpu), expected(case), tolerance=1e-5)
    compare(jax.jit(functools.partial(on_tpu, **case.options()))(*case.arrays()), expected(case)[:2])


@pytest.mark.parametrize("case", [Case(tokens=21, vocab=200), Case(tokens=32, vocab=256, transposed=True, softcap=3.0)])
def test_tpu_kernels_read_nothing_unwritten_and_do_not_race(case, monkeypatch):
    interpreted_with(monkeypatch, watch=True)
    run = jax.jit(functools.partial(differentiate.__wrapped__, (*case.options().items(),), function=on_tpu))
    compare(run(*case.arrays()), expected(case), tolerance=1e-5)


@settings(max_examples=12)
@given(
    case=st.builds(
        Case,
        tokens=st.sampled_from([1, 40]),
        features=st.just(5),
        vocab=st.sampled_from([130, 256]),
        transposed=st.booleans(),
        z_loss=st.just(0.1),
        softcap=st.sampled_from([None, 2.0]),
        seed=st.integers(0, 100),
    )
)
def test_tpu_kernels_equal_numpy_with_the_blocks_they_choose(case):
    arrays = case.arrays()
    arrays = jnp.asarray(arrays[0], jnp.bfloat16), jnp.asarray(arrays[1], jnp.bfloat16), *arrays[2:]
    got = differentiate((*case.options().items(),), *arrays, on_tpu)
    compare([np.asarray(a, np.float64) for a in got], expected(case, arrays), tolerance=2e-2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("eight_devices")
def test_tpu_kernels_on_a_split_vocabulary_equal_a_whole_one(transposed, monkeypatch):
    interpreted_with(monkeypatch)
    case = Case(vocab=400, transposed=transposed, z_loss=0.1)
    run, (x, w, labels, weights) = sharded_loss(case, 2, "tpu"), case.arrays()

    @jax.jit
    def both(x, w):
        (loss, nll), pull = jax.vjp(lambda x, w: run(x, w, labels, weights), x, w)
        return loss, nll, *pull((2.5 * jnp.ones(()), jnp.zeros(())))

    loss, nll, dx, dw = both(x, w)
    compare((loss, nll, dx / 2.5, dw / 2.5), expected(case), tolerance=1e-5)


@settings(max_examples=15)
@given(
    offsets=st.lists(st.sampled_from([0.0, 40.0, 63.0, 66.0, 130.0, 300.0, -100.0]), min_size=4, max_size=4),
    seed=st.integers(0, 100),
)
def test_exponentials_far_above_their_reference_equal_numpy(offsets, seed):
    """The logits of four blocks of the vocabulary lie far apart, so that rows change their reference on the way."""
    case = Case(tokens=9, vocab=512, z_loss=0.001, seed=seed)
    x, w, *rest = case.arrays()
    x[:, 0], w[0] = 1.0, np.repeat(offsets, 128)
    with pytest.MonkeyPatch.context() as patch:
        interpreted_with(patch)
        got = differentiate((*case.options().items(),), x, w, *rest, on_tpu)
    compare(got, expected(case, (x, w, *rest)), tolerance=2e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_tpu_kernels_in_chunks_of_tokens_equal_numpy(transposed, monkeypatch):
    interpreted_with(monkeypatch)
    monkeypatch.setattr(tpu, "CHUNK_BYTES", 2**14)
    monkeypatch.setattr(tpu, "CHUNK_ROWS", 16)
    case = Case(tokens=45, vocab=200, transposed=transposed, z_loss=0.1)
    compare(differentiate((*case.options().items(),), *case.arrays(), on_tpu), expected(case), tolerance=1e-5)


def test_the_tpu_kernels_hold_logits_of_one_chunk_and_none_for_the_loss_alone(monkeypatch):
    """Not in the kernels, nor between them."""
    interpreted_with(monkeypatch)
    monkeypatch.setattr(tpu.dispatch, "interpreted", lambda: False)  # the kernel stays one operation
    monkeypatch.setattr(tpu, "_vmem_limit", lambda: 2**26)
    tokens, features, vocab, chunk = 64, 4, 512, 16
    monkeypatch.setattr(tpu, "_chunk_bytes", lambda: chunk * vocab * 4)
    monkeypatch.setattr(tpu, "CHUNK_ROWS", chunk)
    specs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, features), (features, vocab))]
    labels, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)
    run = functools.partial(differentiate.__wrapped__, (), function=on_tpu)
    assert max(sizes(jax.make_jaxpr(lambda x, w: run(x, w, labels, weights))(*specs).jaxpr)) == chunk * vocab
    assert max(sizes(jax.make_jaxpr(lambda x, w: on_tpu(x, w, labels, weights))(*specs).jaxpr)) < chunk * vocab


on_gpu = functools.partial(linear_cross_entropy, implementation="gpu")


def in_half(case: Case, dtype=jnp.bfloat16):
    """Arrays whose logits are of the size of one or two, whatever D; labels of weight 0 are no labels."""
    x, w, labels, weights = case.arrays()
    x = jnp.asarray(x * (2 / case.features**0.5), dtype)
    return x, jnp.asarray(w, dtype), np.where(weights == 0, -100, labels).astype(np.int32), weights


def expected_in_half(case: Case, arrays):
    x, w, labels, weights = arrays
    return expected(case, (x, w, np.where(weights == 0, 0, labels), weights))


@pytest.mark.parametrize("transposed", [False, True])
def test_hopper_kernel_equals_numpy_where_no_block_divides(transposed, monkeypatch):
    """Two cores take three blocks of the vocabulary, of two blocks of rows, or of two chunks of tokens."""
    kernel = pytest.importorskip("pallas_kernels.linear_cross_entropy.gpu_logits", exc_type=ImportError)
    block = kernel.Blocks(columns=128, step=64, stages=3, cluster=1, group=1, lead=1, store=64)
    monkeypatch.setattr(kernel, "candidates", lambda *args: [block])
    monkeypatch.setattr(kernel, "NUM_CORES", 2)
    if transposed:
        monkeypatch.setattr(gpu, "CHUNKS", (gpu.Chunk(100 * 300),))
        monkeypatch.setattr(gpu, "CHUNK_ROWS", 50)
    case = Case(150, 128, 300, transposed, z_loss=0.1, softcap=2.0 if transposed else None)
    arrays = in_half(case)
    want = expected_in_half(case, arrays)
    got = differentiate((*case.options().items(),), *arrays, on_gpu)
    compare(got[:2], want[:2])
    compare([np.asarray(a, np.float64) for a in got], want, tolerance=5e-3)
    if not transposed:
        compare(jax.jit(functools.partial(on_gpu, **case.options()))(*arrays), want[:2])


def plain_statistics(options, block, x, w, labels):
    """What the Hopper kernel leaves, by jnp."""
    logits = jnp.dot(x, w.T if options.transposed else w, preferred_element_type=jnp.float32)
    slope = jnp.ones_like(logits)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
        slope = 1 - (logits / options.softcap) ** 2
    index = jnp.arange(logits.shape[1])
    tiles = jnp.where(index < options.vocab, logits, -jnp.inf).reshape(len(x), -1, block.columns)
    top = jnp.max(tiles, axis=2, keepdims=True)
    exponentials = jnp.exp(tiles - top)
    picked = jnp.where(index == labels[:, None], logits, 0.0).reshape(tiles.shape)
    rows = (top[..., 0] / np.log(2), jnp.sum(exponentials, axis=2), jnp.sum(picked, axis=2))
    written = (exponentials.reshape(logits.shape) * slope).astype(x.dtype) if options.exponentials else None
    return (*(a.T for a in rows), written)


def by_plain_statistics(monkeypatch):
    kernel = pytest.importorskip("pallas_kernels.linear_cross_entropy.gpu_logits", exc_type=ImportError)

    def run(*args):
        return kernel.Statistics(*plain_statistics(*args))

    monkeypatch.setattr(kernel, "statistics", run)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 64, 8, z_loss=0.1),
        Case(700, 64, 1000, softcap=3.0),
        Case(600, 64, 300, transposed=True, z_loss=0.1, softcap=2.0),
        Case(512, 64, 512, transposed=True),
    ],
)
@pytest.mark.parametrize("elements", [2**8, 2**28])
def test_what_is_made_of_the_hopper_kernels_statistics_equals_numpy(case, elements, monkeypatch):
    by_plain_statistics(monkeypatch)
    monkeypatch.setattr(gpu, "CHUNKS", (gpu.Chunk(elements),))
    arrays = in_half(case)
    run = jax.jit(functools.partial(differentiate.__wrapped__, (*case.options().items(),), function=on_gpu))
    want = expected_in_half(case, arrays)
    compare([np.asarray(a, np.float64) for a in run(*arrays)], want, tolerance=5e-3)
    compare(jax.jit(functools.partial(on_gpu, **case.options()))(*arrays), want[:2])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("eight_devices")
def test_statistics_of_a_split_vocabulary_are_joined(transposed, monkeypatch):
    by_plain_statistics(monkeypatch)
    case = Case(30, 64, 400, transposed, z_loss=0.1, softcap=2.0)
    arrays = in_half(case)
    run = sharded_loss(case, 2, "gpu")

    @jax.jit
    def both(x, w):
        (loss, nll), pull = jax.vjp(lambda x, w: run(x, w, *arrays[2:]), x, w)
        return loss, nll, *pull((2.5 * jnp.ones(()), jnp.zeros(())))

    loss, nll, dx, dw = (np.asarray(a, np.float64) for a in both(*arrays[:2]))
    compare((loss, nll, dx / 2.5, dw / 2.5), expected_in_half(case, arrays), tolerance=5e-3)


def test_chunks_of_tokens_are_even_and_of_whole_blocks():
    assert chunked.even(8192, 2100, 256) == 2048
    assert chunked.even(8200, 2100, 256) == 1792  # five of 1640
    assert chunked.even(1000, 2100, 256) == 1000
    assert chunked.even(1000, 3, 256) == 256


@pytest.mark.parametrize("exponentials", [False, True])
@pytest.mark.parametrize("rows", [100, 1000])
def test_all_hopper_blocks_fit(rows, exponentials):
    kernel = pytest.importorskip("pallas_kernels.linear_cross_entropy.gpu_logits", exc_type=ImportError)
    found = kernel.candidates(rows, 2, exponentials)
    assert len(found) == len(set(found)) > 1
    for block in found:
        assert block.shared_bytes(2, exponentials) <= kernel.SHARED_BYTES
        assert block.columns % block.store == 0 == block.store % kernel.PIECE
        assert block.lead < block.stages


@pytest.mark.parametrize("rows, vocab, group, cluster", [(5, 7, 2, 2), (1, 3, 8, 1), (40, 11, 16, 1)])
def test_the_programs_of_the_hopper_kernel_have_every_tile_once(rows, vocab, group, cluster):
    kernel = pytest.importorskip("pallas_kernels.linear_cross_entropy.gpu_logits", exc_type=ImportError)
    block = kernel.Blocks(columns=256, step=64, stages=4, cluster=cluster, group=group, lead=1, store=256)
    grid = kernel._Grid(block, rows, vocab, 1)
    counts = [int(grid.count(program)) for program in range(grid.programs)]
    places = [tuple(map(int, grid.place(p, i))) for p, count in enumerate(counts) for i in range(count)]
    assert sorted(places) == [(row, column) for row in range(rows) for column in range(vocab)]
    assert max(counts) - min(counts) <= 1


def test_an_implementation_that_cannot_run_says_why():
    arrays = [jnp.asarray(a) for a in Case().arrays()]
    with pytest.raises(ValueError, match="takes the whole vocabulary, not a part of it"):
        linear_cross_entropy(*arrays, vocab_axis="tensor", implementation="reference")
    with pytest.raises(ValueError, match="multiplies bfloat16 and float32, both alike, not float32 and bfloat16"):
        linear_cross_entropy(arrays[0], jnp.asarray(arrays[1], jnp.bfloat16), *arrays[2:], implementation="tpu")


@pytest.mark.parametrize(
    "x, w, kind, why",
    [
        ((8, 64, "bfloat16"), (64, 16, "bfloat16"), "NVIDIA A100-SXM4-80GB", "A100.* has no wgmma"),
        ((8, 64, "float32"), (64, 16, "float32"), "NVIDIA H200", "both alike, not float32"),
        ((8, 64, "bfloat16"), (64, 16, "float16"), "NVIDIA H200", "both alike, not bfloat16 and float16"),
        ((8, 72, "bfloat16"), (72, 16, "bfloat16"), "NVIDIA H200", "D=72 is not a multiple of 64"),
        ((0, 64, "bfloat16"), (64, 16, "bfloat16"), "NVIDIA H200", "is empty"),
        ((8, 64, "float16"), (64, 17, "float16"), "NVIDIA H100 80GB HBM3", None),
    ],
)
def test_what_the_hopper_kernel_does_not_take_it_says(x, w, kind, why, monkeypatch):
    monkeypatch.setattr(hopper, "_missing", lambda: None)
    arguments = {"x": jax.ShapeDtypeStruct(x[:2], x[2]), "w": jax.ShapeDtypeStruct(w[:2], w[2])}
    reason = gpu.refuse(dispatch.Chip("gpu", kind), arguments)
    assert reason is None if why is None else re.search(why, reason)


def sharded_loss(case: Case, parts: int, implementation: str | None = None):
    mesh = jax.make_mesh((parts,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:parts])
    kernel = P("tensor", None) if case.transposed else P(None, "tensor")
    local = functools.partial(
        linear_cross_entropy, vocab_axis="tensor", implementation=implementation, **case.options()
    )
    return jax.shard_map(
        lambda *args: local(*args), mesh=mesh, in_specs=(P(), kernel, P(), P()), out_specs=(P(), P()), check_vma=False
    )


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("eight_devices")
def test_a_split_vocabulary_equals_a_whole_one(parts, transposed, monkeypatch):
    """Each device holds a part of V; loss and both gradients are those of one device."""
    case = Case(transposed=transposed, z_loss=0.1, softcap=3.0)
    monkeypatch.setattr(xla, "CPU_CHUNK", 3 * case.vocab // parts)
    run, (x, w, labels, weights) = sharded_loss(case, parts), case.arrays()

    @jax.jit
    def both(x, w):
        (loss, nll), pull = jax.vjp(lambda x, w: run(x, w, labels, weights), x, w)
        return loss, nll, *pull((2.5 * jnp.ones(()), jnp.zeros(())))  # a cotangent other than one

    loss, nll, dx, dw = both(x, w)
    want = expected(case)
    compare((loss, nll, dx / 2.5, dw / 2.5), want)
    compare(jax.jit(run)(x, w, labels, weights), want[:2])


def sizes(jaxpr) -> list[int]:
    """Elements of every array that a jaxpr makes, those of its inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        found += [variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += sizes(inner)
    return found


def test_the_logits_are_never_held_whole(monkeypatch):
    tokens, features, vocab, chunk = 64, 4, 512, 8
    monkeypatch.setattr(xla, "CPU_CHUNK", chunk * vocab)
    arrays = [jnp.ones(s) for s in ((tokens, features), (features, vocab))]
    labels, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)
    run = functools.partial(differentiate.__wrapped__, ())
    made = sizes(jax.make_jaxpr(run)(*arrays, labels, weights).jaxpr)
    assert max(made) == chunk * vocab  # the logits of one chunk are the largest array there is
    memory = jax.jit(run).lower(*arrays, labels, weights).compile().memory_analysis()
    if memory.temp_size_in_bytes:  # a program out of the compilation cache may not say
        assert memory.temp_size_in_bytes < tokens * vocab * 4


@pytest.mark.parametrize(
    "changes",
    [{"x": (7, 6)}, {"x": (7,)}, {"labels": (6,)}, {"weights": (6,)}, {"transposed": True}],
    ids=["features", "rank", "labels", "weights", "orientation"],
)
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused(changes):
    shapes = {"x": (7, 5), "w": (5, 16), "labels": (7,), "weights": (7,)} | changes
    transposed = shapes.pop("transposed", False)
    arrays = {name: jnp.zeros(shape, jnp.int32 if name == "labels" else jnp.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"linear_cross_entropy takes x \[M,D\]"):
        linear_cross_entropy(**arrays, transposed=transposed)


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16():
    case = Case(tokens=200, features=64, vocab=512, z_loss=0.001)
    x, w, labels, weights = case.arrays()
    arrays = jnp.asarray(x / 8, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), labels, weights
    got = differentiate((("z_loss", 0.001),), *arrays)
    compare([np.asarray(a, np.float64) for a in got], expected(case, arrays), tolerance=2e-2)


HALF_CASES = {
    "rows": Case(1000, 512, 5000, z_loss=1e-3),
    "transposed": Case(1000, 512, 5000, transposed=True, softcap=3.0),
    "whole": Case(1024, 2048, 32000),
    "whole transposed": Case(1000, 2048, 32000, transposed=True, z_loss=1e-3, softcap=30.0),
    "odd": Case(77, 64, 1001, z_loss=1e-3),
    "chunks": Case(5000, 128, 32000, softcap=30.0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", HALF_CASES.values(), ids=HALF_CASES)
def test_hopper_kernel_on_a_gpu(case, dtype):
    arrays = in_half(case, dtype)
    want = expected_in_half(case, arrays)
    compare(jax.jit(functools.partial(on_gpu, **case.options()))(*arrays), want[:2], tolerance=1e-5)
    got = jax.jit(functools.partial(differentiate.__wrapped__, (*case.options().items(),), function=on_gpu))(*arrays)
    compare([np.asarray(a, np.float64) for a in got], want, tolerance=5e-3)


HALF_BLOCKS = [  # columns, step, stages, cluster, group, lead, store
    (256, 64, 4, 1, 16, 1, 256),
    (256, 64, 4, 2, 16, 2, 256),
    (128, 64, 6, 2, 4, 0, 128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", HALF_BLOCKS)
def test_hopper_kernel_on_a_gpu_in_other_blocks(sizes):
    """And the exponentials in two pieces, of four stages."""
    kernel = pytest.importorskip("pallas_kernels.linear_cross_entropy.gpu_logits", exc_type=ImportError)
    block = kernel.Blocks(*sizes)
    written = block._replace(store=128, lead=1) if block.columns == 256 else block._replace(stages=5)
    chosen = {"linear_cross_entropy.forward": block, "linear_cross_entropy.exponentials": written}
    case = Case(1500, 512, 5000, z_loss=1e-3)
    arrays = in_half(case)
    want = expected_in_half(case, arrays)
    with blocks.forced({name: sizes._asdict() for name, sizes in chosen.items()}):
        compare(jax.jit(functools.partial(on_gpu, **case.options()))(*arrays), want[:2], tolerance=1e-5)
        run = jax.jit(functools.partial(differentiate.__wrapped__, (*case.options().items(),), function=on_gpu))
        compare([np.asarray(a, np.float64) for a in run(*arrays)], want, tolerance=5e-3)
