#!/usr/bin/env bash
# What a machine with a GPU is to show: the tests marked `gpu`, then the figures of the kernels, of training beside
# torch and of serving beside transformers on the same card.
#
#   bash scripts/gpu_check.sh [OUTPUT_FOLDER] [STAGE...]      stages: tests kernels tune train serve; all if none is named
#
# Needs jax with CUDA, flax, optax, orbax-checkpoint, and of the extra `serve` all; torch and transformers for the
# comparison. Every stage has a time limit of its own, so that a kernel that hangs costs its stage only. Figures go to
# the folder (default runs/gpu_check) and belong in docs/benchmarks.md the same day.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu_check}
shift || true
python=${PYTHON:-python3}
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}

run() { # NAME SECONDS COMMAND...: its output goes to NAME.txt too
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  # At an interrupt pytest says what it has found so far.
  timeout -s INT -k 8 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  echo "== $name: status ${PIPESTATUS[0]}, $((SECONDS - started)) s"
}

tests() {
  LLMOS_TEST_PLATFORM=cuda run tests 150 "$python" -m pytest -m gpu -n 12 -v -p no:benchmark -rfE --tb=short -p no:cacheprovider \
    $(grep -rl "mark.gpu" tests)
}

kernels() {
  local op bench=("$python" scripts/bench_kernels.py --torch-python "$python")
  for op in attention. ragged_dot linear_cross_entropy paged_attention; do
    run "kernels_${op%.}" 75 "${bench[@]}" --only "$op" --json "$out/kernels_${op%.}.json"
  done
  run kernels_quantized 75 "${bench[@]}" --only quantized_matmul.forward --implementation gpu --json "$out/kernels_quantized.json"
}

tune_one() { # NAME OP ARGUMENTS...
  local name=$1 op=$2
  shift 2
  case " ${TUNE:-$name} " in *" $name "*) run "tune_$name" 60 "$python" -m pallas_kernels.tune --op "$op" "$@" ;; esac
}

tune() { # TUNE names some of them
  local attention=(attention --shape heads=64,kv_heads=8,queries=16384,keys=16384)
  local w4a16=(quantized_matmul --dtype w4a16 --shape transposed=1,inner=8192,columns=28672)
  tune_one attention "${attention[@]}"
  tune_one attention_backward "${attention[@]}" --direction backward
  tune_one ragged_dot ragged_dot --shape inner=4096,columns=14336,groups=8
  tune_one quantized_matmul "${w4a16[@]}"
  tune_one paged_attention paged_attention
  cp pallas_kernels/tuned/*.json "$out"/ 2>/dev/null
}

train() {
  local common=(--shape llama-1b --dtype bfloat16 --batch 4 --seq-len 2048 --steps 10 --blocks 3 --torch-python "$python")
  run train_1b 200 "$python" scripts/bench_train.py "${common[@]}" ${TRAIN_FLAGS:-}
}

serve() {
  run serve_1b 280 "$python" scripts/bench_serve.py --shape llama-1b --torch-python "$python" ${SERVE_FLAGS:-}
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/device.csv"
for stage in ${@:-tests kernels tune train serve}; do
  "$stage"
done
