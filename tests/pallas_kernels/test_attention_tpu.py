"""The TPU kernels of attention, interpreted, against the reference in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.attention import reference, tpu, tpu_backward, tpu_common

FORWARD, BACKWARD = tpu.ForwardBlocks(128, 128, 256), tpu_backward.BackwardBlocks(128, 128, 256)


class Case(NamedTuple):
    """One call; sizes of few values, since each combination is compiled anew."""

    batch: int = 1
    queries: int = 256
    keys: int = 256
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 8
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    segments: bool = False
    sinks: bool = False
    alibi: bool = False
    offset: str = "static"  # static | traced | per_sequence
    start: int = 0  # of the queries among the keys
    size: float = 1.0  # of the queries

    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        heads = self.kv_heads * self.group
        arrays = {
            "q": self.size * rng.standard_normal((self.batch, self.queries, heads, self.head_dim)),
            "k": rng.standard_normal((self.batch, self.keys, self.kv_heads, self.head_dim)),
            "v": rng.standard_normal((self.batch, self.keys, self.kv_heads, self.head_dim)),
        }
        if self.sinks:
            arrays["sinks"] = rng.standard_normal(heads)
        return arrays

    def options(self) -> dict:
        rng = np.random.default_rng(1)
        ids = jnp.sort(jnp.asarray(rng.integers(0, 4, (self.batch, self.queries + self.keys)), jnp.int32), axis=1)
        offsets = {"static": self.start, "traced": jnp.int32(self.start)}
        return {
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "scale": self.head_dim**-0.5,
            "q_segment_ids": ids[:, max(self.start, 0) :][:, : self.queries] if self.segments else None,
            "kv_segment_ids": ids[:, : self.keys] if self.segments else None,
            "q_offset": offsets.get(self.offset, self.start + 3 * jnp.arange(self.batch)),
            "alibi_slopes": 2.0 ** -jnp.arange(1, 1 + self.kv_heads * self.group) if self.alibi else None,
            "return_lse": True,
        }


def both_passes(attention, arrays, options):
    """out, lse, and the gradients of everything in `arrays` for random cotangents of both."""

    def run(arrays):
        return attention(**arrays, **options)

    (out, lse), pull = jax.vjp(jax.jit(run), arrays)
    rng = np.random.default_rng(2)
    cotangents = (jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in (out, lse))
    return (out, lse), pull(tuple(cotangents))[0]


def check(case: Case, dtype=jnp.float32, tolerance: float = 2e-5) -> None:
    arrays, options = case.arrays(), case.options()
    rounded = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in rounded.items()}
        expected = both_passes(reference.attention, exact, options)
    got = both_passes(tpu.attention, rounded, options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        empty = np.asarray(b) == reference.NEG_INF  # log-sum-exp of queries that see nothing
        assert (np.asarray(a)[empty] == np.float32(reference.NEG_INF)).all()
        a, b = (np.where(empty, 0.0, np.asarray(x, np.float64)) for x in (a, b))
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    sizes = {"attention.forward": FORWARD, "attention.backward": BACKWARD}
    monkeypatch.setattr(tpu.blocks, "pick", lambda kernel, key, candidates: sizes[kernel])


@pytest.mark.compat
def test_causal_grouped():
    check(Case(queries=384, keys=384, group=2))


@pytest.mark.compat
def test_bfloat16():
    check(Case(queries=384, keys=384, head_dim=128), jnp.bfloat16, tolerance=2e-2)


@pytest.mark.parametrize(
    "case",
    [
        Case(causal=False, queries=200, keys=500, batch=2, kv_heads=2),
        Case(window=100, queries=300, keys=400),
        Case(window=129, queries=300, keys=400, causal=False),
        Case(segments=True, queries=300, keys=300, batch=2),
        Case(segments=True, queries=640, keys=640),  # whole blocks of one segment, and blocks that share none
        Case(segments=True, queries=640, keys=640, window=300),
        Case(softcap=5.0, queries=384, keys=384),
        Case(sinks=True, group=2, queries=300, keys=300),
        Case(alibi=True, group=2, queries=384, keys=384),
        Case(offset="traced", start=200, queries=100, keys=400),
        Case(offset="per_sequence", start=40, batch=2, queries=256, keys=300, window=60),
        Case(start=-200, queries=384, keys=256, sinks=True),
        Case(start=600, queries=256, keys=256, window=200),
        Case(head_dim=136, queries=130, keys=270),
        Case(queries=1, keys=300, start=299, group=2),
    ],
)
def test_masks_and_shapes(case):
    check(case)


@pytest.mark.parametrize("vmem", [2**26, 2**18], ids=["summed_in_vmem", "summed_afterwards"])
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, kv_heads=2, group=3, queries=200, keys=300, start=100),  # several blocks of keys, one of queries
        Case(kv_heads=2, group=4, queries=384, keys=384),  # two parts of the queries
        Case(kv_heads=2, group=2, queries=300, keys=100, causal=False),  # one block of keys
        Case(kv_heads=2, group=2, segments=True, alibi=True, window=200, head_dim=136),
    ],
)
def test_groups_of_query_heads(monkeypatch, case, vmem):
    monkeypatch.setattr(tpu_common, "vmem_capacity", lambda: vmem)
    assert tpu_backward.sums_group(BACKWARD, case.group, case.head_dim, case.keys, 4, vmem) == (vmem == 2**26)
    check(case)


def test_summed_in_vmem_as_long_as_it_has_room():
    """By hand, in bytes: 2 * 1024 * 128 * 4 = 2**20 for 1024 keys, and room for 71.8 times as many.

    0.85 * 2**27 - 4 * 1024**2 * 4 (scores) - 1024 * 128 * 32 (keys) - 8192 * (128 * 16 + 128) (queries) = 75,287,756
    """
    size = tpu_backward.BackwardBlocks(1024, 1024, 8192)
    assert tpu_backward.sums_group(size, 4, 128, 71 * 1024, 2, 2**27)
    assert not tpu_backward.sums_group(size, 4, 128, 71 * 1024 + 1, 2, 2**27)
    assert not tpu_backward.sums_group(size, 1, 128, 1024, 2, 2**27)  # nothing to be added up


@pytest.mark.parametrize("seed", range(4))
def test_what_two_blocks_of_segments_have_in_common(seed):
    rng = np.random.default_rng(seed)
    q_ids, kv_ids = rng.integers(0, 4, (1, 24)), np.sort(rng.integers(0, 4, (1, 40)))
    q_ids[:, 8:16] = 2  # a block of one segment, for some of the keys' to be of the same
    kv_ids[:, 8:16] = 2
    ranges = [tpu.common.ranges(jnp.asarray(ids), ids.shape[1], 8) for ids in (q_ids, kv_ids)]
    for i, j in np.ndindex(3, 5):
        share, alike = tpu.common.relation(ranges, 0, i, j)
        equal = q_ids[0, 8 * i : 8 * i + 8, None] == kv_ids[0, 8 * j : 8 * j + 8]
        assert share or not equal.any()
        assert alike == equal.all()


def test_scores_beyond_the_fast_bodys_range_are_gone_through_again():
    check(Case(queries=128, keys=512, start=384, size=300.0), tolerance=1e-3)
    check(Case(queries=128, keys=512, causal=False, size=300.0), tolerance=1e-3)


@settings(max_examples=4, deadline=None)
@given(
    st.builds(
        lambda **fields: Case(**fields),
        queries=st.sampled_from([130, 300]),
        keys=st.sampled_from([140, 300]),
        causal=st.booleans(),
        window=st.sampled_from([None, 1, 150]),
        segments=st.booleans(),
        sinks=st.booleans(),
        start=st.sampled_from([-100, 0, 70]),
    )
)
def test_any_mask(case):
    check(case)


@pytest.mark.parametrize("case", [Case(queries=200, keys=300, start=100, group=2), Case(window=70, segments=True)])
def test_no_races_and_nothing_uninitialised(monkeypatch, case):
    checked = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    monkeypatch.setattr(tpu_common, "interpret", lambda: checked)
    check(case)


def test_visible_blocks_are_those_of_the_mask():
    rng = np.random.default_rng(0)
    for _ in range(60):
        options = tpu.Options(
            bool(rng.integers(2)),
            [None, 1, 5, 16][rng.integers(4)],
            None,
            1.0,
            1,
            int(rng.integers(1, 40)),
            *[False] * 3,
        )
        start, queries, size = int(rng.integers(-20, 40)), 8, int(rng.choice([4, 8]))
        q_index, kv_index = start + jnp.arange(queries)[None], jnp.arange(48)
        keep = np.asarray(reference.mask(q_index, kv_index, causal=options.causal, window=options.window)[0])
        keep = keep & (np.arange(48) < options.num_keys)
        of_block = keep.reshape(queries, -1, size)
        some, every = of_block.any((0, 2)), of_block.all((0, 2))
        keys = tpu_common.visible_keys(options, start, start + queries - 1, size)
        inside = np.arange(len(some))
        assert not some[(inside < keys.first) | (inside >= keys.last)].any(), (options, start)
        assert every[(inside >= keys.full_first) & (inside < keys.full_last)].all(), (options, start)
        for block, kv_first in enumerate(range(0, options.num_keys, size)):
            found = tpu_common.visible_queries(options, kv_first, start, queries, 4, size)
            of_part = of_block[:, block].reshape(-1, 4, size)
            parts = np.arange(queries // 4)
            assert not of_part.any((1, 2))[(parts < found.first) | (parts >= found.last)].any()
            assert of_part.all((1, 2))[(parts >= found.full_first) & (parts < found.full_last)].all()


@pytest.mark.compat
def test_what_is_refused():
    def why(q_dtype=jnp.bfloat16, head_dim=128, bias=None):
        x = jax.ShapeDtypeStruct((1, 8, 2, head_dim), q_dtype)
        chip = dispatch.Chip("tpu", "TPU v6 lite")
        return tpu.refuse(chip, {"q": x, "k": x, "v": x, "bias": bias})

    assert why() is None
    assert why(jnp.float16) == "takes bfloat16 and float32, not float16"
    assert why(bias=jnp.zeros((1, 1, 8, 8))) == "takes no bias"
    assert why(head_dim=512) == "takes a head_dim up to 256, not 512"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 4096, 2**20])
def test_candidates_fit(head_dim, length):
    for itemsize in 2, 4:
        for vmem in 64 * 2**20, 128 * 2**20:
            assert tpu.candidates(head_dim, length, length, itemsize, vmem)
            for size in tpu_backward.candidates(head_dim, length, length, itemsize, vmem):
                assert size.q_held % size.q == 0
            for held in tpu.candidates(head_dim, length, length, itemsize, vmem):
                assert held.kv_held % held.kv == 0


def test_sums_over_heads_are_those_of_float32():
    """They are made as a product, whose operands a TPU would round to bfloat16 if it were not told otherwise."""
    rng = np.random.default_rng(2)
    x, y = (jnp.asarray(rng.standard_normal((2, 32, 3, 24)), jnp.bfloat16) for _ in range(2))
    wanted = np.einsum("btnh,btnh->bnt", np.asarray(x, np.float64), np.asarray(y, np.float64))
    np.testing.assert_allclose(tpu.head_sums(x, y), wanted, rtol=1e-5, atol=1e-5)
    assert "HIGHEST" in jax.jit(tpu.head_sums).lower(x, y).as_text()
