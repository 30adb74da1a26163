"""scripts/compile_matrix.py: what it asks for, how it reads a failure, and the table it writes."""

import importlib.util
import sys
from pathlib import Path

import pytest

from pallas_kernels import cases
from pallas_kernels.schedule import CompileError, Outcome

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_matrix.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compile_matrix", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_matrix"] = module
    spec.loader.exec_module(module)
    return module


def test_every_operation_is_asked_for_on_every_chip(script):
    asked = list(script.combinations([], ["v6e", "h200"], quick=False))
    assert {op for op, *_ in asked} == set(cases.CASES)
    assert len(asked) == len(set(asked)) == 2 * sum(len(c.dtypes) * len(c.directions) for c in cases.CASES.values())
    assert {dtype for op, dtype, *_ in script.combinations(["attention"], ["v6e"], quick=True)} == {"bfloat16"}


def test_a_refusal_is_told_from_a_failure(script):
    message = "ValueError: attention cannot run here as asked (gpu: takes bfloat16, not float32)"
    assert script.reason(message, "attention", "gpu") == ("refused", "takes bfloat16, not float32")
    assert script.reason("XlaRuntimeError: out of VMEM\n at 3", "attention", "tpu") == (
        "failed",
        "XlaRuntimeError: out of VMEM at 3",
    )
    assert script.reason("implementation='gpu' of x is not known; use one of xla", "x", "gpu")[0] == "missing"


def test_a_cell_says_what_ptxas_reports(script, monkeypatch):
    log = "ptxas info : 16 bytes spill stores, 8 bytes spill loads\nptxas info : Used 168 registers, 2 barriers"
    outcome = Outcome({"temp": 2**20}, [], log, [])
    monkeypatch.setattr(script, "compile_apart", lambda *args, **kwargs: outcome)
    cell = script.compile_cell("attention", "bfloat16", "forward", "h200", "python", 1)
    assert script.text(cell) == "temp 1.0 MiB, 168 registers, 16 B spilled"


def test_a_compile_that_fails_becomes_a_line(script, monkeypatch):
    def fail(*args, **kwargs):
        raise CompileError("took longer than 1 s to compile")

    monkeypatch.setattr(script, "compile_apart", fail)
    cell = script.compile_cell("attention", "bfloat16", "forward", "v6e", "python", 1)
    assert script.text(cell) == "failed: took longer than 1 s to compile"


def test_the_table_replaces_what_stands_between_the_markers(script, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{script.MARKERS[0]}\nold\n{script.MARKERS[1]}\nafter\n")
    cell = script.Cell("attention", "bfloat16", "forward", "v6e", "compiled", "", 0, 2**21, 3, 1474)
    script.write(file, script.table([cell]))
    text = file.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| attention | forward | bfloat16 | v6e | temp 0.0 MiB, VMEM 2.0 MiB, 1,474 bundles, 3 spills |" in text
    with pytest.raises(ValueError, match="has no lines"):
        script.write(SCRIPT.parent / "quickstart.sh", "nothing")


@pytest.mark.parametrize("op", cases.CASES)
def test_every_case_can_be_traced(op):
    if cases.missing(op):
        pytest.skip(cases.missing(op))
    import jax

    small = {
        "attention": {"queries": 16, "keys": 16, "heads": 2, "kv_heads": 1, "head_dim": 8},
        "rotary": {"tokens": 16, "heads": 2, "head_dim": 8},
        "ragged_dot": {"rows": 16, "inner": 8, "columns": 8, "groups": 2},
        "linear_cross_entropy": {"tokens": 16, "features": 8, "vocab": 32},
        "quantized_matmul": {"rows": 2, "inner": 256, "columns": 8},
        "paged_attention": {
            "tokens": 4,
            "sequences": 2,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 8,
            "page_size": 8,
            "context": 16,
        },
    }[op]
    case = cases.CASES[op]
    shape = {**case.shape, **small}
    for direction in case.directions:
        function, args = cases.build(op, case.dtypes[0], direction, "xla", **small)
        assert jax.tree.leaves(jax.eval_shape(function, *args))
    assert min(case.units(shape), case.flops(shape), case.bytes(shape, case.dtypes[0])) > 0
