#!/usr/bin/env bash
# Format check, lint, import order, and tests; first installs what they need.
# Flags go to pytest, e.g. bash scripts/test.sh -k networks
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements-dev.txt
bin=.venv/bin
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/lint-imports"
# two workers of one thread each: most tests are too small to gain from a second thread; in their order, in which the
# long files come before the many short ones of tests/unit, so that no worker waits for the other at the end
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 "$@"
