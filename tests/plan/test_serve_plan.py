"""Plans of a server: the runner's own programs, sizes, the closed loop, and the command."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from llmos_jax import cli
from llmos_jax.compiler import hlo
from llmos_jax.compiler import target as targets
from llmos_jax.compiler.analytic_serving import decode_time, paged_attention_work
from llmos_jax.compiler.chips import MEMORY_SHARE
from llmos_jax.compiler.hlo_cost import cost, count
from llmos_jax.compiler.identity import identity
from llmos_jax.compiler.program import Program
from llmos_jax.compiler.report import Work, report
from llmos_jax.compiler.target import Target
from llmos_jax.config import MeshConfig, RunConfig, ServeConfig, UserError
from llmos_jax.models.presets import PRESETS
from llmos_jax.plan.serving import KERNEL, Load, closed_loop, plan_serving
from llmos_jax.serve import cache, forward
from llmos_jax.serve.runner import Runner
from llmos_jax.serve.weights import abstract_served_params, served_params
from llmos_jax.sharding import replicated
from tests import tiny

SERVE = ServeConfig(max_model_len=32, max_sequences=4, max_step_tokens=16, page_size=8)
CONFIG = RunConfig(model=tiny.model(dtype="float32"), mesh=MeshConfig(fsdp=1, tensor=-1), serve=SERVE)
LOAD = Load(users=4, prompt=16, answer=16)

FILE = """
from tests.plan.test_serve_plan import CONFIG

def get_config():
    return CONFIG
"""


@pytest.fixture(scope="module")
def found():
    return plan_serving(CONFIG, Target.parse("cpu:8"), LOAD)


def test_memory_is_that_of_the_weights_and_pages_the_runner_takes(found):
    model, mesh = CONFIG.model, Target.parse("cpu:8").mesh(CONFIG.mesh)
    served = jax.tree.leaves(abstract_served_params(model, mesh))
    held = sum(leaf.sharding.shard_shape(leaf.shape) and _bytes(leaf) for leaf in served)
    decode = found.reports[0]
    assert decode.memory["parameters"] == pytest.approx(held, rel=0.01)
    pool = found.pages * cache.page_bytes(model, dataclasses.replace(SERVE, kv_dtype="float32")) / 8
    assert decode.memory["KV cache"] == pytest.approx(pool, rel=0.01)
    assert found.pages == cache.useful_pages(model, SERVE), "a small model's sequences all fit"


def _bytes(leaf) -> int:
    size = leaf.dtype.itemsize
    for dim in leaf.sharding.shard_shape(leaf.shape):
        size *= dim
    return size


def test_as_many_sequences_fit_as_their_pages_have_room(found):
    assert found.fits and found.running == 4
    assert found.room > found.pages
    assert found.sequences(32) == found.room // 4 and found.sequences(33) == found.room // 5
    assert found.sequences(8) == found.room


def test_the_programs_are_those_of_the_runner(found, monkeypatch):
    """A plan compiles under the identities that a server looks up: there is one description of a step."""
    planned, compiled = set(), set()

    def note(into: set):
        def compile(program, real=Program.compile):
            into.add(identity(program))
            return real(program)

        return compile

    target, served = Target.parse("cpu:8"), dataclasses.replace(SERVE, num_pages=found.pages, kv_dtype="float32")
    with monkeypatch.context() as patched:
        patched.setattr(Program, "compile", note(planned))
        plan_serving(CONFIG, target, LOAD)
    mesh = target.mesh(CONFIG.mesh)
    fresh = {k: jax.device_put(np.asarray(v), replicated(mesh)) for k, v in tiny.params(CONFIG.model).items()}
    params = served_params(CONFIG.model, fresh, mesh)
    with monkeypatch.context() as patched:
        patched.setattr(Program, "compile", note(compiled))
        Runner(CONFIG.model, served, mesh, lambda: params)
    assert len(planned) == 3 and planned <= compiled


def test_each_estimate_gives_all_speeds(found):
    assert set(found.speeds) == {"analytic", "schedule", "roofline"}
    for one in found.speeds.values():
        assert 0 < one.decode <= one.between_tokens <= one.chunk * 2
        assert one.first_token == pytest.approx(one.chunk + one.decode)
    main = found.speeds["schedule"]
    assert found.main is main and main.tokens_per_second > 0


def test_a_loop_without_prompts_is_decodes_alone():
    between, rate = closed_loop(Load(8, 0, 100), 64, decode=0.01, mixed=0.05)
    assert between == pytest.approx(0.01) and rate == pytest.approx(8 * 100 / (99 * 0.01))


def test_a_loop_of_prompts_alone_is_bound_by_their_steps():
    """64 prompts of 960 tokens for one token each: 64 steps, which carry everything."""
    _, rate = closed_loop(Load(64, 960, 1), 1024, decode=0.01, mixed=0.05)
    assert rate == pytest.approx(64 / (64 * 0.05))


def test_a_loop_waits_for_the_prompts_of_others():
    """Of 1,024 steps that an answer and its prompt take, 64 carry a prompt."""
    between, rate = closed_loop(Load(64, 960, 1024), 1024, decode=0.01, mixed=0.05)
    assert between == pytest.approx((64 * 0.05 + 960 * 0.01) / 1024)
    assert rate == pytest.approx(64 * 1024 / (64 * 0.05 + 960 * 0.01))


def test_the_paged_kernel_reads_what_sequences_hold():
    model = PRESETS["llama3-8b"]
    flops, moved = paged_attention_work(model, 8, [(99, 1), (49, 1)], 2)
    assert moved == 2 * 8 * 128 * 2 * 150 / 8 and flops == 4 * 32 * 128 * 150 / 8
    flops, moved = paged_attention_work(model, 1, [(10, 4)], 1)
    assert moved == 2 * 8 * 128 * 14 and flops == 4 * 32 * 128 * (11 + 12 + 13 + 14)
    windowed = dataclasses.replace(PRESETS["mistral-7b"], sliding_window=16)
    flops, moved = paged_attention_work(windowed, 1, [(99, 1)], 2)
    assert moved == 2 * 8 * 128 * 2 * 17 and flops == 4 * 32 * 128 * 16


def test_by_formula_a_decode_step_reads_weights_and_pages_in_their_own_widths():
    model, target = dataclasses.replace(PRESETS["llama3-70b"], dtype="bfloat16"), Target.parse("v6e:2x4")
    sizes = {"data": 1, "fsdp": 1, "tensor": 8, "context": 1, "expert": 1}
    links = dict.fromkeys(sizes, next(iter(target_links().values())))
    plain = decode_time(model, sizes, target, 1, 1, links).memory
    eight = decode_time(dataclasses.replace(model, quantize="int8"), sizes, target, 1, 1, links).memory
    assert eight == pytest.approx(plain / 2, rel=0.01)
    read = [decode_time(model, sizes, target, 64, 1024, links, kv_width=width).memory - plain for width in (2, 1)]
    assert read[1] == pytest.approx(read[0] / 2, rel=0.01)


def target_links():
    target = Target.parse("cpu:8")
    return target.axis_links(target.mesh(CONFIG.mesh))


def test_weights_of_eight_bits_take_less_and_leave_more_room(found):
    model = tiny.model(dtype="float32", quantize="int8", embed_dim=128, head_dim=128, mlp_dim=1024)
    plain = dataclasses.replace(CONFIG, model=dataclasses.replace(model, quantize="none"))
    target = Target.parse("cpu:8")
    eight = plan_serving(dataclasses.replace(CONFIG, model=model), target, LOAD).reports[0]
    assert eight.memory["parameters"] < 0.35 * plan_serving(plain, target, LOAD).reports[0].memory["parameters"]


@pytest.mark.parametrize(
    ("changes", "load", "message"),
    [
        ({"mesh": MeshConfig(fsdp=8)}, LOAD, r"mesh\.fsdp=8: a server splits"),
        ({}, Load(4, 32, 1), r"33 tokens are longer than serve\.max_model_len=32"),
        ({}, Load(4, 32, 0), r"leaves no tokens"),
        ({"serve": dataclasses.replace(SERVE, max_step_tokens=2)}, LOAD, r"max_step_tokens=2 is less than"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, load, message):
    with pytest.raises(UserError, match=message):
        plan_serving(dataclasses.replace(CONFIG, **changes), Target.parse("cpu:8"), load)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.py"
    path.write_text(FILE)
    return str(path)


def test_the_command_answers_with_json(config, capsys):
    arguments = ["plan", config, "--program", "serve", "--target", "cpu:8", "--json", "--price", "2"]
    assert cli.main(arguments) == 0
    value = json.loads(capsys.readouterr().out)
    [one] = value["serving"]
    assert (one["users"], one["prompt"], one["answer"]) == (4, 16, 16), "the configuration's sizes by default"
    assert one["sequences"]["32"] == one["room_pages"] // 4 and one["published"] == []
    rate = one["speeds"]["schedule"]["tokens_per_second"]
    assert one["tokens_per_second_per_chip"] == pytest.approx(rate / 8)
    assert one["dollars_per_million_tokens"] == pytest.approx(16 / 3600 / rate * 1e6)
    assert [report["program"] for report in value["reports"]] == ["decode", "prefill", "draw"]


def test_the_command_prints_a_page(config, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plan", config, "--program", "serve", "--target", "cpu:8", "--prompt", "8", "--batch", "2"]) == 0
    page = capsys.readouterr().out
    for part in ("serve on cpu:8 (8 chips; tensor 8): fits", "KV cache", "of 32 tokens", "between tokens"):
        assert part in page
    assert "2 users, prompts of 8 tokens, answers of 24" in page


def test_a_server_that_does_not_fit_exits_with_3(config, monkeypatch, capsys):
    real = targets.measured_cpu
    monkeypatch.setattr(targets, "measured_cpu", lambda n: dataclasses.replace(real(n), usable_bytes=1e3))
    assert cli.main(["plan", config, "--program", "serve", "--target", "cpu:8", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["serving"][0]["fits"] is False


def test_no_room_for_a_sequence_is_told(config, monkeypatch, capsys):
    real = targets.measured_cpu
    monkeypatch.setattr(targets, "measured_cpu", lambda n: dataclasses.replace(real(n), memory_bytes=1e3))
    assert cli.main(["plan", config, "--program", "serve", "--target", "cpu:8"]) == 2
    assert "there is room for 0 pages" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- described chips


def described(test):
    """jax's own store keeps programs of described devices, and warns that it cannot load them."""
    test = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")(test)
    test = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler")(test)
    return pytest.mark.described(test)


@pytest.fixture(scope="module")
def decode():
    """(program, its text) of a decode step of two layers of Llama 3 8B on eight v6e, queries of several heads a chip."""
    target = Target.parse("v6e:2x4")
    model = dataclasses.replace(PRESETS["llama3-8b"], num_layers=2, dtype="bfloat16", vocab_size=8_192)
    serve = ServeConfig(
        max_model_len=2_048, max_sequences=64, max_step_tokens=256, num_pages=4_096, kv_dtype="bfloat16"
    )
    mesh = target.mesh(MeshConfig(fsdp=1, tensor=8))
    shape = next(shape for shape in forward.shapes(model, serve, "tpu") if shape.tokens >= 64)
    pool = cache.abstract_pool(model, serve, mesh)
    program = forward.forward_program(model, shape, mesh, abstract_served_params(model, mesh), pool)
    return program, program.compile()


@described
def test_decoding_on_tpus_is_one_kernel_a_layer_with_the_pages_in_place(decode):
    program, executable = decode
    module = hlo.parse(executable.hlo)
    kernels = [i for i in module.entry if i.target == "tpu_custom_call"]
    assert [re.sub(r"[.\d]+$", "", i.name) for i in kernels] == ["paged_attention"] * 2
    pool = sum(leaf.dtype.itemsize * 4_096 * 2 * 32 * 128 for leaf in jax.tree.leaves(program.args[1]))
    assert executable.memory.alias == pool, "all pages are donated"
    assert executable.memory.temp < 0.2 * pool


@described
def test_decoding_on_tpus_copies_nothing_large(decode):
    """Neither pages nor weights are laid out anew: what a step copies is of the size of its tokens."""
    module = hlo.parse(decode[1].hlo)
    copies = [i for c in module.computations.values() for i in c if i.opcode in ("copy", "transpose")]
    largest = max((shape.bytes for i in copies for shape in i.shapes), default=0)
    assert largest <= 128 * 4096 * 4


@described
def test_the_paged_kernel_counts_what_the_plan_says_of_it(decode):
    program, executable = decode
    target = Target.parse("v6e:2x4")
    links = target.axis_links(program.mesh)
    parts = ("parameters", "KV cache", "other", "other", "parameters")

    def found(moved: float):
        work = Work(64, 1.0, parts, kernels={KERNEL: (2e6, moved)})
        return report(program, executable, target, links, work)

    little, much = found(0.0), found(1e9)
    assert much.hbm_bytes - little.hbm_bytes == 2e9 and not any(KERNEL in note for note in much.notes)
    late = much.main.seconds - little.main.seconds
    assert late == pytest.approx(2e9 / (target.chip.memory_bandwidth * MEMORY_SHARE), rel=0.1)


@described
def test_decoding_on_tpus_reads_every_weight_once(decode):
    """All but the table of the embedding, of which a few rows are read; activations stay on the chip or are small."""
    program, executable = decode
    table = _bytes(program.args[0]["embed.table"])
    weights = sum(_bytes(leaf) for leaf in jax.tree.leaves(program.args[0])) - table
    module = hlo.parse(executable.hlo)
    pages = sum(_bytes(leaf) for leaf in jax.tree.leaves(program.args[1]))
    read = cost(module).bytes - 2 * pages  # a kernel that says nothing counts as reading and writing all it is given
    assert weights < read < 1.25 * weights


@described
def test_decoding_on_tpus_gathers_and_sums_the_stream_once_a_block(decode):
    """Two blocks a layer, the embedding's sum, and the rows that get logits."""
    program, executable = decode
    found = count(hlo.parse(executable.hlo), dict(program.mesh.shape))
    assert found == {
        ("all-gather", ("tensor",)): 4,
        ("reduce-scatter", ("tensor",)): 5,
        ("all-reduce", ("tensor",)): 1,
    }
