#!/usr/bin/env bash
# Clippy with the feature `cuda`, on any machine. Candle compiles its own kernels when it is built,
# which takes a long time, and checking types needs none of them: so a stand-in for nvcc leaves empty files in their
# place. What is built here cannot run.
#   check_cuda.sh [options of cargo clippy, such as --target-dir DIR]
set -euo pipefail
cd "$(dirname "$0")"
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
cat > "$tools/nvcc" << 'NVCC'
#!/usr/bin/env bash
set -euo pipefail
output='' folder='' source=''
while [ $# -gt 0 ]; do
    case "$1" in
        # In the fourth line, where the build script of cudarc looks for it.
        --version) printf '\n\n\nCuda compilation tools, release 13.0, V13.0.88\n'; exit ;;
        -o) output=$2; shift ;;
        --output-directory) folder=$2; shift ;;
        *.cu) source=$1 ;;
    esac
    shift
done
if [ -n "$output" ]; then : > "$output"; elif [ -n "$folder" ]; then : > "$folder/$(basename "$source" .cu).ptx"; fi
NVCC
chmod +x "$tools/nvcc"
# DOCS_RS: neither does this repository's crate compile its kernels.
unset CATALOG_SOFTMAX_REQUIRE_NVCC
export DOCS_RS=1 NVCC="$tools/nvcc" PATH="$tools:$PATH" CUDA_COMPUTE_CAP=80
cargo clippy --features cuda --all-targets "$@" -- -D warnings
