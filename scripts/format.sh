#!/usr/bin/env bash
# Formats the Rust of all workspaces. With --check it changes nothing, and fails where something is not formatted.
set -euo pipefail
cd "$(dirname "$0")/.."
for folder in . emulator emulator/tests/cudarc-client fuzz integrations/candle python; do
    cargo fmt --all --manifest-path "$folder/Cargo.toml" -- "$@"
done
