#!/usr/bin/env bash
# Format check, lint and tests; sets itself up. Flags go to pytest, e.g. bash scripts/test.sh -k networks
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements-dev.txt
bin=.venv/bin
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/python" -m pytest "$@"
