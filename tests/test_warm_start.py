"""What ran once starts warm: a fresh process compiles nothing at all, and computes the same."""

import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax import opening, overrides
from llmos_jax.compiler import watch
from llmos_jax.config import MeshConfig, UserError
from llmos_jax.models.weights import dequantize
from llmos_jax.models.weights import gguf as ours
from llmos_jax.runtime.metrics import read_metrics
from llmos_jax.sharding import make_mesh
from llmos_jax.train import loop
from llmos_jax.train.prepare import prepare
from tests.end_to_end import runs
from tests.models import golden
from tests.models.weights import gguf_files

# `llmos` as a user starts it, with every computation that reaches the compiler written down, whoever asked for it.
LISTENING = """
import sys
import jax
from llmos_jax.cli import main

def heard(event, seconds, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        with open(sys.argv[1], "a") as file:
            print(details["fun_name"], file=file)

jax.monitoring.register_event_duration_secs_listener(heard)
sys.exit(main(sys.argv[2:]))
"""


def llmos(folder: Path, *arguments: Any) -> tuple[list[str], dict[str, Any]]:
    """(the names of what was compiled, the answer) of a fresh process; its jax keeps nothing on disk by itself."""
    heard = folder / "compiled.txt"
    heard.write_text("")
    variables = {
        "LLMOS_HOME": str(folder / "home"),
        "LLMOS_CACHE_BYTES": "1000000000",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, str(heard), *map(str, arguments), "--json"],
        env=runs.environment(1, **variables), cwd=runs.ROOT, capture_output=True, text=True, timeout=runs.PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return heard.read_text().split("\n")[:-1], json.loads(done.stdout)


def test_a_second_run_compiles_nothing_and_is_the_same_run(tmp_path):
    config, losses = runs.write_run(tmp_path), []
    programs = {"jit(init)", "jit(step)", "jit(evaluate)"}
    for workdir in ("first", "second"):
        compiled, _ = llmos(tmp_path, "train", config, "--workdir", tmp_path / workdir, "--stop-at", 4)
        assert programs <= set(compiled) if workdir == "first" else compiled == []
        losses.append(
            [row["loss"] for row in read_metrics(tmp_path / workdir / "metrics.jsonl") if row["kind"] == "train"]
        )
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    # The tokenizer is that of the first run, of which the second one's workdir has its own copy.
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1
    assert len({(tmp_path / name / "tokenizer" / "tokenizer.json").read_bytes() for name in ("first", "second")}) == 1
    # Going on compiles nothing either: restoring, evaluating and saving included.
    compiled, summary = llmos(
        tmp_path, "train", config, "--workdir", tmp_path / "second", "--set", "train.eval_every=6"
    )
    assert compiled == [] and summary["step"] == 12
    events = [row["event"] for row in read_metrics(tmp_path / "second" / "metrics.jsonl") if row["kind"] == "event"]
    assert "recompiled" not in events
    compiled, answer = llmos(tmp_path, "generate", tmp_path / "second", "the cat", "--max-tokens", 4)
    assert {"jit(prefill)", "jit(decode)"} <= set(compiled)
    again, same = llmos(tmp_path, "generate", tmp_path / "second", "the cat", "--max-tokens", 4)
    assert again == [] and same["tokens"] == answer["tokens"]


@pytest.fixture
def model_file(tmp_path) -> Path:
    """A tiny Llama with a tokenizer of four words, as a GGUF whose matrices are quantized."""
    stored = golden.load("llama")
    folder, file = golden.write_folder(tmp_path / "llama", stored.config, stored.tensors), tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    gguf_files.metadata(writer, stored.config)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "é", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 1])
    writer.add_add_bos_token(False)
    for name, value in gguf_files.convert(folder, stored.config).items():
        fits = value.ndim > 1 and value.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q4_1 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_is_read_once_and_as_its_own_library_reads_it(model_file, monkeypatch):
    theirs = gguf.GGUFReader(model_file)
    monkeypatch.setattr(gguf, "GGUFReader", None)  # nothing opens the file through it, slowly and again
    monkeypatch.setattr(dequantize, "PIECE", 96)  # several pieces a tensor, the last one short
    ours._read_header.cache_clear()
    source = opening.find(str(model_file))
    assert opening.tokenizer_of(source).encode("abba") == [3, 1, 0]
    opening.weights_of(source, source.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert ours._read_header.cache_info().misses == 1
    file = ours.open_gguf(model_file)
    named = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {name: field.contents() for name, field in file.fields.items()} == {
        name: field.contents() for name, field in named.items()
    }
    assert "é" in file.fields["tokenizer.ggml.tokens"].contents()
    kinds = set()
    for one, other in zip(file.tensors, theirs.tensors, strict=True):
        assert (one.name, one.tensor_type, one.shape) == (other.name, other.tensor_type, tuple(other.shape.tolist()))
        np.testing.assert_array_equal(
            dequantize.dequantize(one.data, one.tensor_type), gguf.dequantize(other.data, other.tensor_type)
        )
        kinds.add(one.tensor_type.name)
    assert kinds == {"Q4_1", "F32"}


def test_a_gguf_aligned_to_nothing_is_refused(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(
        struct.pack("<4sIQQQ17sII", b"GGUF", 3, 0, 1, 17, b"general.alignment", 4, 0)  # one pair: uint32 0
    )
    with pytest.raises(UserError, match=r"damaged or cut short .its alignment is 0"):
        ours.open_gguf(file)


def test_a_second_answer_of_a_gguf_compiles_nothing(tmp_path, model_file):
    first, answer = llmos(tmp_path, "generate", model_file, "abba", "--max-tokens", 4)
    assert {"jit(prefill)", "jit(decode)"} == set(first)  # and nothing else: the weights are placed without a program
    (weights,) = (tmp_path / "home" / "executables").glob("*.weights")
    content = weights.read_bytes()
    second, same = llmos(tmp_path, "generate", model_file, "abba", "--max-tokens", 4)
    assert second == [] and same["tokens"] == answer["tokens"]
    assert weights.read_bytes() == content  # mapped, not made again: that would tell how long it took this time


def recompile(monkeypatch) -> None:
    """From step 3 on, something is traced anew in every step."""
    plain, sizes = loop.Loop._dispatch, itertools.count(3)

    def dispatch(self):
        if self.step >= 3:
            jax.jit(jnp.cos).lower(jax.ShapeDtypeStruct((next(sizes),), jnp.float32)).compile()
        return plain(self)

    monkeypatch.setattr(loop.Loop, "_dispatch", dispatch)


def test_a_recompilation_in_the_loop_is_an_event_and_an_error_where_asked(tmp_path, monkeypatch):
    config = overrides.load_config(str(runs.write_run(tmp_path)), [])
    recompile(monkeypatch)
    loop.train(prepare(config, str(tmp_path / "counted")), stop_at=5)
    events = [row for row in read_metrics(tmp_path / "counted" / "metrics.jsonl") if row.get("event") == "recompiled"]
    assert [(row["step"], row["details"]["count"]) for row in events] == [(3, 1), (4, 2)]
    assert all("cos" in row["details"]["program"] and row["details"]["seconds"] >= 0 for row in events)
    monkeypatch.setattr(watch, "strict", True)
    with pytest.raises(watch.Recompiled, match="cos"):
        loop.train(prepare(config, str(tmp_path / "strict")), stop_at=5)
