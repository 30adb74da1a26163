"""Paged attention's Hopper kernel: interpreted on a CPU (real copies and barriers), and on a GPU where there is one.

All pages and rows that nobody wrote are nan, and what block tables hold after a sequence's pages is nonsense.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import blocks
from pallas_kernels.dispatch import Chip
from pallas_kernels.paged_attention import gpu, gpu_plan
from pallas_kernels.paged_attention.api import cascade_attention, paged_attention
from pallas_kernels.paged_attention.reference import KVPages
from tests.pallas_kernels.ragged_pages import expected, make

H200 = Chip("gpu", "NVIDIA H200")
gpu_attend: Any = pytest.importorskip("pallas_kernels.paged_attention.gpu_attend")


class Case(NamedTuple):
    """A ragged batch: tokens in the pool and new tokens of each sequence, and the options of the call."""

    contexts: tuple[int, ...]
    news: tuple[int, ...]
    spare: int = 2  # tokens and sequences that the batch has room for and does not use
    kv_heads: int = 1
    group: int = 4
    head_dim: int = 64
    page_size: int = 64
    dtype: str = "bfloat16"
    options: dict = {}  # noqa: RUF012
    sinks: bool = False
    bits: bool = False

    def batch(self):
        lengths = [c + n for c, n in zip(self.contexts, self.news, strict=True)]
        columns = max(-(-n // self.page_size) for n in lengths)
        return make(
            self.contexts,
            self.news,
            tokens=sum(self.news) + self.spare,
            rows=len(lengths) + self.spare,
            heads=self.kv_heads * self.group,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            columns=columns + 1,
            pool=sum(-(-n // self.page_size) for n in lengths) + 2,
        )


def check(case: Case) -> None:
    batch = case.batch()
    arguments = list(batch.arrays(case.dtype, case.dtype))
    if case.bits:
        arguments[3] = KVPages(jax.lax.bitcast_convert_type(arguments[3].data, jnp.uint16))
    options = dict(case.options)
    sinks = np.random.default_rng(1).normal(size=case.kv_heads * case.group) if case.sinks else None
    run = jax.jit(functools.partial(paged_attention, implementation="gpu", **options))
    out, pages = run(*arguments, sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32))
    want, data = expected(batch, sinks=sinks, **options)
    tolerance = 3e-2 if case.dtype == "bfloat16" else 6e-3
    assert out.dtype == case.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=tolerance, rtol=tolerance)
    found = pages.data
    if case.bits:
        assert found.dtype == jnp.uint16
        found = jax.lax.bitcast_convert_type(found, jnp.bfloat16)
    written = jnp.asarray(data, jnp.float32).astype(case.dtype)
    np.testing.assert_array_equal(*(np.asarray(x.astype(jnp.float32)) for x in (found, written)))


def check_cascade(shared: int, **sizes: Any) -> None:
    """A shared prefix against the same sequences with it in front of each."""
    case = Case(**sizes)
    prefix = make(
        [shared + 1],
        [0],
        tokens=1,
        rows=1,
        heads=case.group * case.kv_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        columns=shared // case.page_size + 1,
        pool=shared // case.page_size + 1,
        seed=1,
    )
    batch = case.batch()
    q, k, v, pages, tables, *numbers = batch.arrays(case.dtype, case.dtype)
    own = pages.data.shape[0]
    pages = KVPages(jnp.concatenate([pages.data, jnp.asarray(prefix.data, jnp.float32).astype(case.dtype)]))
    table = jnp.asarray(prefix.block_tables[0], jnp.int32) + own
    options = {"sinks": jnp.linspace(-1, 1, q.shape[1]), "softcap": 4.0}
    arguments = (q, k, v, pages, table, jnp.int32(shared), tables, *numbers)
    got, _ = jax.jit(functools.partial(cascade_attention, implementation="gpu", softcap=4.0))(
        *arguments, sinks=options["sinks"]
    )
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    floats = KVPages(pages.data.astype(jnp.float32))
    want, _ = cascade_attention(*wide, floats, *arguments[4:], implementation="reference", **options)
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want), atol=3e-2, rtol=3e-2)


# Each program and warpgroup of an interpreted kernel is compiled on its own: these take a while.


def test_interpreted_mixed_batch():
    """Decoding and a prompt, more blocks than stages, pairs cut between programs, uneven ends and unused rows."""
    with blocks.forced("paged_attention.forward", {"keys": 64, "stages": 2, "queries": 1, "programs": 2}):
        check(Case((5, 300, 0, 90), (1, 1, 37, 3), group=3))


def test_interpreted_everything_at_once():
    check(Case((150, 0), (1, 20), kv_heads=2, options={"window": 40, "softcap": 3.0, "scale": 0.3}, sinks=True))


def test_interpreted_small_pages_of_decoding_sequences():
    check(Case((200, 70, 33), (1, 1, 1), kv_heads=2, page_size=32, group=2, dtype="float16"))


def test_interpreted_cascade():
    check_cascade(128, contexts=(10, 3), news=(1, 4))


ON_A_GPU = [
    Case((5, 300, 0, 90), (1, 1, 37, 3), group=3),
    Case((5, 300, 0, 90), (1, 1, 37, 3), group=1, kv_heads=4, page_size=16),
    Case((150, 0), (1, 20), kv_heads=2, options={"window": 40, "softcap": 3.0, "scale": 0.3}, sinks=True),
    Case((2999,), (1,), spare=0, kv_heads=8, head_dim=128),
    Case((2999,), (1,), spare=63, kv_heads=1, group=8, head_dim=128, page_size=16),
    Case((0, 700), (700, 130), kv_heads=2, head_dim=128, group=8),
    Case((0, 700), (300, 130), kv_heads=2, head_dim=128, page_size=128, dtype="float16", options={"window": 100}),
    Case((400, 700), (300, 1), kv_heads=2, head_dim=64, page_size=256, options={"window": 129}),
    Case((500, 64, 63), (1, 1, 1), kv_heads=2, head_dim=256, page_size=32, sinks=True),
    Case((500, 64, 63), (1, 90, 1), kv_heads=1, head_dim=256, group=2),
    Case((500, 64, 63), (1, 1, 64), kv_heads=2, group=5, head_dim=128, page_size=32, bits=True),
    Case((10,), (0,), kv_heads=2, head_dim=128),
]
MANY = tuple(int(n) for n in np.random.default_rng(5).integers(0, 3000, 33))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU, ids=range(len(ON_A_GPU)))
def test_on_a_gpu(case: Case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("page_size", [16, 64])
def test_many_sequences_on_a_gpu(group: int, page_size: int):
    check(Case(MANY, (1,) * 33, kv_heads=4, group=group, head_dim=128, page_size=page_size))


@pytest.mark.gpu
def test_decoding_beside_prompts_on_a_gpu():
    check(Case(MANY, (1, 3, 100) * 11, kv_heads=2, group=4, head_dim=128))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_blocks_on_a_gpu(head_dim: int):
    for size in gpu_attend.candidates(head_dim):
        with blocks.forced("paged_attention.forward", size._asdict()):
            check(Case((5, 1300, 0, 90), (1, 1, 37, 3), kv_heads=2, group=4, head_dim=head_dim))


@pytest.mark.gpu
def test_cascade_on_a_gpu():
    check_cascade(512, contexts=(10, 300, 0), news=(1, 4, 20), kv_heads=2, head_dim=128)
    check_cascade(0, contexts=(10, 300, 0), news=(1, 4, 20), kv_heads=2, head_dim=128)


@pytest.mark.gpu
def test_two_runs_are_the_same():
    case = Case(MANY, (1,) * 33, kv_heads=4, head_dim=128)
    run = jax.jit(functools.partial(paged_attention, implementation="gpu"))
    first, second = (run(*case.batch().arrays("bfloat16", "bfloat16"))[0] for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


# What is decided before anything runs.


@pytest.mark.parametrize(
    ("kv_heads", "programs", "group"), [(1, 7, 4), (2, 5, 3), (3, 132, 1), (8, 132, 8), (1, 132, 8)]
)
@pytest.mark.parametrize("window", [None, 100])
def test_every_block_is_computed_once(kv_heads: int, programs: int, group: int, window: int | None):
    counts, lengths = np.array([1, 0, 90, 1, 7]), np.array([1, 50, 90, 3000, 131])
    starts = np.concatenate([[0], np.cumsum(counts)])
    rows, tokens = gpu_plan.item_shape(128, 5, group)
    items = gpu_plan.most_items(128, 5, tokens)
    form = gpu_plan.Form(items, rows, tokens, group, kv_heads, 64, 32, 64, programs, True, window)
    made = jax.tree.map(np.asarray, gpu_plan.plan(form, *(jnp.asarray(x, jnp.int32) for x in (lengths, starts, 4))))
    of, share = jax.tree.map(np.asarray, gpu_plan.parts(form, made)), int(made.share)
    seen, numbers = set(), {}
    for program in range(programs):
        for pair in range(made.pairs.first[program], made.pairs.end[program]):
            item, head = divmod(int(pair), kv_heads)
            line = int(made.items.before[item] * kv_heads + head * made.items.blocks[item]) - program * share
            found = range(max(-line, 0), min(int(made.items.blocks[item]), share - line))
            assert len(found)
            numbers.setdefault((item, head), []).append(pair + program)
            assert not seen & {(item, head, block) for block in found}
            seen |= {(item, head, block) for block in found}
    assert len(seen) == made.items.blocks.sum() * kv_heads
    for (item, head), units in numbers.items():
        assert units == list(range(of.first[item, head], of.first[item, head] + of.number[item, head]))
        assert len(units) <= form.most_parts
    assert len(numbers) == np.sum(of.number > 0)
    every = [unit for units in numbers.values() for unit in units]
    assert len(every) == len(set(every))
    assert max(every) < form.num_units
    for item in range(items):
        if made.taken[item]:
            last = made.items.position[item] + made.taken[item] - 1
            assert made.items.end[item] == last + 1
            assert made.items.first[item] <= (0 if window is None else max(0, made.items.position[item] - window + 1))
    assert made.taken.sum() == counts[:4].sum()


def arguments(heads=8, kv_heads=2, head_dim=128, page_size=64, dtype="bfloat16", pages="bfloat16", tokens=4):
    q = jax.ShapeDtypeStruct((tokens, heads, head_dim), dtype)
    data = jax.ShapeDtypeStruct((9, kv_heads, 2, page_size, head_dim), pages)
    return {"q": q, "pages": KVPages(data), "block_tables": jax.ShapeDtypeStruct((3, 2), jnp.int32)}


@pytest.mark.parametrize(
    ("chip", "changed", "reason"),
    [
        (Chip("gpu", "NVIDIA A100-SXM4-80GB"), {}, "NVIDIA A100-SXM4-80GB is not a Hopper GPU and has no wgmma"),
        (H200, {"dtype": "float32"}, "takes queries of bfloat16 and float16, not float32"),
        (H200, {"pages": "int8"}, r"takes no quantised pages (int8)"),
        (H200, {"pages": "float8_e4m3fn"}, r"takes no quantised pages (float8_e4m3fn)"),
        (H200, {"pages": "float16"}, "pages of float16 and queries of bfloat16 differ"),
        (H200, {"pages": "uint16", "dtype": "float16"}, "pages of uint16 and queries of float16 differ"),
        (H200, {"head_dim": 80}, "head_dim=80 is not one of 64, 128, 256"),
        (H200, {"page_size": 48}, "page_size=48 is not one of 16, 32, 64, 128, 256"),
        (H200, {"heads": 256}, "takes up to 64 query heads a kv head, not 128"),
        (H200, {"tokens": 0}, "is empty"),
    ],
)
def test_what_it_does_not_take(chip: Chip, changed: dict, reason: str):
    assert reason in gpu.refuse(chip, arguments(**changed))


def test_what_it_takes():
    assert gpu.refuse(H200, arguments()) is None
    assert gpu.refuse(H200, arguments(pages="uint16")) is None
    assert gpu.refuse(Chip("gpu", "NVIDIA H100 80GB HBM3"), arguments(dtype="float16", pages="float16")) is None


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_head_dim_has_blocks_that_fit(head_dim: int):
    found = gpu_attend.candidates(head_dim)
    assert found
    assert all(size.stages % gpu_attend.WARPGROUPS == 0 for size in found)
    assert all(size.keys % page == 0 or page % size.keys == 0 for size in found for page in gpu.PAGE_SIZES)
