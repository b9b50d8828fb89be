#!/usr/bin/env bash
# cargo deny on each workspace, by deny.toml: licences, advisories, sources. Needs cargo-deny, and GitHub, which has the
# advisories.
#   scripts/check_dependencies.sh licenses bans sources     # what works without GitHub
set -euo pipefail
cd "$(dirname "$0")/.."
for manifest in Cargo.toml emulator/Cargo.toml fuzz/Cargo.toml integrations/candle/Cargo.toml python/Cargo.toml; do
    echo "== $manifest"
    cargo deny --manifest-path "$manifest" --config deny.toml --all-features --locked check "$@"
done
