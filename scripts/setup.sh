#!/usr/bin/env bash
# Make .venv and install a requirements file into it; a second call with the same file does nothing.
#   bash scripts/setup.sh [requirements.txt]
# BASE_PYTHON=python3.12 makes it with another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=${1:-requirements.txt}
python=${BASE_PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: needs Python 3.11 or newer as $python; set BASE_PYTHON to one, e.g. BASE_PYTHON=python3.12" >&2
    exit 2
fi
stamp=.venv/.installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)-$(basename "$requirements")
if [ ! -e "$stamp" ]; then
    echo "setup: installing $requirements into .venv (PyTorch is large: minutes)"
    if [ ! -e .venv ]; then
        "$python" -m venv .venv || true
    elif ! .venv/bin/python -c "" 2>/dev/null; then # e.g. of a Python that is no more
        "$python" -m venv --clear .venv || true
    fi
    # without ensurepip, venv fails but leaves a Python without pip; uv makes environments without pip, too
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null 2>&1 ||
        { echo "setup: .venv has no pip. On Debian and Ubuntu: apt-get install python3-venv, and try again; or remove .venv" >&2; exit 2; }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp"
    echo "setup: done; now: source .venv/bin/activate"
fi
