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
# two workers of one thread each: most tests are too small to gain from a second thread
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile --durations 15 "$@"
