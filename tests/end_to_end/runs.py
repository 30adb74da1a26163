"""A run so small that it trains in seconds: its corpus, its configuration, and `llmos` as a user starts it."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmos_jax import opening, overrides
from llmos_jax.config import CheckpointConfig
from llmos_jax.models.decoder import abstract_params
from llmos_jax.runtime.checkpoint import Checkpoints, load_params
from llmos_jax.runtime.metrics import latest, read_metrics
from llmos_jax.train.step import abstract_state
from tests import tiny

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0  # seconds; a command of this size that takes longer is broken
WORDS = [
    *("the", "cat", "dog", "sat", "on", "a", "mat", "house", "red", "blue"),
    *("ran", "to", "from", "under", "over", "big", "small", "sky", "sun", "moon"),
]
CONFIG = """
from llmos_jax.config import *

def get_config():
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            vocab_size=320, num_layers=2, embed_dim=16, num_heads=8, num_kv_heads=8, head_dim=4, mlp_dim=32,
            max_seq_len=64,
        ),
        data=DataConfig(
            sources=(SourceConfig({corpus!r}),), eval_fraction=0.1, cache_dir={cache!r},
            tokenizer="train", tokenizer_vocab_size=312,
        ),
        train=TrainConfig(steps=12, batch_size=8, seq_len=32, eval_batches=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        checkpoint=CheckpointConfig(every=4, keep=3, keep_best=0),
        log=LogConfig(every=1, tensorboard=False),
    )
"""


def write_run(folder: Path) -> Path:
    """A corpus of some sixty short documents in `folder`, and the configuration that trains on it."""
    draw, corpus = random.Random(0), folder / "corpus"
    corpus.mkdir(parents=True)
    for i in range(60):
        sentences = [" ".join(draw.choices(WORDS, k=8)) for _ in range(12)]
        (corpus / f"{i:02}.txt").write_text(". ".join(sentences))
    config = folder / "run.py"
    config.write_text(CONFIG.format(corpus=str(corpus), cache=str(folder / "cache")))
    return config


def environment(devices: int, **variables: str) -> dict[str, str]:
    """That of the tests, with `devices` simulated ones."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", count, os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, **variables}


def start(*args: Any, devices: int = 1, **variables: str) -> subprocess.Popen:
    """`llmos` with `args`, in a process of its own."""
    command = [sys.executable, "-m", "llmos_jax.cli", *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment(devices, **variables), cwd=ROOT, text=True, stdout=pipe, stderr=pipe
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, pause: float = 0.002) -> None:
    """Until `condition`; it is an error if `process` ends first."""
    ends = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > ends:
            process.kill()
            raise AssertionError(f"ended with {process.returncode} before its time: {process.communicate()[1][-3000:]}")
        time.sleep(pause)


def events(workdir: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(workdir / "metrics.jsonl") if row["kind"] == "event" and row["event"] == kind]


def losses(workdir: Path) -> dict[int, float]:
    """The loss of each step that counts."""
    return {row["step"]: row["loss"] for row in latest(read_metrics(workdir / "metrics.jsonl"), "train")}


def params(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, parameters) of the newest checkpoint."""
    model = opening.find(str(workdir)).model
    step, found = load_params(workdir, abstract_params(model, tiny.mesh(data=1)))
    return step, {path: np.asarray(value) for path, value in found.items()}


def state_bytes(workdir: Path) -> dict[str, bytes]:
    """Everything in the newest checkpoint: parameters, optimizer state, counters and places."""
    import jax

    config = overrides.from_json((workdir / "config.json").read_text())
    abstract = abstract_state(config, tiny.mesh(data=1))
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=10, keep_best=0))
    try:
        found = checkpoints.restore(
            abstract.params, {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
        )
    finally:
        checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path((found.params, found.rest))
    extra = repr(sorted(found.extra.items())).encode()
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves} | {"extra": extra}
