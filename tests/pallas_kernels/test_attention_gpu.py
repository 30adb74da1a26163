"""The Hopper kernels of attention: interpreted on a CPU (real copies, barriers and turns), and on a GPU where there is one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import blocks
from pallas_kernels.attention import gpu
from pallas_kernels.dispatch import Chip
from tests.pallas_kernels import naive
from tests.tiny import relative_error

H200 = Chip("gpu", "NVIDIA H200")
GRADIENTS = ("dq", "dk", "dv", "d_sinks")


class Case(NamedTuple):
    batch: int = 1
    queries: int = 128
    keys: int = 128
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 64
    dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float = 0.2
    offset: int = 0
    segments: bool = False
    sinks: bool = False
    slopes: bool = False

    def ids(self):
        if not self.segments:
            return None, None
        rng = np.random.default_rng(1)
        kv_ids = np.sort(rng.integers(0, 3, (self.batch, self.keys)), axis=1).astype(np.int32)
        rows = np.clip(self.offset + np.arange(self.queries), 0, self.keys - 1)
        return kv_ids[:, rows], kv_ids


def check(case: Case, gradients: bool = True) -> None:
    """Output, log-sum-exp and all gradients against float64; inputs are rounded to the dtype first."""
    rng = np.random.default_rng(0)
    heads = case.kv_heads * case.group

    def drawn(*shape):
        return np.asarray(jnp.asarray(rng.standard_normal(shape), case.dtype))

    q, d_out = (drawn(case.batch, case.queries, heads, case.head_dim) for _ in range(2))
    k, v = (drawn(case.batch, case.keys, case.kv_heads, case.head_dim) for _ in range(2))
    d_lse = rng.standard_normal((case.batch, heads, case.queries)).astype(np.float32)
    sinks = rng.standard_normal(heads).astype(np.float32) if case.sinks else None
    slopes = rng.uniform(0.01, 0.1, heads).astype(np.float32) if case.slopes else None
    q_ids, kv_ids = case.ids()
    offset = [case.offset] * case.batch
    seen = naive.sees(
        case.queries, case.keys, causal=case.causal, window=case.window, offset=offset, q_ids=q_ids, kv_ids=kv_ids
    )
    options = {"scale": case.scale, "softcap": case.softcap, "sinks": sinks, "slopes": slopes}
    want = naive.everything(q, k, v, d_out, seen, offset=np.asarray(offset), d_lse=d_lse, **options)

    def run(q, k, v, sinks):
        return gpu.attention(
            q,
            k,
            v,
            causal=case.causal,
            window=case.window,
            q_offset=case.offset,
            q_segment_ids=None if q_ids is None else jnp.asarray(q_ids),
            kv_segment_ids=None if kv_ids is None else jnp.asarray(kv_ids),
            softcap=case.softcap,
            scale=case.scale,
            sinks=sinks,
            alibi_slopes=None if slopes is None else jnp.asarray(slopes),
            return_lse=True,
        )

    arguments = [jnp.asarray(x) for x in (q, k, v)] + [None if sinks is None else jnp.asarray(sinks)]
    if gradients:
        (out, lse), back = jax.vjp(jax.jit(run), *arguments)
        got = dict(zip(GRADIENTS, back((jnp.asarray(d_out), jnp.asarray(d_lse))), strict=True))
    else:
        (out, lse), got = jax.jit(run)(*arguments), {}
    tolerance = 2e-2 if case.dtype == "bfloat16" else 4e-3
    assert relative_error(out, want.out) < tolerance
    np.testing.assert_allclose(np.asarray(lse), want.lse, rtol=1e-4, atol=1e-4)
    for name, value in got.items():
        if value is not None:
            assert relative_error(value, getattr(want, name)) < tolerance, name


@pytest.mark.compat
def test_interpreted_causal_with_recycled_slots():
    """Four blocks of keys pass two slots; the first and the last block of queries differ in length."""
    with blocks.forced("attention.forward", {"keys": 64, "steps": 2}):
        check(Case(queries=72, keys=256, offset=184), gradients=False)


def test_interpreted_gradients_of_shared_keys():
    check(Case(queries=120, keys=128, group=2, sinks=True))


def test_interpreted_everything_at_once():
    check(Case(queries=40, keys=150, offset=90, window=50, softcap=3.0, segments=True, sinks=True, slopes=True))


def test_interpreted_wide_heads():
    """The gradients of k and v are a warpgroup's each."""
    check(Case(queries=70, keys=70, head_dim=256, scale=0.05))


def test_interpreted_queries_that_see_nothing():
    check(Case(queries=136, keys=64, offset=-130, dtype="float16"), gradients=False)


ON_A_GPU = [
    Case(batch=2, queries=384, keys=384, kv_heads=2, group=2, head_dim=128),
    Case(queries=300, keys=300, kv_heads=1, group=3, head_dim=64, dtype="float16"),
    Case(queries=200, keys=333, head_dim=128, causal=False, window=100, offset=50),
    Case(batch=2, queries=257, keys=500, group=2, head_dim=128, offset=243, segments=True, sinks=True),
    Case(queries=256, keys=256, group=2, head_dim=64, softcap=5.0, slopes=True, scale=-0.1),
    Case(queries=136, keys=64, offset=-130, head_dim=128),
    Case(queries=3, keys=70, offset=67, head_dim=64),
    Case(batch=2, queries=200, keys=200, group=2, head_dim=256, window=90, sinks=True, scale=0.05),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU, ids=range(len(ON_A_GPU)))
def test_on_a_gpu(case: Case):
    check(case)


@pytest.mark.gpu
def test_two_runs_are_the_same():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 1024, 4, 128), jnp.bfloat16) for key in keys)
    options = dict.fromkeys(("window", "q_segment_ids", "kv_segment_ids", "softcap")) | {"causal": True, "q_offset": 0}

    @jax.jit
    def gradients(q, k, v):
        out, back = jax.vjp(lambda *x: gpu.attention(*x, scale=0.1, **options), q, k, v)
        return back(out)

    for first, second in zip(gradients(q, k, v), gradients(q, k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def arguments(**changed):
    x = jax.ShapeDtypeStruct((1, 64, 2, changed.pop("head_dim", 64)), changed.pop("dtype", jnp.bfloat16))
    return {"q": x, "k": x, "v": x, "q_offset": 0, "bias": None} | changed


@pytest.mark.parametrize(
    ("chip", "changed", "reason"),
    [
        (Chip("gpu", "NVIDIA A100-SXM4-80GB"), {}, "NVIDIA A100-SXM4-80GB is not a Hopper GPU and has no wgmma"),
        (H200, {"dtype": jnp.float32}, "takes bfloat16 and float16, not float32"),
        (H200, {"v": jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.float16)}, "differ in dtype"),
        (H200, {"head_dim": 80}, "head_dim=80 is not one of 64, 128, 256"),
        (H200, {"q_offset": np.zeros(1, int)}, "a Python int, not an array"),
        (H200, {"bias": jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.float32)}, "takes no bias"),
        (H200, {"q": jax.ShapeDtypeStruct((1, 0, 2, 64), jnp.bfloat16)}, "is empty"),
    ],
)
def test_what_it_does_not_take(chip: Chip, changed: dict, reason: str):
    assert reason in gpu.refuse(chip, arguments(**changed))


@pytest.mark.compat
def test_what_it_takes():
    assert gpu.refuse(H200, arguments()) is None
    assert gpu.refuse(Chip("gpu", "NVIDIA H100 80GB HBM3"), arguments(head_dim=128, dtype=jnp.float16)) is None


@pytest.mark.parametrize("head_dim", gpu.HEAD_DIMS)
def test_every_head_dim_has_blocks_that_fit(head_dim: int):
    gpu_forward = pytest.importorskip("pallas_kernels.attention.gpu_forward")
    assert all(size.keys % 64 == 0 and size.steps >= 2 for size in gpu_forward.candidates(head_dim))
    assert gpu_forward.candidates(head_dim)
    assert gpu_forward.gpu_backward.candidates(head_dim, 128)
