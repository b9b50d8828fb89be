#!/usr/bin/env bash
# Installs the Python package into a virtual environment of its own, with PyTorch, and runs its tests, as python/README.md
# does. Needs python3 with venv, Rust and PyPI, and a few GB of disk for PyTorch.
#   VENV    an environment that is there, in place of a new one in target/
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR="$PWD/target/python"
cargo fmt --manifest-path python/Cargo.toml -- --check
cargo clippy --manifest-path python/Cargo.toml --locked -- -D warnings
if [ -z "${VENV:-}" ]; then
    VENV=target/python-venv
    rm -rf "$VENV"
    python3 -m venv "$VENV"
fi
"$VENV/bin/pip" install --quiet --disable-pip-version-check ./python pytest safetensors torch
"$VENV/bin/pytest" --quiet python
