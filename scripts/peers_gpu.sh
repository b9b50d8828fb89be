#!/usr/bin/env bash
# Times PyTorch, torch.compile, cut-cross-entropy, Liger and this crate side by side (benches/peers/gpu.py; its options are this
# script's). Works in a checkout, where cargo builds the examples, and in a bundle of scripts/gpu_bundle.sh, which has them.
# What python3 lacks is installed into a folder of its own, from the bundle's wheels or else from PyPI; the machine's Python is
# left as it is, and its PyTorch used where there is one. What cannot be had is recorded as missing.
#   PYTHON     the interpreter (default: python3)
#   PACKAGES   where packages go (default: target/peers-packages of a checkout, packages of a bundle)
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ -d "$here/bin" ]; then
    peers=$here/peers wheels=$here/wheels packages=${PACKAGES:-$here/packages} where=(--bin "$here/bin")
else
    peers=$here/../benches/peers wheels='' packages=${PACKAGES:-$here/../target/peers-packages} where=()
fi
python=${PYTHON:-python3}
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# get MODULE PACKAGE OPTION...: installs a package whose module is not there.
get() {
    local module=$1 package=$2
    shift 2
    has "$module" && return
    local pip=("$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --upgrade --target "$packages")
    if [ -n "$wheels" ] && "${pip[@]}" --no-deps --no-index --find-links "$wheels" "$package" 2> /dev/null; then return; fi
    "${pip[@]}" "$@" "$package" || echo "$package could not be installed" >&2
}

get torch torch
get numpy numpy
get matplotlib matplotlib
# Triton and PyTorch, their needs, are there or cannot be had.
get cut_cross_entropy cut-cross-entropy --no-deps
get liger_kernel liger-kernel --no-deps
get packaging packaging
exec "$python" "$peers/gpu.py" ${where[@]+"${where[@]}"} "$@"
