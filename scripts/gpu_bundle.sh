#!/usr/bin/env bash
# Builds what a GPU machine needs, with no Rust there: test, bench and example executables (kernels are inside), golden
# batches, the kernels' list with checksums, and run.sh.
#   scripts/gpu_bundle.sh [FOLDER]        default: target/gpu-bundle
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=${1:-target/gpu-bundle}
export CATALOG_SOFTMAX_REQUIRE_NVCC=1

# Paths of the executables that a cargo command builds.
executables() {
    cargo "$@" --message-format=json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}

# Only an older bundle is replaced.
if [ -e "$bundle" ] && [ ! -f "$bundle/run.sh" ] && [ -n "$(ls -A "$bundle")" ]; then
    echo "$bundle is there and is no bundle" >&2
    exit 1
fi
rm -rf "$bundle"
mkdir -p "$bundle/bin"
{
    executables test --release --no-run --test gpu
    executables build --release --example replay --example measure --example train_two_tower
    executables bench --no-run --bench softmax | sed 's/^softmax /bench_softmax /'
} | while read -r name path; do
    strip -o "$bundle/bin/$name" "$path"
done
cp -r tests/golden scripts/sanitize.sh scripts/gpu_run.sh "$bundle/"
mv "$bundle/gpu_run.sh" "$bundle/run.sh"
{
    echo "# built for ${CATALOG_SOFTMAX_CUDA_ARCHS:-the architectures of build.rs}"
    sha256sum kernels/*.{cu,cuh,h}
} > "$bundle/kernels"
git describe --always --dirty > "$bundle/commit"
echo "$bundle: $(du -sh "$bundle" | cut -f1), commit $(cat "$bundle/commit")"
