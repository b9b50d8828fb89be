#!/usr/bin/env bash
# The kernels' tests on a machine without a GPU: on an emulated device (emulator/), which interprets their PTX. Builds
# the emulator, compiles the kernels to PTX, runs the GPU suite and the golden batches. What passes has run on no GPU.
#   scripts/test_emulated.sh             what .ci/run runs
#   scripts/test_emulated.sh --matrix    every setting of docs/emulator.md: hours on two cores
#   SETTINGS                             a pattern (bash's, of the table's first column): only those settings
#   JOBS                                 settings at a time: 2 unless it is given, as much of a suite has one thread
#   PROPTEST_CASES                       random problems of each property
#   GOLDEN                               a folder of other golden batches
# Prints a line for each setting; what a setting printed is in target/emulated/. Exits with 1 where one failed. Needs
# what .ci/run needs: rustup's toolchain, python3 with pip, g++, crates.io and PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=quick
[ "${1:-}" != --matrix ] || mode=matrix
if [ $# -gt 1 ] || { [ $# -eq 1 ] && [ "$1" != --matrix ]; }; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=target/emulated
mkdir -p "$out"
[ -n "${NVCC:-}" ] || scripts/install_nvcc.sh
# compute_86: f32 by plain multiply-adds (kernels/portable/plain.cuh). Devices of 8.6 and later run it, that of 8.0 the other PTX.
export CATALOG_SOFTMAX_CUDA_ARCHS=compute_80,compute_86,compute_90a CATALOG_SOFTMAX_REQUIRE_NVCC=1 REQUIRE_GPU=1
export CARGO_TERM_COLOR=never

# The path of an executable that cargo builds: with the profile of `cargo test`, so that what that has built is used.
executable() {
    cargo "$@" --profile test --message-format=json-render-diagnostics | python3 -c '
import json, sys
print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])'
}
driver=$(CARGO_TARGET_DIR="$PWD/target/emulator" emulator/scripts/build.sh)
# Copies, which no later build replaces while they run.
copy() { cp "$2" "$out/$1.exe" && echo "$PWD/$out/$1.exe"; }
gpu=$(copy gpu "$(executable test --no-run --test gpu)")
replay=$(copy replay "$(executable build --example replay)")
errors=$(copy errors "$(executable build --example errors)")
golden=("${GOLDEN:-tests/golden}"/*.safetensors)
export LD_LIBRARY_PATH="$driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

# What failed, a line each: bash forgets how a process ended once another has its number.
failures=$out/failures.txt
: > "$failures"
printf '| setting | result | tests | seconds |\n|---|---|---|---|\n'
# setting NAME COMMAND...: runs it beside the others, at most JOBS at a time.
setting() {
    # shellcheck disable=SC2053  # a pattern
    [[ $1 == ${SETTINGS:-*} ]] || return 0
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-2}" ]; do sleep 0.2; done
    { run_setting "$@" || echo "$1" >> "$failures"; } &
}
# run_setting NAME COMMAND...: keeps what it prints, says how it ended.
run_setting() {
    local name=$1 start=$SECONDS result=passed said
    shift
    local log="$out/${name//[^a-zA-Z0-9.]/_}.txt"
    "$@" > "$log" 2>&1 || result="FAILED ($?)"
    said=$(grep -oE '[0-9]+ passed(; [0-9]+ failed)?|[0-9]+ failed' "$log" | tail -n 1) || true
    # A name that matches no test would pass.
    [[ $said != "0 passed; 0 failed" ]] || result="none ran"
    printf '| %-44s | %-11s | %-22s | %4d s |\n' "$name" "$result" "$said" $((SECONDS - start))
    [ "$result" != passed ] || return 0
    grep -E '^cuda-emulator:|panicked|FAILED' "$log" | head -n 5 || true
    return 1
}
# on CAPABILITY [VARIABLE=VALUE...] -- [ARGUMENT...]: the GPU tests with that environment.
on() {
    local environment=("CUDA_EMULATOR_CC=$1")
    shift
    while [ "$1" != -- ]; do
        environment+=("$1")
        shift
    done
    shift
    env "${environment[@]}" "$gpu" "$@"
}
# Without random problems and the largest shapes: what remains is every kind of step and search once.
short=(--skip property:: --skip topk:: --skip hopper_kernels --skip wide_kernels --skip tf32_is)
strict=CUDA_EMULATOR_STRICT=1
# replay_on CAPABILITY: the golden batches.
replay_on() { env CUDA_EMULATOR_CC="$1" $strict "$replay" --backend cuda "${golden[@]}"; }
races=CUDA_EMULATOR_RACES=1 letter=CUDA_EMULATOR_RACES=2

if [ $mode = quick ]; then
    export PROPTEST_CASES=${PROPTEST_CASES:-4}
    # The longest first, so that no core is idle at the end.
    for capability in 90 80; do setting "suite $capability" on $capability $strict CUDA_EMULATOR_SEED=$capability --; done
    setting "portable kernels 90" on 90 GPU_TESTS_HOPPER=0 -- "${short[@]}"
    # Tests of soundness defer in every setting.
    setting "deferred 90" on 90 CUDA_EMULATOR_DEFER=1 -- "${short[@]}" --skip soundness::
    for capability in 80 90; do
        setting "races $capability" on $capability $races CUDA_EMULATOR_SEED=1 CUDA_EMULATOR_SM=2 -- small::
        setting "races by the letter $capability" on $capability $letter CUDA_EMULATOR_SM=2 -- small::
        setting "golden batches $capability" replay_on $capability
    done
    for capability in 86 89; do setting "99 KiB $capability" on $capability $strict -- small::; done
    setting "benches once" cargo test --bench gpu -- --test
    setting "errors" "$errors" --backend cuda --queries 40 --candidates 600
else
    export PROPTEST_CASES=${PROPTEST_CASES:-20}
    for capability in 80 86 89 90; do
        setting "suite $capability" on $capability $strict CUDA_EMULATOR_SEED=$capability --
        setting "deferred $capability" on $capability CUDA_EMULATOR_DEFER=1 -- "${short[@]}"
        setting "golden batches $capability" replay_on $capability
    done
    setting "portable kernels 90" on 90 GPU_TESTS_HOPPER=0 --
    setting "deferred, portable kernels 90" on 90 GPU_TESTS_HOPPER=0 CUDA_EMULATOR_DEFER=1 -- "${short[@]}"
    export PROPTEST_CASES=5
    for capability in 80 90; do
        setting "races $capability" on $capability $races --
        setting "races by the letter $capability" on $capability $letter --
        for seed in 1 2 3; do
            setting "races $capability, seed $seed" on $capability $races CUDA_EMULATOR_SEED=$seed -- "${short[@]}"
        done
    done
    setting "races, portable kernels 90" on 90 GPU_TESTS_HOPPER=0 $races -- "${short[@]}"
    setting "races 86" on 86 $races -- "${short[@]}"
fi
wait
[ ! -s "$failures" ]
