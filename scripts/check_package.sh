#!/usr/bin/env bash
# What `cargo publish` would send: nothing but sources, kernels and pages, all that a build needs, and not much of it.
set -euo pipefail
cd "$(dirname "$0")/.."
# Compressed, in KiB. It is 445 (2026-11-30); crates.io takes 10 MiB. A file that does not belong shows as a jump.
limit=600

listed=$(cargo package --list --allow-dirty)
cargo_files='Cargo\.(toml|toml\.orig|lock)|\.cargo_vcs_info\.json'
pages='(README|CHANGELOG|CONTRIBUTING|SECURITY)\.md|LICENSE-(APACHE|MIT)|docs/.*\.(md|svg|toml)'
sources='build\.rs|build/.*\.rs|src/.*\.rs|kernels/.*\.(cu|cuh|h|md)'
belongs="^($cargo_files|$pages|$sources)$"
if grep -vE "$belongs" <<< "$listed"; then
    echo "check_package.sh: these files do not belong in the package; add them to exclude in Cargo.toml" >&2
    exit 1
fi

needed=$(git ls-files Cargo.toml README.md CHANGELOG.md 'LICENSE-*' build.rs build src kernels docs/guide/src)
if missing=$(grep -vxF -f <(echo "$listed") <<< "$needed"); then
    echo "check_package.sh: the package lacks $missing" >&2
    exit 1
fi

cargo package --no-verify --allow-dirty --quiet
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
size=$(($(wc -c < "${CARGO_TARGET_DIR:-target}/package/catalog-softmax-$version.crate") / 1024))
if [ "$size" -gt "$limit" ]; then
    echo "check_package.sh: the package has $size KiB; rule: at most $limit" >&2
    exit 1
fi
echo "the package has $(wc -l <<< "$listed") files and $size KiB"
