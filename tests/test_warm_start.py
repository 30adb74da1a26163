"""What ran once starts warm: a fresh process compiles nothing at all, and computes the same."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llmos_jax import overrides
from llmos_jax.compiler import watch
from llmos_jax.runtime.metrics import read_metrics
from llmos_jax.train import loop
from llmos_jax.train.prepare import prepare
from tests.end_to_end import runs

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
