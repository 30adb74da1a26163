#!/usr/bin/env python3
"""Measures the data pipeline on this machine: tokens a second of building a store and of reading packed batches.

    python scripts/bench_data.py --source data/brown --tokenizer MODEL_FOLDER
    python scripts/bench_data.py --json          # on generated text, with a tokenizer trained on it

Reading is measured at each number of threads, as fast as it goes and against a training step of `--step-ms`: "waits"
is the time a step spends without its batch after the first one, which should be 0.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmos_jax.config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from llmos_jax.data.pipeline import TrainData, build_data, prefetch_to_device, train_iterator, training_texts
from llmos_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

GENERATED_DOCUMENTS = 4_000


def generate_corpus(folder: Path, seed: int = 0) -> Path:
    """About 10 MB of documents of 100 to 800 made-up words, the frequent ones short."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=2 + i.bit_length() // 2)) for i in range(20_000)]
    weights = list(itertools.accumulate(1 / (i + 1) for i in range(len(words))))
    path = folder / "generated.jsonl"
    with path.open("w") as file:
        for _ in range(GENERATED_DOCUMENTS):
            text = " ".join(rng.choices(words, cum_weights=weights, k=rng.randrange(100, 800)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def measure_reading(config: RunConfig, data: TrainData, threads: int, batches: int) -> dict[str, float]:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_threads=threads))
    iterator = train_iterator(config, data)
    for _ in range(config.data.prefetch):  # the threads start, and the chunk cache fills
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    rows = batches * config.train.batch_size / (time.perf_counter() - start)
    return {"rows_per_second": rows, "tokens_per_second": rows * config.train.seq_len}


def measure_waits(
    config: RunConfig, data: TrainData, threads: int, steps: int, step_seconds: float
) -> dict[str, float]:
    """Milliseconds that `next` takes in a loop whose step sleeps, as a host does while the device works."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_threads=threads))
    iterator = prefetch_to_device(train_iterator(config, data), put=lambda batch: batch)
    next(iterator)
    waits = []
    for _ in range(steps):
        time.sleep(step_seconds)
        start = time.perf_counter()
        next(iterator)
        waits.append(1e3 * (time.perf_counter() - start))
    iterator.close()
    return {"wait_ms_median": statistics.median(waits), "wait_ms_most": max(waits)}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = SourceConfig(arguments.source or str(generate_corpus(folder)), format=arguments.format)
    data_config = DataConfig(sources=(source,), cache_dir=str(folder / "stores"))
    tokenizer: Tokenizer
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        tokenizer = train_bpe(itertools.islice(training_texts(data_config), 1000), 8192)
    config = RunConfig(
        model=ModelConfig(vocab_size=tokenizer.vocab_size),
        train=TrainConfig(batch_size=arguments.batch_size, seq_len=arguments.seq_len),
        data=data_config,
    )
    start = time.perf_counter()
    data = build_data(config, tokenizer)
    seconds = time.perf_counter() - start
    (rows,) = data.train
    reading = {}
    for threads in arguments.threads:
        reading[threads] = measure_reading(config, data, threads, arguments.batches)
        reading[threads] |= measure_waits(config, data, threads, arguments.batches, arguments.step_ms / 1e3)
    return {
        "cores": os.cpu_count(),
        "source": arguments.source or "generated",
        "documents": rows.num_documents,
        "tokens": rows.num_tokens,
        "text_bytes": rows.num_bytes,
        "stored_bytes": sum(path.stat().st_size for path in rows.store.directory.rglob("*") if path.is_file()),
        "vocab_size": tokenizer.vocab_size,
        "build_tokens_per_second": rows.num_tokens / seconds,
        "build_bytes_per_second": rows.num_bytes / seconds,
        "batch_size": arguments.batch_size,
        "seq_len": arguments.seq_len,
        "step_ms": arguments.step_ms,
        "reading": reading,
    }


def print_result(result: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{result['documents']:,} documents, {result['text_bytes']:,} bytes, {result['tokens']:,} tokens, "
        f"{result['stored_bytes'] / result['tokens']:.2f} stored bytes a token, {result['cores']} cores\n"
        f"build: {result['build_tokens_per_second']:,.0f} tokens/s, {result['build_bytes_per_second'] / 1e6:.1f} MB/s"
    )
    table = Table(title=f"reading batches of {result['batch_size']} x {result['seq_len']}", title_justify="left")
    for name in ("threads", "rows/s", "tokens/s", f"wait a {result['step_ms']:g} ms step: median", "most"):
        table.add_column(name, justify="right")
    for threads, numbers in result["reading"].items():
        speed = (f"{numbers['rows_per_second']:,.0f}", f"{numbers['tokens_per_second']:,.0f}")
        waits = (f"{numbers['wait_ms_median']:.2f} ms", f"{numbers['wait_ms_most']:.2f} ms")
        table.add_row(str(threads), *speed, *waits)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", default="", help="what to read, as in SourceConfig.path; without it, generated text"
    )
    parser.add_argument("--format", default="auto", help="as in SourceConfig.format")
    parser.add_argument("--tokenizer", default="", help="tokenizer file or model folder; without it, BPE is trained")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batches", type=int, default=50, help="that are measured")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of a simulated training step")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print_result(result)


if __name__ == "__main__":
    main()
