#!/usr/bin/env bash
# What a machine with a GPU is to show: the tests marked `gpu`, then the figures of the kernels, of training beside
# torch and of serving beside transformers on the same card.
#
#   bash scripts/gpu_check.sh [OUTPUT_FOLDER]
#
# Needs jax with CUDA, flax, optax, orbax-checkpoint, and of the extra `serve` all; torch and transformers for the comparison. Figures go to the
# folder (default runs/gpu_check) and belong in docs/benchmarks.md the same day.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$out"

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/device.csv"
LLMOS_TEST_PLATFORM=cuda "$python" -m pytest -m gpu tests 2>&1 | tee "$out/tests.txt"
"$python" scripts/bench_kernels.py --json "$out/kernels.json" 2>&1 | tee "$out/kernels.txt"
common=(--shape llama-1b --dtype bfloat16 --steps 10 --blocks 5 --torch-python "$python")
"$python" scripts/bench_train.py "${common[@]}" --batch 4 --seq-len 2048 2>&1 | tee "$out/train_1b.txt"
"$python" scripts/bench_train.py "${common[@]}" --batch 4 --seq-len 2048 --torch-compile 2>&1 | tee "$out/train_1b_compiled.txt"
"$python" scripts/bench_serve.py --shape tinyllama --torch-python "$python" 2>&1 | tee "$out/serve_1b.txt"
