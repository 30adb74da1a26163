"""The collectives of a training step on described TPUs, counted one by one against what the sharding should need.

A layer's weights are gathered over `fsdp` when it runs, forward and again backward (everything is recomputed), and their
gradients scattered; over `tensor`, tokens are gathered before a block and its sums scattered behind it. Anything more is
a tensor that the compiler moves because two shardings do not agree, and is found here at sizes that compile in seconds.

Counted are arrays, and the elements of each as it is whole (gathered, unreduced), wherever they have at least `LARGE`
elements. What is smaller is norm scales, segment ids, the router with its choices, and scalars: the compiler merges
those with others and moves them in and out of loops.
"""

import functools
from collections import Counter

import pytest

from llmos_jax.compiler import hlo
from llmos_jax.compiler.hlo_cost import Step, cost, loops, schedule
from llmos_jax.compiler.program import Program
from llmos_jax.compiler.target import Target
from llmos_jax.config import MESH_AXES, MeshConfig, OptimizerConfig
from llmos_jax.train.step import train_program
from tests import tiny

pytest.importorskip("libtpu")
pytestmark = pytest.mark.described

LARGE = 16_384
LAYERS, ROWS, T, D, V, N, K, H, F, E = 3, 16, 256, 256, 256, 8, 4, 128, 512, 4
SHAPE = {
    "num_layers": LAYERS,
    "vocab_size": V,
    "embed_dim": D,
    "num_heads": N,
    "num_kv_heads": K,
    "head_dim": H,
    "mlp_dim": F,
}
DENSE = tiny.model(**SHAPE, max_seq_len=T, dtype="bfloat16", remat="full")
MOE = tiny.model(DENSE, num_experts=E, moe_mlp_dim=F, router_aux_weight=0.01)
ATTENTION = [D * N * H, D * K * H, D * K * H, N * H * D]  # q k v o
MLP = [D * F] * 3  # gate up down
EXPERTS = [E * D * F] * 3
TABLES = [V * D] * 2  # embedding, head

Found = Counter[tuple[str, tuple[str, ...], int]]  # (kind, axes, elements of one array) -> how many


def training(target: str, model=DENSE, **axes: int) -> Program:
    """The training step; axes that are not named have size one."""
    mesh = MeshConfig(**{"fsdp": 1, **axes})
    # Plain descent: the optimizer moves nothing between devices, and AdamW's arithmetic takes longer to compile.
    config = tiny.run(model, ROWS, T, mesh=mesh, optimizer=OptimizerConfig(name="sgd"))
    return train_program(config, Target.parse(target).mesh(mesh))


@functools.cache
def compiled(target: str, model=DENSE, **axes: int) -> tuple[hlo.Module, dict[str, int]]:
    """The training step, compiled, and the mesh's shape."""
    program = training(target, model, **axes)
    return hlo.parse(program.compile().hlo), dict(program.mesh.shape)


def arrays(step: Step) -> list[int]:
    """Elements of each array that a collective moves; the compiler merges sums, each of which counts."""
    assert step.collective is not None
    if step.instruction.opcode == "all-reduce":
        return [shape.size for shape in step.instruction.shapes]
    return [step.collective.bytes * 8 // hlo._bits(step.collective.dtype)]


def moved(module: hlo.Module, mesh: dict[str, int], where: hlo.Computation) -> Found:
    found: Found = Counter()
    for step in schedule(module, where):
        if step.collective:
            axes = step.collective.axes(mesh)
            assert axes is not None, f"{step.name} runs over no whole axes"
            found.update((step.collective.kind, axes, size) for size in arrays(step) if size >= LARGE)
    return found


def parts(module: hlo.Module, mesh: dict[str, int]) -> tuple[Found, Found, Found]:
    """What the forward loop's body, the backward loop's and the rest move."""
    (_, forward, trips), (_, backward, again) = loops(module)
    assert trips == again == LAYERS
    return moved(module, mesh, forward), moved(module, mesh, backward), moved(module, mesh, module.entry)


def each(kind: str, axis: str, sizes: list[int], split: int = 1) -> Found:
    """One collective for each array of `sizes`, of which a device works on one part in `split`."""
    return Counter((kind, (axis,), size // split) for size in sizes)


def sums(found: Found) -> Found:
    """Without the difference between a reduction of which every device keeps all, and one that is scattered."""
    answer: Found = Counter()
    for (kind, axes, size), number in found.items():
        answer["sum" if kind in ("all-reduce", "reduce-scatter") else kind, axes, size] += number
    return answer


def test_fsdp_gathers_each_weight_twice_and_scatters_its_gradient_once():
    forward, backward, rest = parts(*compiled("v5p:2x2x1", fsdp=4))
    gathered = each("all-gather", "fsdp", ATTENTION + MLP)
    assert forward == gathered
    assert backward == gathered + each("reduce-scatter", "fsdp", ATTENTION + MLP)
    assert rest == each("all-gather", "fsdp", TABLES) + each("reduce-scatter", "fsdp", TABLES)


def test_the_heads_gradient_is_scattered_before_the_layers_run_backward():
    """Behind them, the whole of it would be held on every device while they run: 1 GiB for Llama-3-8B. At the sizes of
    this test the compiler scatters it in time of its own accord, so what holds it to that is looked for, too."""
    assert "optimization_barrier" in training("v5p:2x2x1", fsdp=4).lower().as_text()
    module, _ = compiled("v5p:2x2x1", fsdp=4)
    steps = list(schedule(module, module.entry))
    layers = max(n for n, step in enumerate(steps) if step.trips == LAYERS)
    scattered = {
        step.name: n
        for n, step in enumerate(steps)
        if step.collective and step.collective.kind == "reduce-scatter" and max(arrays(step)) >= LARGE
    }
    done = [
        scattered[step.start] for step in steps[:layers] if step.kind == "collective-done" and step.start in scattered
    ]
    done += [n for n in scattered.values() if steps[n].kind == "collective" and n < layers]
    assert len(done) == 1 and len(scattered) == 2, "the head's before, the embedding table's behind"


def test_no_layer_lays_the_stream_out_anew():
    """Kernels take arrays with the last dimension innermost; another layout in between is a copy before and behind each."""
    module, _ = compiled("v5p:2x2x1", fsdp=4)
    bodies = [body for _, body, _ in loops(module)]
    copied = [i for body in bodies for i in body if i.opcode == "copy"]
    assert not [i.name for i in copied if i.shapes[0].size == ROWS // 4 * T * D]


def test_fsdp_over_all_of_a_slice_without_rings_still_sums_each_gradient_once():
    """There the compiler adds up all of a layer's gradients everywhere, in one merged exchange, and keeps a part."""
    module, mesh = compiled("v5e:4x4", fsdp=16)
    forward, backward, rest = parts(module, mesh)
    gathered = each("all-gather", "fsdp", ATTENTION + MLP)
    assert forward == gathered
    assert sums(backward) == gathered + each("sum", "fsdp", ATTENTION + MLP)
    assert sums(rest) == each("all-gather", "fsdp", TABLES) + each("sum", "fsdp", TABLES)


def test_data_sums_each_gradient_once_in_the_layer_that_made_it():
    """After `fsdp` has scattered it: what goes over `data` is a part."""
    forward, backward, rest = parts(*compiled("v5p:2x2x1", data=2, fsdp=2))
    gathered = each("all-gather", "fsdp", ATTENTION + MLP)
    scattered = each("reduce-scatter", "fsdp", ATTENTION + MLP)
    assert forward == gathered
    assert backward == gathered + scattered + each("all-reduce", "data", ATTENTION + MLP, split=2)
    tables = each("all-gather", "fsdp", TABLES) + each("reduce-scatter", "fsdp", TABLES)
    assert rest == tables + each("all-reduce", "data", TABLES, split=2)


@pytest.mark.parametrize("fsdp", [2, 4])
def test_tensor_gathers_tokens_before_a_block_and_scatters_sums_behind_it(fsdp: int):
    """Backward both are turned around, and forward's are repeated but for the mlp's result, which nothing needs."""
    target = {2: "v5p:2x2x1", 4: "v5p:2x2x2"}[fsdp]
    forward, backward, rest = parts(*compiled(target, fsdp=fsdp, tensor=2))
    tokens = ROWS // fsdp * T * D
    gathered = each("all-gather", "fsdp", ATTENTION + MLP, split=2)
    assert forward == gathered + each("all-gather", "tensor", [tokens] * 2) + each(
        "reduce-scatter", "tensor", [tokens] * 2
    )
    recomputed = each("all-gather", "tensor", [tokens] * 2) + each("reduce-scatter", "tensor", [tokens])
    turned = each("all-gather", "tensor", [tokens] * 2) + each("reduce-scatter", "tensor", [tokens] * 2)
    scattered = each("reduce-scatter", "fsdp", ATTENTION + MLP, split=2)
    assert backward == gathered + scattered + recomputed + turned
    tables = each("all-gather", "fsdp", TABLES, split=2) + each("reduce-scatter", "fsdp", TABLES, split=2)
    assert rest == tables + each("all-gather", "tensor", [tokens] * 2) + each("reduce-scatter", "tensor", [tokens] * 2)


def test_context_gathers_keys_and_values_and_nothing_else_of_the_tokens():
    """Their gradients are summed back; and every weight's, as over `data`."""
    forward, backward, rest = parts(*compiled("v5p:2x2x1", fsdp=2, context=2))
    keys_and_values = [ROWS // 2 * T * K * H] * 2
    gathered = each("all-gather", "fsdp", ATTENTION + MLP) + each("all-gather", "context", keys_and_values)
    assert forward == gathered
    assert sums(backward) == gathered + each("sum", "fsdp", ATTENTION + MLP) + each(
        "sum", "context", keys_and_values
    ) + each("sum", "context", ATTENTION + MLP, split=2)
    tables = each("all-gather", "fsdp", TABLES) + each("reduce-scatter", "fsdp", TABLES)
    assert rest == tables + each("all-reduce", "context", TABLES, split=2)


def test_experts_gather_tokens_and_scatter_sums_and_their_weights_stay_where_they_are():
    """Attention's weights are the same on all of `expert`, whose devices hold different sequences: as over `data`."""
    forward, backward, rest = parts(*compiled("v5p:2x2x1", MOE, fsdp=2, expert=2))
    tokens = [ROWS // 2 * T * D]  # of the sequences that an expert group holds
    weights = each("all-gather", "fsdp", ATTENTION) + each("all-gather", "fsdp", EXPERTS, split=2)
    assert forward == weights + each("all-gather", "expert", tokens) + each("reduce-scatter", "expert", tokens)
    scattered = each("reduce-scatter", "fsdp", ATTENTION) + each("reduce-scatter", "fsdp", EXPERTS, split=2)
    # The tokens again, and the gradient of the sums; the gradient of the tokens is scattered.
    exchanged = each("all-gather", "expert", tokens * 2) + each("reduce-scatter", "expert", tokens)
    assert backward == weights + scattered + exchanged + each("all-reduce", "expert", ATTENTION, split=2)
    tables = each("all-gather", "fsdp", TABLES) + each("reduce-scatter", "fsdp", TABLES)
    assert rest == tables + each("all-reduce", "expert", TABLES, split=2)


def test_experts_whose_insides_are_split_exchange_tokens_over_both_axes():
    forward, backward, _ = parts(*compiled("v5p:2x2x1", MOE, expert=2, tensor=2))
    mine, group = [ROWS // 2 * T * D], [ROWS * T * D]
    there = each("all-gather", "expert", group) + each("reduce-scatter", "expert", group)
    assert forward == there + each("all-gather", "tensor", mine * 2) + each("reduce-scatter", "tensor", mine * 2)
    over_experts = each("all-gather", "expert", group * 2) + each("reduce-scatter", "expert", group)
    over_tensor = each("all-gather", "tensor", mine * 4) + each("reduce-scatter", "tensor", mine * 3)
    assert backward == over_experts + over_tensor + each("all-reduce", "expert", ATTENTION, split=2)


@pytest.mark.parametrize(
    "axes",
    [
        {"fsdp": 4},
        {"data": 2, "fsdp": 2},
        {"fsdp": 2, "tensor": 2},
        {"fsdp": 2, "context": 2},
        {"fsdp": 2, "expert": 2},
        {"expert": 2, "tensor": 2},
    ],
    ids=lambda axes: "-".join(f"{axis}{size}" for axis, size in axes.items()),
)
def test_nothing_is_permuted_and_what_is_small_is_small(axes: dict[str, int]):
    """All of a step, loops multiplied out. The compiled programs are those of the tests above."""
    module, mesh = compiled("v5p:2x2x1", *([MOE] if "expert" in axes else []), **axes)
    assert tuple(mesh) == MESH_AXES
    total = cost(module)
    assert {found.kind for found, _ in total.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert all(found.axes(mesh) for found, _ in total.collectives)
    everything = sum(found.bytes * number for found, number in total.collectives)
    small = sum(found.bytes * number for found, number in total.collectives if found.bytes < 4 * LARGE)
    assert 0 < small < 0.02 * everything
