#!/usr/bin/env bash
# Formats the Rust of all workspaces. With --check it changes nothing, and fails where something is not formatted.
set -euo pipefail
cd "$(dirname "$0")/.."
for manifest in Cargo.toml emulator/Cargo.toml emulator/tests/cudarc-client/Cargo.toml fuzz/Cargo.toml python/Cargo.toml; do
    cargo fmt --all --manifest-path "$manifest" -- "$@"
done
