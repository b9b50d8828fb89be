#!/usr/bin/env bash
# Installs the Python package into a virtual environment of its own, with PyTorch, and runs its tests, as python/README.md
# does, and those of device memory on the emulated device (docs/emulator.md). Needs python3 with venv, Rust, nvcc
# (scripts/install_nvcc.sh) and PyPI, and a few GB of disk for PyTorch.
#   VENV    an environment that is there, in place of a new one in target/: its absolute path
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR="$PWD/target/python"
cargo fmt --manifest-path python/Cargo.toml -- --check
# Lints do not look at kernels.
env -u CATALOG_SOFTMAX_REQUIRE_NVCC DOCS_RS=1 cargo clippy --manifest-path python/Cargo.toml --locked -- -D warnings
if [ -z "${VENV:-}" ]; then
    VENV="$PWD/target/python-venv"
    rm -rf "$VENV"
    python3 -m venv "$VENV"
fi
# The emulated device interprets PTX.
export CATALOG_SOFTMAX_CUDA_ARCHS="${CATALOG_SOFTMAX_CUDA_ARCHS:-compute_80,compute_86,compute_90a}"
[ -n "${NVCC:-}" ] || scripts/install_nvcc.sh
"$VENV/bin/pip" install --quiet --disable-pip-version-check ./python cuda-bindings pytest safetensors torch
driver=$(CARGO_TARGET_DIR="$PWD/target/emulator" emulator/scripts/build.sh)

on_device() (
    export LD_LIBRARY_PATH="$driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" CUDA_EMULATOR_STRICT=1 REQUIRE_GPU=1
    cd python/tests
    for capability in 80 90; do
        CUDA_EMULATOR_CC=$capability "$VENV/bin/pytest" --quiet -W ignore test_device.py test_device_tables.py
    done
    export CUDA_EMULATOR_CC=90
    # Losses, modules and operators with the code for CUDA tensors.
    "$VENV/bin/pytest" --quiet -W ignore --on-device -k "not 1000_steps" \
        test_loss.py test_golden.py test_modules.py test_operator.py test_distributed_alone.py
    # And those over tables, but for what is of the CPU: steps in place of gradients, float64, errors that the host sees, equality bit
    # for bit of what the device rounds otherwise, and tolerances of 16 bits and golden batches, which the Rust suite has for the device.
    of_the_cpu="update or gradcheck or test_errors or test_views or is_the_dense_one or of_the_scores or test_types"
    of_the_cpu+=" or test_golden_batch"
    "$VENV/bin/pytest" --quiet -W ignore --on-device -k "not 1000_steps and not ($of_the_cpu)" test_tables.py
)
# Beside the others, which have one thread for the most part.
log=target/python-on-device.txt
on_device > "$log" 2>&1 &
others=$!
trap 'kill $others 2> /dev/null || true' EXIT
"$VENV/bin/pytest" --quiet python
wait $others || { cat "$log"; exit 1; }
cat "$log"
