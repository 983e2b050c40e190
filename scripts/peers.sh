#!/usr/bin/env bash
# Runs the tests that compare with other packages (`pytest -m peer`), in the environment that is active or in .venv.
# None of the packages is a dependency. `rwkv` is pure Python beside torch and goes into a folder of its own; SAELens,
# and sparsify with dictionary_learning, need other versions than we do and get an environment each (2 GB), which is
# kept where PEERS names a folder. SAELENS_PYTHON and SPARSIFY_PYTHON name environments that are there already.
set -euo pipefail
cd "$(dirname "$0")/.."

python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
folder=${PEERS:-$(mktemp -d)}
torch=$($python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])')

environment() { # name, packages: prints the environment's Python
    local peer="$folder/$1/bin/python"
    if [ ! -x "$peer" ]; then
        $python -m venv "$folder/$1"
        echo "$torch" >"$folder/constraints.txt"
        "$peer" -m pip install --quiet "$torch"
        "$peer" -m pip install --quiet --constraint "$folder/constraints.txt" "${@:2}"
        # It comes with nnsight for CUDA alone, and then breaks the import of transformers.
        "$peer" -m pip uninstall --quiet --yes torchvision
    fi
    echo "$peer"
}

mkdir -p "$folder/rwkv"
$python -m pip install --quiet --no-deps --upgrade --target "$folder/rwkv" rwkv==0.8.32
export SAELENS_PYTHON=${SAELENS_PYTHON:-$(environment saelens sae-lens==6.54.12)}
export SPARSIFY_PYTHON=${SPARSIFY_PYTHON:-$(environment sparsify eai-sparsify==1.3.3 dictionary-learning==0.1.0)}
PYTHONPATH="$folder/rwkv${PYTHONPATH:+:$PYTHONPATH}" $python -m pytest -m peer -rs "$@"
