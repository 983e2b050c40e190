#!/usr/bin/env bash
# Runs the tests that compare with other packages (`pytest -m peer`), in the environment that is active or in .venv.
# The packages go into a folder of their own: none is a dependency, and each is pure Python beside torch.
set -euo pipefail
cd "$(dirname "$0")/.."

python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
folder=${PEERS:-$(mktemp -d)}
$python -m pip install --quiet --no-deps --target "$folder" rwkv==0.8.32
PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" $python -m pytest -m peer -rs "$@"
