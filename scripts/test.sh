#!/usr/bin/env bash
# All checks, as `make test` and CI run them: linters, types, generated docs, tests.
set -euo pipefail
cd "$(dirname "$0")/.."

# The report is looked at in a real browser. Where we may install one, we do; elsewhere those tests say that they were left out.
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-dejavu-core >/dev/null
fi

ruff format --check .
ruff check .
mypy
python scripts/docs.py --check

# Two processes of tests share two cores better than one process with two threads, and spinning threads share none.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
exec python -m pytest -q -n auto -m "not gpu" "$@"
