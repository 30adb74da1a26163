#!/usr/bin/env bash
# Makes the development environment (.venv) if it is not there, and passes the tests.
#
#   bash scripts/test.sh                  what every change must pass: 15 minutes at most on 2 cores
#   bash scripts/test.sh --all            the slow tests and those that pull from a registry too
#   bash scripts/test.sh --compat PYTHON  the compatibility part on another interpreter, with the newest jax it takes
#   bash scripts/test.sh tests/data -x    anything else goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv
extra=(-c constraints.txt)
select="not slow and not reference and not gpu and not network"
case "${1:-}" in
--all)
  shift
  select="not reference and not gpu"
  ;;
--compat)
  python=$2
  shift 2
  venv=.venv-compat
  extra=()
  select="compat and not network"
  ;;
esac

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "test.sh: $python is older than Python 3.11; name a newer one: PYTHON=python3.12 bash scripts/test.sh" >&2
  exit 2
fi
stamp=$venv/.installed
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  echo "test.sh: installing into $venv" >&2
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -e '.[dev,serve]' "${extra[@]}"
  touch "$stamp"
fi

if [ "$venv" = .venv ]; then
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  "$venv/bin/mypy"
fi
# Two at a time; then, by itself, what holds seconds to a bound. pytest's 5 is that nothing was selected.
run() { "$venv/bin/python" -m pytest "$@" || [ $? -eq 5 ]; }
run -n 2 --dist worksteal -m "$select and not timed" "$@"
run -m "$select and timed" "$@"
