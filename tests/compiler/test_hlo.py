"""What is read off and counted in the text of compiled programs, against other ways of counting.

The files beside this one are what compilers made of small programs (TPU: jax 0.10, v5e:2x2 and v5p:2x2x1), without
the tables of source lines and most of the configuration:

- tpu_scan: six layers of x[2048, 2048] @ all_gather(w[1024, 2048]), batch and weights split over "fsdp"
- tpu_async_scan: six layers of tanh(x[4096, 4096] @ all_gather(a[2048, 8192])) @ all_gather(b[8192, 2048])
- tpu_gather_scatter: x[512, 1024] @ all_gather(w[512, 512], "fsdp"), then a reduce-scatter over "tensor", float32
- gpu_scan (jax 0.11, H200): six layers of y = x[4096, 2048] @ w[2048, 2048], tanh(y) the next x and every y kept
- tpu_batched_dot: einsum("bqhd,bkhd->bhqk") of [8, 128, 4, 64] and [8, 256, 4, 64]
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compiler import hlo
from llmos_jax.compiler.hlo_collectives import axes_of, replica_groups
from llmos_jax.compiler.hlo_cost import cost, count, loops, schedule
from llmos_jax.compiler.hlo_loops import trip_count
from llmos_jax.config import MeshConfig, UserError
from llmos_jax.train.step import train_program
from tests import tiny

MESH = {"fsdp": 2, "tensor": 2}


def stored(name: str) -> hlo.Module:
    return hlo.parse((Path(__file__).parent / f"{name}.hlo.txt").read_text())


def compiled(function, *args) -> hlo.Module:
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def body(module: hlo.Module) -> hlo.Computation:
    [(_, inside, _)] = loops(module)
    return inside


# ------------------------------------------------------------------------------------------------------------ reading


def test_shapes_layouts_and_memory_spaces():
    entry = stored("tpu_scan").entry
    start = entry["copy-start.1"]
    assert [s.space for s in start.shapes] == [1, hlo.HBM, 2] and [s.dtype for s in start.shapes] == [
        "bf16",
        "bf16",
        "u32",
    ]
    assert start.shapes[0].dims == (2048, 2048) and start.shapes[0].bytes == 2048 * 2048 * 2
    assert start.operands == ("param.4",) and entry.users["copy-start.1"] == (entry["copy-done.1"],)
    assert [p.name for p in entry.parameters] == ["param.4", "param.5"]
    assert entry.root.name == "copy-done" and entry.root.is_root


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        (hlo.Shape("f32", (3, 100), (1, 0), (8, 128)), 8 * 128 * 4),
        (hlo.Shape("f32", (3, 100), (0, 1), (8, 128)), 104 * 128 * 4),  # transposed: 100 rows of 3
        (hlo.Shape("bf16", (2, 17, 128), (2, 1, 0), (8, 128)), 2 * 24 * 128 * 2),
        (hlo.Shape("s4", (5,), (0,)), 3),
        (hlo.Shape("f8e4m3fn", (10, 10), (1, 0)), 100),
        (hlo.Shape("f32", (), (), (128,)), 512),
    ],
)
def test_padding_to_tiles(shape: hlo.Shape, padded: int):
    assert shape.padded_bytes == padded


def test_names_places_and_aliases():
    def step(x, y):
        with jax.named_scope("attention"):
            return x @ x, y + 1

    text = jax.jit(step, donate_argnums=1).lower(jnp.ones((64, 64)), jnp.ones((64, 8))).compile().as_text()
    module = hlo.parse(text)
    assert module.aliases == {(1,): 1}
    dots = [i for c in module.computations.values() for i in c if i.op_name.endswith("attention/dot_general")]
    assert dots and all(Path(__file__).name in module.source(dot) for dot in dots)


def test_what_is_not_a_module_is_refused():
    with pytest.raises(UserError, match="this is not the text of a compiled module"):
        hlo.parse("module @jit_f {}")
    with pytest.raises(UserError, match="no ENTRY"):
        hlo.parse("HloModule jit_f\n")


# -------------------------------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize("length", [2, 8, 80])
def test_trip_counts_where_the_compiler_says_them_and_where_not(length: int):
    module = compiled(lambda x: jax.lax.fori_loop(0, length, lambda i, s: jnp.sin(s) @ s, x), jnp.ones((8, 8)))
    [(loop, _, trips)] = loops(module)
    assert trips == length
    text = loop.attributes
    unsaid = hlo.Instruction(loop.name, "while", loop.result, loop.operands, loop.text, text.replace("known_trip", "x"))
    module.entry.instructions[loop.name] = unsaid
    assert "known_trip_count" in text and trip_count(module, unsaid) == length


LOOP = """HloModule loop

%body (s: (s32[], s32[])) -> (s32[], s32[]) {{
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %step = s32[] constant({step})
  %next = s32[] {op}(%i, %step)
  ROOT %out = (s32[], s32[]) tuple(%next, %n)
}}

%test (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %cmp = pred[] compare(%a, %b), direction={direction}
}}

%cond (s: (s32[], s32[])) -> pred[] {{
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %fused = pred[] fusion(%i, %n), kind=kLoop, calls=%test
}}

ENTRY %main (x: s32[]) -> s32[] {{
  %x = s32[] parameter(0)
  %start = s32[] constant({start})
  %moved = s32[]{{:T(128)S(6)}} copy(%start)
  %limit = s32[] {limit}
  %init = (s32[], s32[]) tuple(%moved, %limit)
  %loop = (s32[], s32[]) while(%init), condition=%cond, body=%body
  ROOT %r = s32[] get-tuple-element(%loop), index=0
}}
"""


@pytest.mark.parametrize(
    ("start", "op", "step", "direction", "limit", "trips"),
    [
        (0, "add", 1, "LT", "constant(80)", 80),
        (0, "add", 3, "LE", "constant(9)", 4),
        (9, "subtract", 2, "GT", "constant(0)", 5),
        (7, "add", -1, "NE", "constant(0)", 7),
        (5, "add", 1, "LT", "constant(5)", 0),
        (1, "multiply", 2, "LT", "constant(100)", 7),
        (0, "add", 1, "LT", "copy(%x)", None),  # the bound is data
        (0, "add", 0, "LT", "constant(1)", None),  # never ends
    ],
)
def test_counters_of_any_form(start, op, step, direction, limit, trips):
    module = hlo.parse(LOOP.format(start=start, op=op, step=step, direction=direction, limit=limit))
    assert trip_count(module, module.entry["loop"]) == trips


def test_a_loop_of_data_is_counted_once_and_named():
    def halve(x):
        return jax.lax.while_loop(lambda s: s.sum() > 3, lambda s: (s @ s) * 0.5, x)

    total = cost(compiled(halve, jnp.ones((16, 16))))
    assert total.flops == 2 * 16**3 and [what.split(" while")[0] for what in total.unknown] == ["trips of the loop"]


# -------------------------------------------------------------------------------------------------------------- FLOPs


def kernel_flops(call) -> float:
    """Of a call of our own: it says so itself, or is the product of two matrices."""
    said = dict(call.params["attributes"]).get("flops")
    sizes = [float(x.aval.size) for x in (*call.invars[:2], call.outvars[0])]
    return 2.0 * np.sqrt(np.prod(sizes)) if said is None else float(said)


def jaxpr_flops(jaxpr, times: float = 1.0) -> float:
    """Of the matrix products, over all devices, from the program before the compiler had it."""
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        inner = times
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), shape = params["dimension_numbers"], equation.invars[0].aval.shape
            total += times * 2.0 * equation.outvars[0].aval.size * np.prod([shape[d] for d in contracted])
        elif equation.primitive.name == "ffi_call":
            total += times * kernel_flops(equation)
        elif equation.primitive.name == "scan":
            inner = times * params["length"]
        elif equation.primitive.name == "shard_map":
            inner = times * params["mesh"].size
        for value in params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    total += jaxpr_flops(part, inner)
    return total


def train_step(axes: dict[str, int], base=tiny.DENSE, accumulate: int = 1, **model):
    config = tiny.run(tiny.model(base, **model), mesh=MeshConfig(**{"fsdp": 1, **axes}), accumulate=accumulate)
    return train_program(config, tiny.mesh(**axes))


def both_counts(program) -> tuple[float, float]:
    """FLOPs of one device by the text, and by the traced program."""
    with jax.set_mesh(program.mesh):
        number = len(program.static)
        traced = jax.jit(program.function, static_argnums=tuple(range(number))).trace(*program.static, *program.args)
        module = hlo.parse(program.lower().compile().as_text())
    total = cost(module)
    assert not total.unknown
    return total.flops, jaxpr_flops(traced.jaxpr.jaxpr) / program.mesh.size


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(
    "options",
    [
        {"remat": "none"},
        {"remat": "full"},
        {"remat": "none", "scan_layers": False},
        {"remat": "full", "accumulate": 2},
    ],
)
def test_flops_of_a_train_step(options):
    # A wide MLP: the compiler drops a product of attention's backward pass that it finds in the forward pass.
    counted, traced = both_counts(train_step({"fsdp": 2, "tensor": 2}, num_layers=4, mlp_dim=2048, **options))
    assert counted == pytest.approx(traced, rel=0.01)


def test_scanned_and_unrolled_layers_take_the_same():
    scanned, unrolled = (
        both_counts(train_step({"fsdp": 1}, mlp_dim=2048, scan_layers=scan))[0] for scan in (True, False)
    )
    assert scanned == pytest.approx(unrolled, rel=0.01)


@pytest.mark.parametrize("branches", [(jnp.dot, jnp.subtract), (jnp.dot, jnp.subtract, jnp.add)])
def test_a_conditional_costs_its_dearest_branch(branches):
    """Of two the text names the branches alone, of more in a list."""
    x = jnp.ones((64, 64))
    module = compiled(lambda which, x: jax.lax.switch(which, branches, x, x), 0, x)
    text = next(i for c in module.computations.values() for i in c if i.opcode == "conditional")
    assert len(text.calls) == len(branches)
    assert cost(module).flops == pytest.approx(2 * 64**3, rel=0.05)


def test_a_batched_product_on_a_tpu():
    assert cost(stored("tpu_batched_dot")).flops == 2 * 8 * 4 * 128 * 256 * 64


@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((2, 9, 3), (4, 3, 5), {"window_strides": (2,), "padding": [(1, 2)]}),
        ((2, 9, 3), (4, 3, 5), {"window_strides": (1,), "padding": [(3, 3)], "lhs_dilation": (2,)}),
        (
            (2, 9, 4),
            (3, 2, 6),
            {"window_strides": (1,), "padding": "VALID", "rhs_dilation": (2,), "feature_group_count": 2},
        ),
    ],
)
def test_convolutions_count_what_is_multiplied(x, w, options):
    """Ones convolved with ones: each output is the number of products it takes."""

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=("NHC", "HIO", "NHC"), **options)

    products = float(convolve(jnp.ones(x), jnp.ones(w)).sum())
    text = jax.jit(convolve).lower(jnp.ones(x), jnp.ones(w)).compile().as_text()
    assert cost(hlo.parse(text)).flops == 2 * products


def test_kernels_say_what_they_cost_or_are_named():
    text = """HloModule k

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %said.1 = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"QQ==","cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"77"}}}
  ROOT %silent.2 = f32[8,128]{1,0} custom-call(%said.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"QQ=="}}
}
"""  # noqa: E501
    total = cost(hlo.parse(text))
    assert total.flops == 1000 and total.bytes == 77 + 2 * 8 * 128 * 4
    assert total.unknown == {"FLOPs of the kernel silent": 1}


# -------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_of_a_scanned_layer_are_a_slice_and_what_stays_in_vmem_is_free():
    module = stored("tpu_scan")
    steps = {step.name: step for step in schedule(module, body(module))}
    weight = 1024 * 2048 * 2  # one layer's shard, of six; the slice lands in VMEM, and so does all that follows
    assert steps["constant_dynamic-slice_fusion.2"].bytes == pytest.approx(weight, abs=64)
    assert steps["fusion.11"].bytes == steps["all-gather.7"].bytes == steps["copy.14"].bytes == 0
    assert cost(module).bytes == pytest.approx(6 * weight + 2 * 2048 * 2048 * 2, rel=1e-4)  # x in and out


def test_bytes_of_slices_on_streams_of_their_own():
    """A GPU's `fusion-start` has its operands beside its results: the stack is neither read nor written whole."""
    x, w = 4096 * 2048 * 2, 2048 * 2048 * 2
    layers = 6 * (6 * x + 3 * w)  # slice w, multiply, tanh, keep y
    assert layers <= cost(stored("gpu_scan")).bytes <= layers + 6 * x + 3 * x  # and zeros for the stack, and the ends


def test_bytes_of_an_update_in_place():
    def put(cache, new, at):
        return jax.lax.dynamic_update_slice(cache, new, (at, 0))

    args = (jnp.zeros((4096, 64)), jnp.ones((2, 64)), jnp.int32(7))
    text = jax.jit(put, donate_argnums=0).lower(*args).compile().as_text()
    assert cost(hlo.parse(text)).bytes <= 3 * 2 * 64 * 4 + 64


# -------------------------------------------------------------------------------------------------------- collectives


def groups(text: str, devices: int = 8) -> list[list[int]]:
    op = hlo.Instruction("x", "all-gather", (), (), "", f"channel_id=1, {text}, dimensions={{0}}")
    return replica_groups(op, devices).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=[4,2]<=[2,2,2]T(1,0,2)", [[0, 1], [4, 5], [2, 3], [6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_every_notation(text: str, expected: list[list[int]]):
    assert sorted(groups(text)) == sorted(expected)


def test_axes_of_every_partition_of_a_mesh():
    shape = {"data": 2, "fsdp": 4, "one": 1, "tensor": 3}
    devices = np.arange(24).reshape(tuple(shape.values()))
    names = list(shape)
    for picked in range(16):
        chosen = [i for i in range(4) if picked >> i & 1]
        rest = [i for i in range(4) if i not in chosen]
        size = int(np.prod([devices.shape[i] for i in chosen], initial=1))
        partition = devices.transpose(rest + chosen).reshape(-1, size)
        expected = tuple(names[i] for i in chosen if devices.shape[i] > 1)
        assert axes_of(partition[:, ::-1], shape) == expected
    assert axes_of(np.arange(24).reshape(12, 2), shape) is None  # a part of an axis
    assert axes_of(np.arange(8).reshape(4, 2), shape) is None  # another number of devices


def test_collectives_of_stored_programs():
    module = stored("tpu_gather_scatter")
    assert count(module, MESH) == {("all-gather", ("fsdp",)): 1, ("reduce-scatter", ("tensor",)): 1}
    gather, scatter = sorted((c for c, _ in cost(module).collectives), key=lambda c: c.kind)
    # The product takes bfloat16 on this chip, and the compiler converts before it sends.
    assert gather.dtype == "bf16" and gather.bytes == 1024 * 512 * 2 and not gather.asynchronous
    assert scatter.dtype == "f32" and scatter.bytes == 512 * 512 * 4 and scatter.group_size == 2


def test_an_asynchronous_collective_is_counted_once_at_its_start():
    module = stored("tpu_async_scan")
    inside = body(module)
    assert count(module, MESH, inside) == {("all-gather", ("fsdp",)): 2}
    steps = schedule(module, inside)
    by_kind = {kind: [s for s in steps if s.kind == kind] for kind in {s.kind for s in steps}}
    [start], [done] = by_kind["collective-start"], by_kind["collective-done"]
    [carried] = [s for s in by_kind["compute"] if s.start]
    assert done.start == carried.start == start.name and start.collective.asynchronous
    assert steps.index(start) < steps.index(carried) < steps.index(done)
    assert carried.flops == 2 * 4096 * 4096 * 8192 and done.flops == start.flops == 0
    assert start.collective.bytes == 8192 * 4096 * 2
    assert [(c.kind, times) for c, times in cost(module).collectives] == [("all-gather", 6)] * 2
    assert cost(module).flops == 6 * 2 * 2 * 4096 * 4096 * 8192


def test_copies_between_memories_name_their_start():
    module = stored("tpu_scan")
    steps = {step.name: step for step in schedule(module, module.entry)}
    assert steps["copy-done.1"].kind == "copy-done" and steps["copy-done.1"].start == "copy-start.1"
    assert steps["copy-start.1"].bytes == 2048 * 2048 * 2  # HBM is read, VMEM written
    assert steps["while.10"].kind == "control" and steps["while.10"].trips == 6


def test_cycles_are_summed_over_the_trips():
    module = stored("tpu_scan")
    one = sum(step.cycles or 0 for step in schedule(module, body(module)))
    assert one > 0 and cost(module).cycles == 6 * one


@pytest.mark.usefixtures("eight_devices")
def test_a_layer_gathers_each_weight_once():
    mesh = tiny.mesh(fsdp=4, tensor=2)

    def forward(x, w):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None

        return jax.lax.scan(layer, x, w)[0]

    spec = jax.sharding.PartitionSpec
    mapped = jax.shard_map(
        forward, mesh=mesh, in_specs=(spec("fsdp"), spec(None, "fsdp")), out_specs=spec("fsdp"), check_vma=False
    )
    x, w = jnp.ones((8, 64)), jnp.ones((5, 64, 64))
    module = compiled(mapped, x, w)
    shape = dict(mesh.shape)
    assert count(module, shape, body(module)) == {("all-gather", ("fsdp",)): 1}
    [(gather, times)] = cost(module).collectives
    assert times == 5 and gather.bytes == 64 * 64 * 4 and gather.axes(shape) == ("fsdp",)
