#!/bin/sh
# Formatting, lints and tests of the emulator. Needs nvcc, found by NVCC, CUDA_HOME or PATH.
# CARGO_TARGET_DIR says where to build; without it, a folder in the user's cache. CLIENT=0 leaves out the client, a
# program that uses the driver through cudarc.
set -eu
cd "$(dirname -- "$0")/.."
nvcc=${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/}nvcc}
command -v "$nvcc" > /dev/null || { echo "no nvcc at $nvcc: tests would pass unrun" >&2; exit 1; }
: "${CARGO_TARGET_DIR:=${XDG_CACHE_HOME:-$HOME/.cache}/cuda-emulator}"
export CARGO_TARGET_DIR
packages=.
[ "${CLIENT:-1}" = 0 ] || packages=". tests/cudarc-client"
for package in $packages; do
    cargo fmt --manifest-path "$package/Cargo.toml" -- --check
    cargo clippy --quiet --manifest-path "$package/Cargo.toml" --all-targets -- -D warnings
done
cargo test
if [ "$packages" != . ]; then
    CUDA_EMULATOR_TARGET=$CARGO_TARGET_DIR scripts/run.sh cargo test --manifest-path tests/cudarc-client/Cargo.toml
fi
