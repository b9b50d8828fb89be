#!/usr/bin/env bash
# Builds what a GPU machine needs, with no Rust there: test, bench and example executables (kernels are inside), golden
# batches, the kernels' list with checksums, the peers' scripts with wheels of what PyTorch does not bring, and
# gpu_all.sh.
#   scripts/gpu_bundle.sh [FOLDER]        default: target/gpu-bundle
#   CATALOG_SOFTMAX_CUDA_ARCHS            the GPU's architectures: sm_90,sm_90a (H100, H200) where not given
#   PROFILE                               cargo's profile: release where not given; test takes what `cargo test` has built
#   CATALOG_SOFTMAX_LINEINFO=1            line numbers of kernels, for profilers and sanitizers
# Fails where the bundle is larger than 60 MiB.
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=${1:-target/gpu-bundle}
profile=${PROFILE:-release}
limit_mib=60
export CATALOG_SOFTMAX_REQUIRE_NVCC=1 CATALOG_SOFTMAX_CUDA_ARCHS=${CATALOG_SOFTMAX_CUDA_ARCHS:-sm_90,sm_90a}

# Only an older bundle is replaced.
if [ -e "$bundle" ] && [ ! -f "$bundle/gpu_all.sh" ] && [ -n "$(ls -A "$bundle")" ]; then
    echo "$bundle is there and is no bundle" >&2
    exit 1
fi
rm -rf "$bundle"
mkdir -p "$bundle/bin" "$bundle/peers" "$bundle/wheels"
# First, since it says that the folder is a bundle: one that was not finished can be replaced, too.
cp scripts/gpu_all.sh "$bundle/"
# Name and path of each executable: a bench has the name of a test.
cargo build --profile "$profile" --test gpu --bench gpu --bench softmax --example replay --example measure \
    --example errors --example train_two_tower --message-format=json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        target = message["target"]
        print(("bench_" if target["kind"] == ["bench"] else "") + target["name"], message["executable"])' |
    while read -r name path; do
        strip -o "$bundle/bin/$name" "$path"
    done
cp -r tests/golden scripts/sanitize.sh scripts/peers_gpu.sh "$bundle/"
cp benches/peers/*.py "$bundle/peers/"
# What the peers import and PyTorch does not bring: all three are pure Python.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$bundle/wheels" \
    cut-cross-entropy liger-kernel packaging ||
    echo "no wheels of the peers: the GPU machine has to fetch them" >&2
{
    echo "# built for $CATALOG_SOFTMAX_CUDA_ARCHS"
    sha256sum kernels/*/*.{cu,cuh,h}
} > "$bundle/kernels"
git describe --always --dirty > "$bundle/commit"
kib=$(du -sk --apparent-size "$bundle" | cut -f1)
echo "$bundle: $((kib / 1024)) MiB for $CATALOG_SOFTMAX_CUDA_ARCHS, commit $(cat "$bundle/commit")"
if [ "$kib" -gt $((limit_mib * 1024)) ]; then
    echo "more than $limit_mib MiB; the largest files:" >&2
    du -ak "$bundle" | sort -rn | sed -n 2,9p >&2
    exit 1
fi
