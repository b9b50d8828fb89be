#!/usr/bin/env bash
# Runs a bundle of scripts/gpu_bundle.sh on the machine with the GPU: tests, golden batches, sanitizers, times. A short table on
# stdout, everything else in $OUT (default: out).
#   QUERIES, CANDIDATES, DIMS, DTYPE   what is timed (default: 8192, 1000000, "128 256", bf16)
#   SANITIZE=0                         without the sanitizers
set -uo pipefail
cd "$(dirname "$0")"
out=${OUT:-out}
mkdir -p "$out"
export REQUIRE_GPU=1 GOLDEN=${GOLDEN:-$PWD/golden}
failed=0

# report NAME COMMAND...: runs it, keeps what it prints, says how it ended.
report() {
    local name=$1
    shift
    local start=$SECONDS
    if "$@" > "$out/$name.txt" 2>&1; then local result=ok; else local result="FAILED ($?)" && failed=1; fi
    printf '%-34s %-12s %4d s  %s\n' "$name" "$result" $((SECONDS - start)) "$(grep -E '^test result|passed,|^seconds' "$out/$name.txt" | tail -n 1)"
}

echo "commit $(cat commit), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo 'no nvidia-smi')"
report tests bin/gpu
report tests_portable env GPU_TESTS_HOPPER=0 bin/gpu
report golden bin/replay --backend cuda "$GOLDEN"/*.safetensors
for mode in statistics value_and_grad; do
    for dim in ${DIMS:-128 256}; do
        report "measure_${mode}_$dim" bin/measure --backend cuda --queries "${QUERIES:-8192}" \
            --candidates "${CANDIDATES:-1000000}" --dim "$dim" --dtype "${DTYPE:-bf16}" --mode "$mode" --log-q --mask ids \
            --iterations "${ITERATIONS:-10}"
    done
done
if [ "${SANITIZE:-1}" != 1 ]; then
    echo "sanitizers: not asked for"
elif command -v compute-sanitizer > /dev/null; then
    report sanitizers ./sanitize.sh bin/gpu
else
    echo "sanitizers: not run, compute-sanitizer is not installed"
fi
exit $failed
