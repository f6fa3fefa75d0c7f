# Sourced by the other scripts: where things are, and how to say what is happening.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${EDGEADAPT_VENV:-$root/.venv}
models=${EDGEADAPT_MODELS:-$root/models}
export EDGEADAPT_MODELS=$models
export PIP_DISABLE_PIP_VERSION_CHECK=1

# The virtual environment's programs lie elsewhere on Windows.
if [ -d "$venv/Scripts" ]; then bin=$venv/Scripts; else bin=$venv/bin; fi

say() { printf '== %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$1" >&2
    if [ $# -gt 1 ]; then printf 'hint: %s\n' "$2" >&2; fi
    exit 1
}
