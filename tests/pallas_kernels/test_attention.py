"""Attention against float64 numpy: every mask, every offset, both passes, both implementations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention
from pallas_kernels.attention import xla
from tests.pallas_kernels import naive
from tests.pallas_kernels.host import here, needs_compiler
from tests.tiny import relative_error

needs_bfloat16 = pytest.mark.skipif(bool(here.missing) or here.tiles, reason="bfloat16 is XLA's on this machine")

GRADIENTS = ("dq", "dk", "dv", "d_sinks", "d_bias")


class Case(NamedTuple):
    """One call; sizes of few values, since each combination is compiled anew."""

    batch: int = 2
    queries: int = 7
    keys: int = 7
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 4
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    segments: bool = False
    offset: str = "static"  # static | traced | per_sequence
    start: int = 0  # of the queries among the keys
    sinks: bool = False
    slopes: bool = False
    bias: str = ""  # "", "11", "b1", "1n" or "bn": whether it differs between sequences and heads
    hidden: bool = False  # one key by a bias of -inf
    lse: bool = False
    seed: int = 0

    def starts(self) -> np.ndarray:
        steps = np.arange(self.batch) if self.offset == "per_sequence" else np.zeros(self.batch, int)
        return self.start + steps

    def arrays(self):
        rng = np.random.default_rng(self.seed)
        q, d_out = rng.standard_normal((2, self.batch, self.queries, self.kv_heads * self.group, self.head_dim))
        k, v = rng.standard_normal((2, self.batch, self.keys, self.kv_heads, self.head_dim))
        return [x.astype(np.float32) for x in (q, k, v, d_out)]

    def segment_ids(self):
        if not self.segments:
            return None, None
        rng = np.random.default_rng(self.seed + 1)
        ids = np.sort(rng.integers(0, 3, (self.batch, self.keys + self.queries + 8)), axis=1).astype(np.int32)
        rows = self.starts()[:, None] + np.arange(self.queries)
        return np.take_along_axis(ids, np.clip(rows, 0, ids.shape[1] - 1), axis=1), ids[:, : self.keys]

    def extras(self):
        """sinks, slopes and bias, None where there is none, and the cotangent of the log-sum-exp."""
        rng = np.random.default_rng(self.seed + 2)
        heads = self.kv_heads * self.group
        sinks, slopes = rng.standard_normal(heads), rng.uniform(0, 0.5, heads)
        bias = None
        if self.bias:
            shape = self.batch if self.bias[0] == "b" else 1, heads if self.bias[1] == "n" else 1
            bias = rng.standard_normal((*shape, self.queries, self.keys)).astype(np.float32)
            if self.hidden:
                bias[..., -1] = -np.inf
        d_lse = rng.standard_normal((self.batch, heads, self.queries)).astype(np.float32) if self.lse else None
        return sinks.astype(np.float32) if self.sinks else None, slopes if self.slopes else None, bias, d_lse

    def expected(self) -> dict[str, np.ndarray]:
        q_ids, kv_ids = self.segment_ids()
        seen = naive.sees(
            self.queries,
            self.keys,
            causal=self.causal,
            window=self.window,
            offset=self.starts(),
            q_ids=q_ids,
            kv_ids=kv_ids,
        )
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        sinks, slopes, bias, d_lse = self.extras()
        found = naive.everything(
            *self.arrays(),
            seen,
            scale=scale,
            softcap=self.softcap,
            sinks=sinks,
            slopes=slopes,
            offset=self.starts(),
            bias=bias,
            d_lse=d_lse,
        )._asdict()
        if bias is not None:
            broadcast = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
            found["d_bias"] = found["d_bias"].sum(axis=broadcast, keepdims=True)
        return found

    def computed(self, implementation: str | None = None, dtype=jnp.float32, split=None) -> dict[str, jax.Array]:
        """split: of q, k, v and out's cotangent over the mesh in use."""
        q_ids, kv_ids = self.segment_ids()
        q, k, v, d_out = (jax.device_put(jnp.asarray(x, dtype), split) for x in self.arrays())
        starts = jnp.asarray(self.starts(), jnp.int32)
        sinks, slopes, bias, d_lse = (None if x is None else jnp.asarray(x, jnp.float32) for x in self.extras())

        def run(q, k, v, d_out, starts, sinks, slopes, bias, d_lse):
            offset = {"static": self.start, "traced": starts[0], "per_sequence": starts}[self.offset]
            options = {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}
            options |= {"alibi_slopes": slopes, "return_lse": self.lse, "q_offset": offset}
            ids = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
            if q_ids is not None:
                ids = {name: jnp.asarray(value) for name, value in ids.items()}

            def call(q, k, v, sinks, bias):
                return attention(q, k, v, sinks=sinks, bias=bias, implementation=implementation, **options, **ids)

            result, pull = jax.vjp(call, q, k, v, sinks, bias)
            found = dict(zip(GRADIENTS, pull((d_out, d_lse) if self.lse else d_out), strict=True))
            out, lse = result if self.lse else (result, None)
            return {name: x for name, x in {"out": out, "lse": lse, **found}.items() if x is not None}

        return jax.jit(run)(q, k, v, d_out, starts, sinks, slopes, bias, d_lse)


def check(
    case: Case, implementation: str | None = None, dtype=jnp.float32, tolerance: float = 3e-6, split=None
) -> None:
    expected = case.expected()
    for name, got in case.computed(implementation, dtype, split).items():
        want = expected[name]
        assert got.dtype == (jnp.float32 if name in ("lse", "d_sinks", "d_bias") else dtype), name
        error = np.abs(np.asarray(got, np.float64) - want).max()
        scale = np.abs(want[want > -1e29]).max(initial=1.0)  # a row without keys has a log-sum-exp of -1e30
        if name == "lse":
            error = np.abs(np.where(want > -1e29, np.asarray(got, np.float64) - want, 0)).max()
            np.testing.assert_array_equal(np.asarray(got) < -1e29, want < -1e29)
        assert error <= tolerance * scale, f"{name} is off by {error:.2e}"


CASES = st.builds(
    Case,
    batch=st.sampled_from([1, 3]),
    queries=st.sampled_from([1, 6, 11]),
    keys=st.sampled_from([1, 9, 11]),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    head_dim=st.just(4),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3, 20]),
    softcap=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([None, 0.7]),
    segments=st.booleans(),
    offset=st.sampled_from(["static", "traced", "per_sequence"]),
    start=st.integers(-3, 12),
    sinks=st.booleans(),
    slopes=st.booleans(),
    bias=st.sampled_from(["", "", "11", "b1", "1n", "bn"]),
    hidden=st.booleans(),
    lse=st.booleans(),
    seed=st.integers(0, 100),
)


@settings(max_examples=60)
@given(case=CASES, few=st.sampled_from([0, 8]), scores=st.sampled_from([1, 80, 2**18]))
def test_xla_equals_numpy_in_both_passes(case, few, scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "BLOCK_Q", 4)  # so that these few queries are several blocks, the last one not full
        patch.setattr(xla, "FEW_QUERIES", few)
        patch.setattr(xla, "CPU_SCORES", scores)  # so that they go a head at a time, or a few, or all at once
        check(case, "xla")


@needs_compiler
@settings(max_examples=60)
@given(
    case=CASES,
    queries=st.sampled_from([9, 64, 70]),  # a block has 64, and 96 keys
    keys=st.sampled_from([1, 70, 200]),
    head_dim=st.sampled_from([3, 16, 40]),
    start=st.integers(-20, 140),
    window=st.sampled_from([None, 1, 40, 150]),
)
def test_the_host_processor_s_kernel_equals_numpy_in_both_passes(case, **sizes):
    check(case._replace(slopes=False, bias="", **sizes), "cpu")


@pytest.mark.compat
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(queries=3, keys=9, start=6, window=4, softcap=2.0, scale=0.3),
        Case(segments=True, group=1, offset="per_sequence", start=1, keys=11),
        Case(causal=False, window=3, offset="traced"),
        Case(queries=9, keys=9, sinks=True, slopes=True, lse=True, start=-2),
        Case(queries=9, keys=9, bias="1n", hidden=True, softcap=2.0),
    ],
    ids=["plain", "window-softcap", "segments-offsets", "not-causal", "sinks-slopes-lse", "bias"],
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_both_implementations_equal_numpy(case, implementation):
    check(case, implementation)


@pytest.mark.compat
def test_the_default_block_size_is_crossed():
    check(Case(batch=1, queries=xla.BLOCK_Q + 22, keys=xla.BLOCK_Q + 22, kv_heads=1, window=40), "xla")


@pytest.mark.parametrize("implementation", ["xla", pytest.param("cpu", marks=needs_bfloat16)])
def test_bfloat16_keeps_its_own_precision(implementation):
    check(Case(queries=11, keys=11, softcap=2.0), implementation, dtype=jnp.bfloat16, tolerance=2e-2)


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize("offset", ["static", "traced"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(offset, implementation, few, monkeypatch):
    monkeypatch.setattr(xla, "FEW_QUERIES", few)
    case = Case(queries=6, keys=6, start=-3, offset=offset)  # the first three stand before every key
    out, dq, dk, dv = (np.asarray(case.computed(implementation)[name]) for name in ("out", "dq", "dk", "dv"))
    assert not out[:, :3].any() and out[:, 3:].all()
    assert not dq[:, :3].any()
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


def test_large_scores_do_not_overflow():
    q = jnp.full((1, 4, 1, 4), 1e3)
    out = attention(q, q, jnp.ones_like(q))
    np.testing.assert_allclose(out, np.ones(q.shape), rtol=1e-6)


def test_a_static_offset_leaves_out_keys_that_no_query_sees(monkeypatch):
    """About half of the products of a causal call, by XLA's own count."""
    monkeypatch.setattr(xla, "BLOCK_Q", 32)
    x = jnp.ones((1, 256, 1, 32))

    def flops(**options) -> float:
        return (
            jax.jit(lambda q: attention(q, q, q, implementation="xla", **options))
            .lower(x)
            .compile()
            .cost_analysis()["flops"]
        )

    whole, causal, local = flops(causal=False), flops(), flops(window=32)
    assert 0.5 < causal / whole < 0.65
    assert local / whole < 0.3


IDS = np.zeros((2, 3), np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 3, 4)}, r"attention takes q \[B,T,N,H\]"),
        ({"v": (2, 5, 2, 8)}, r"attention takes q \[B,T,N,H\] and k, v"),
        ({"q": (1, 3, 4, 8)}, "differ in batch or head_dim"),
        ({"q": (2, 3, 4, 6)}, "differ in batch or head_dim"),
        ({"q": (2, 3, 5, 8)}, "num_heads=5 is not a multiple of num_kv_heads=4"),
        ({"q_segment_ids": IDS}, "give both q_segment_ids and kv_segment_ids"),
        ({"q_segment_ids": IDS, "kv_segment_ids": IDS}, r"kv_segment_ids \(2, 3\) is not \(2, 7\)"),
        ({"sinks": jnp.zeros(3)}, r"sinks \(3,\) is not \(4,\), one for each head"),
        ({"alibi_slopes": jnp.zeros((2, 4))}, r"alibi_slopes \(2, 4\) is not \(4,\), one for each head"),
        ({"bias": jnp.zeros((2, 2, 3, 7))}, r"bias \(2, 2, 3, 7\) is not \(2, 4, 3, 7\), of which the first two"),
        ({"bias": jnp.zeros((3, 7))}, r"bias \(3, 7\) is not \(2, 4, 3, 7\)"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"implementation": "magic"}, "'magic' of attention is not known; use one of tpu, gpu, cpu, xla, reference"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused(changes, message):
    shapes = {"q": (2, 3, 4, 8), "k": (2, 7, 4, 8), "v": (2, 7, 4, 8)}
    options = {name: value for name, value in changes.items() if name not in shapes}
    arrays = {name: jnp.zeros(changes.get(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        attention(**arrays, **options)


@pytest.mark.parametrize("bias", ["", "1n", "b1"])
@pytest.mark.usefixtures("eight_devices")
def test_on_a_mesh_each_device_takes_its_sequences_and_heads(bias):
    """Explicit axes; heads are split as far as those of the keys allow."""
    case = Case(queries=12, keys=12, sinks=True, slopes=True, bias=bias, segments=True, offset="per_sequence", lse=True)
    axes = (AxisType.Explicit,) * 2
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=axes, devices=jax.devices()[:4])):
        check(case, split=P("data", None, "tensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 64])
def test_on_a_gpu_in_bfloat16(window):
    case = Case(queries=192, keys=192, head_dim=64, group=4, window=window, softcap=20.0)
    expected = case.expected()
    for name, got in case.computed(dtype=jnp.bfloat16).items():
        assert relative_error(got, expected[name]) < 2e-2, name
