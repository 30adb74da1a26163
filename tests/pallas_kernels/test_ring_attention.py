"""Ring attention: the plan of pieces in plain numbers, then the real thing on simulated devices against numpy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention
from pallas_kernels.ring_attention import ring
from pallas_kernels.ring_attention.api import ring_attention
from pallas_kernels.ring_attention.order import unzigzag, zigzag
from pallas_kernels.ring_attention.plan import Plan
from tests.pallas_kernels import naive


def positions(order: str, device: int, parts: int, length: int) -> np.ndarray:
    """Where in the sequence stands what a device holds."""
    if order == "contiguous":
        return device * length + np.arange(length)
    half = np.arange(length // 2)
    return np.concatenate([device * (length // 2) + half, (2 * parts - 1 - device) * (length // 2) + half])


@pytest.mark.compat
@given(
    order=st.sampled_from(["zigzag", "contiguous"]),
    parts=st.integers(1, 5),
    half=st.integers(1, 4),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 30)),
)
def test_the_pieces_are_the_mask_each_pair_once(order, parts, half, causal, window):
    plan = Plan(order, parts, 2 * half, causal, window)
    for device in range(parts):
        rows = positions(order, device, parts, plan.length)
        for step in range(parts):
            keys = positions(order, (device - step) % parts, parts, plan.length)
            computed = np.zeros((plan.length, plan.length), int)
            for piece in plan.pieces(device, step) if step < plan.num_steps else []:
                if not piece.when:
                    continue
                shape = piece.queries.stop - piece.queries.start, piece.keys.stop - piece.keys.start
                seen = naive.sees(*shape, causal=piece.causal, window=piece.window, offset=[piece.offset])
                computed[piece.queries, piece.keys] += seen[0]
            distance = rows[:, None] - keys
            seen = ~((causal & (distance < 0)) | (distance >= (window or 10**9)))
            np.testing.assert_array_equal(computed, seen)


def work(plan: Plan, device: int, step: int) -> float:
    """Pairs of a query and a key, half of them under a causal mask."""
    sizes = [
        (piece.queries.stop - piece.queries.start) * (piece.keys.stop - piece.keys.start) / (2 if piece.causal else 1)
        for piece in plan.pieces(device, step)
        if piece.when
    ]
    return sum(sizes)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_in_zigzag_order_every_device_has_the_same_work_in_every_step(parts):
    plan = Plan("zigzag", parts, 8, causal=True, window=None)
    for step in range(parts):
        assert {work(plan, device, step) for device in range(parts)} == {32}  # half of the 64 pairs
    contiguous = plan._replace(order="contiguous")
    steps = [[work(contiguous, device, step) for device in range(parts)] for step in range(parts)]
    assert sum(map(max, steps)) / sum(work(plan, 0, step) for step in range(parts)) == (2 * parts - 1) / parts


def test_a_window_in_contiguous_order_ends_the_ring_early():
    assert Plan("contiguous", 8, 16, causal=True, window=1).num_steps == 1
    assert Plan("contiguous", 8, 16, causal=True, window=17).num_steps == 2
    assert Plan("contiguous", 8, 16, causal=True, window=18).num_steps == 3
    assert Plan("contiguous", 8, 16, causal=False, window=2).num_steps == 8


@pytest.mark.compat
@pytest.mark.parametrize(("parts", "half", "axis"), [(1, 1, 0), (3, 2, 1), (4, 3, -1)])
def test_zigzag_puts_on_a_device_an_early_and_a_late_chunk(parts, half, axis):
    shape = [2, 2, 2]
    shape[axis] = 2 * parts * half
    index = np.arange(2 * parts * half).reshape([-1 if at == axis % 3 else 1 for at in range(3)])
    x = jnp.asarray(np.broadcast_to(index, shape))
    ordered = jax.jit(zigzag, static_argnums=(1, 2))(x, axis, parts)
    want = np.concatenate([positions("zigzag", device, parts, 2 * half) for device in range(parts)])
    np.testing.assert_array_equal(np.moveaxis(np.asarray(ordered), axis, 0)[:, 0, 0], want)
    np.testing.assert_array_equal(jax.jit(unzigzag, static_argnums=(1, 2))(ordered, axis, parts), x)
    with pytest.raises(ValueError, match="does not split into 14 chunks, two for each part"):
        zigzag(x, axis, 7)


class Case(NamedTuple):
    parts: int = 4
    order: str = "zigzag"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    segments: bool = False
    sinks: bool = False
    lse: bool = False
    length: int = 32
    heads: int = 4
    kv_heads: int = 2

    def arrays(self):
        """q, k, v, segment ids, sinks and the cotangents of out and lse, in the order of the sequence."""
        rng = np.random.default_rng(0)
        q, d_out = rng.standard_normal((2, 2, self.length, self.heads, 4)).astype(np.float32)
        k, v = rng.standard_normal((2, 2, self.length, self.kv_heads, 4)).astype(np.float32)
        ids = np.sort(rng.integers(0, 3, (2, self.length)), axis=1).astype(np.int32) if self.segments else None
        sinks = rng.standard_normal(self.heads).astype(np.float32) if self.sinks else None
        d_lse = rng.standard_normal((2, self.heads, self.length)).astype(np.float32) if self.lse else None
        return q, k, v, ids, sinks, d_out, d_lse

    def expected(self) -> dict[str, np.ndarray]:
        q, k, v, ids, sinks, d_out, d_lse = self.arrays()
        seen = naive.sees(
            *(self.length, self.length), causal=self.causal, window=self.window, offset=[0, 0], q_ids=ids, kv_ids=ids
        )
        options = {"scale": 4**-0.5, "softcap": self.softcap, "sinks": sinks, "d_lse": d_lse}
        return naive.everything(q, k, v, d_out, seen, **options)._asdict()

    def on_devices(self, check_vma: bool = True, **options):
        """ring_attention(q, k, v, ids, sinks) of whole arrays in the order of the devices."""
        shape = 2 if self.parts == 3 else 1, self.parts  # now and then the batch is split too
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, ("data", "context"), axis_types=(AxisType.Auto,) * 2, devices=devices)

        def local(q, k, v, ids, sinks):
            return ring_attention(
                *(q, k, v),
                axis_name="context",
                order=self.order,
                causal=self.causal,
                window=self.window,
                segment_ids=ids,
                softcap=self.softcap,
                sinks=sinks,
                return_lse=True,
                **options,
            )

        split = P("data", "context")
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(split, split, split, split, P()),
            out_specs=(split, P("data", None, "context")),
            check_vma=check_vma,
        )

    def sharded(self, **options):
        """The same in the order of the sequence."""
        run = self.on_devices(**options)

        def whole(q, k, v, ids, sinks):
            if self.order == "contiguous":
                return run(q, k, v, ids, sinks)
            ordered = jax.tree.map(lambda x: zigzag(x, 1, self.parts), (q, k, v, ids))
            out, lse = run(*ordered, sinks)
            return unzigzag(out, 1, self.parts), unzigzag(lse, 2, self.parts)

        return whole

    def computed(self, **options) -> dict[str, jax.Array]:
        function = self.sharded(**options)

        @jax.jit
        def run(q, k, v, ids, sinks, d_out, d_lse):
            (out, lse), pull = jax.vjp(lambda q, k, v, sinks: function(q, k, v, ids, sinks), q, k, v, sinks)
            gradients = pull((d_out, jnp.zeros_like(lse) if d_lse is None else d_lse))
            return dict(zip(("out", "lse", "dq", "dk", "dv", "d_sinks"), (out, lse, *gradients), strict=True))

        return {name: x for name, x in run(*self.arrays()).items() if x is not None}


def check(case: Case, **options) -> None:
    expected = case.expected()
    for name, got in case.computed(**options).items():
        np.testing.assert_allclose(got, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


CASES = {
    "plain": Case(),
    "contiguous": Case(order="contiguous", sinks=True),
    "eight": Case(parts=8, segments=True, lse=True, sinks=True),
    "not-causal": Case(parts=3, length=24, causal=False, softcap=2.0),
    "window": Case(window=6, softcap=1.5, lse=True),
    "window-not-causal": Case(parts=3, length=24, window=6, causal=False, segments=True),
    "contiguous-window": Case(parts=8, order="contiguous", window=11, segments=True),
    "contiguous-window-not-causal": Case(parts=3, length=24, order="contiguous", window=11, causal=False),
    "alone": Case(parts=1, window=9),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("eight_devices")
def test_equals_numpy_over_the_whole_sequence_gradients_included(case):
    check(case)


@pytest.mark.compat
@pytest.mark.usefixtures("eight_devices")
def test_without_the_checks_of_what_varies():
    """As under `check_vma=False`, which kernels ask for."""
    check(Case(sinks=True), check_vma=False)


@pytest.mark.parametrize("case", [Case(sinks=True, window=9), Case(order="contiguous", segments=True)])
@pytest.mark.usefixtures("eight_devices")
def test_the_reference_gathers_everything(case):
    check(case, implementation="reference")


@pytest.mark.parametrize(
    ("case", "blocks"),
    [(Case(parts=2, softcap=2.0, segments=True, lse=True), None), (Case(parts=3, length=24), ["reference", "xla"])],
    ids=["xla", "reference"],
)
@pytest.mark.usefixtures("eight_devices")
def test_a_block_implementation_without_a_backward_of_its_own_is_recomputed(case, blocks, monkeypatch):
    monkeypatch.setattr(ring, "BACKWARDS", {})
    check(case, block_implementation=blocks)


@pytest.mark.usefixtures("eight_devices")
def test_the_tpu_kernels_as_blocks():
    """Interpreted; their backward pass takes the log-sum-exp of the whole ring."""
    check(Case(parts=2, length=16, softcap=2.0, lse=True), check_vma=False, block_implementation="tpu")


@pytest.mark.usefixtures("eight_devices")
def test_bfloat16_keeps_its_own_precision():
    case = Case(softcap=2.0)
    *arrays, ids, sinks, _, _ = case.arrays()
    out, lse = jax.jit(case.sharded())(*(jnp.asarray(x, jnp.bfloat16) for x in arrays), ids, sinks)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float32), case.expected()["out"], atol=3e-2)


@pytest.mark.usefixtures("eight_devices")
def test_keys_go_from_neighbour_to_neighbour_and_are_never_gathered():
    case = Case(parts=8)
    *arrays, _, _, d_out, _ = case.arrays()

    def gradients(q, k, v, d_out):
        return jax.vjp(lambda *qkv: case.on_devices()(*qkv, None, None)[0], q, k, v)[1](d_out)

    program = str(jax.make_jaxpr(gradients)(*arrays, d_out))
    assert "ppermute" in program
    assert not any(name in program for name in ("all_gather", "all_to_all", "psum"))


@pytest.mark.usefixtures("eight_devices")
def test_the_ring_gives_what_attention_gives():
    case = Case(parts=2, sinks=True)
    q, k, v, _, sinks, _, _ = (None if x is None else jnp.asarray(x) for x in case.arrays())
    out, lse = jax.jit(case.sharded())(q, k, v, None, sinks)
    want, want_lse = attention(q, k, v, sinks=sinks, return_lse=True)
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": (2, 8, 4, 4)}, r"ring_attention takes q \[B,T,N,H\] and k, v \[B,T,K,H\]"),
        ({"q": (2, 4, 4, 4)}, "differ in batch, length or head_dim"),
        ({"q": (2, 8, 5, 4)}, "num_heads=5 is not a multiple of num_kv_heads=2"),
        ({"order": "random"}, "order='random' is not known; use zigzag or contiguous"),
        ({"q": (2, 7, 4, 4), "k": (2, 7, 2, 4), "v": (2, 7, 2, 4)}, "takes two chunks a device, but 7 positions are"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"segment_ids": np.zeros((2, 4), np.int32)}, r"segment_ids \(2, 4\) is not \(2, 8\)"),
        ({"sinks": np.zeros(3)}, r"sinks \(3,\) is not \(4,\), one for each head"),
        ({"implementation": "magic"}, "'magic' of ring_attention is not known; use one of ring, reference"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused(changes, message):
    shapes = {"q": (2, 8, 4, 4), "k": (2, 8, 2, 4), "v": (2, 8, 2, 4)}
    options = {name: value for name, value in changes.items() if name not in shapes}
    arrays = {name: jnp.zeros(changes.get(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        ring_attention(**arrays, axis_name="context", **options)
