#!/usr/bin/env bash
# Rehearses a day on a GPU: builds a bundle and runs its gpu_all.sh whole, on the emulated device and tiny shapes. What
# is not there (nvidia-smi, ncu, compute-sanitizer, PyTorch) has stubs, which record how they are called; then the calls
# are checked.
#   scripts/rehearse_gpu_day.sh
#   EMULATOR     runs a command with the emulated driver (emulator/scripts/run.sh)
#   BUNDLE       a bundle with PTX that is there, in place of a new one
#   PROFILE      cargo's profile of a new bundle: test where not given, so that what `cargo test` has built is taken
set -euo pipefail
cd "$(dirname "$0")/.."
export PROFILE=${PROFILE:-test} CUDA_EMULATOR_TARGET=${CUDA_EMULATOR_TARGET:-$PWD/target/emulator}
emulator=$(realpath "${EMULATOR:-emulator/scripts/run.sh}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=${BUNDLE:-$work/bundle} out=$work/out calls=$work/calls
mkdir -p "$work/stubs" "$calls"

if [ -z "${BUNDLE:-}" ]; then CATALOG_SOFTMAX_CUDA_ARCHS=compute_80,compute_90a scripts/gpu_bundle.sh "$bundle"; fi

# ---- stubs: each writes its arguments, one call a line, to a file of its name

stub() {
    { printf '#!/usr/bin/env bash\nprintf "%%s\\n" "$*" >> "%s/%s"\n' "$calls" "$1"; cat; } > "$work/stubs/$1"
    chmod +x "$work/stubs/$1"
}
# An older driver's: it does not know clocks_event_reasons. Samples until it is ended.
stub nvidia-smi << 'STUB'
[[ "$*" != *clocks_event_reasons* ]] || exit 2
case "$*" in
    *--loop-ms*)
        echo timestamp, clocks
        while true; do
            echo '2026/01/01 00:00:00.000, 1100 MHz, 2000 MHz, 1980 MHz, 99.00 W, 30, 0 %, 0x0000000000000001'
            echo '2026/01/01 00:00:00.200, 1755 MHz, 2619 MHz, 1980 MHz, 650.00 W, 61, 100 %, 0x0000000000000004'
            echo '2026/01/01 00:00:00.400, 1980 MHz, 2619 MHz, 1980 MHz, 400.00 W, 61, 97 %, 0x0000000000000000'
            sleep 0.2
        done ;;
    *name,driver_version*) echo 'a stub, 580.00' ;;
esac
STUB
# Runs what it profiles, and leaves a report.
stub ncu << 'STUB'
while [ $# -gt 0 ]; do
    case "$1" in
        --import) exit 0 ;;
        --export) touch "$2.ncu-rep"; shift 2 ;;
        --clock-control | --set | --metrics | --kernel-name | --launch-skip | --launch-count) shift 2 ;;
        --force-overwrite) shift ;;
        --*) echo "unknown option $1" >&2; exit 1 ;;
        *) exec "$@" ;;
    esac
done
STUB
# Only records: the suite under four tools would take an hour here.
stub compute-sanitizer < /dev/null
# Python with PyTorch, but without its peers: those must come from the bundle, as there is no network.
real_python=$(command -v python3)
stub python-with-torch << STUB
case "\$*" in
    *"find_spec('torch')"* | *"find_spec('numpy')"* | *"find_spec('matplotlib')"*) exit 0 ;;
    *gpu.py*) exit 0 ;;
esac
export PIP_NO_INDEX=1
exec "$real_python" "\$@"
STUB

# ---- the day

echo "== gpu_all.sh"
status=0
PATH="$work/stubs:$PATH" PYTHON="$work/stubs/python-with-torch" PYTHONNOUSERSITE=1 \
    QUERIES=40 CANDIDATES=300 DIMS="64 512" ITERATIONS=2 ERRORS_SHAPE=8x64 NCU_DIM=512 TEST_ARGS=golden:: \
    BENCH_ARGS=--test GPU_BENCH_SHAPES=40x304x64 CUDA_EMULATOR_CC=90 \
    "$emulator" "$bundle/gpu_all.sh" "$out" | tee "$work/table" || status=$?

# ---- what must have happened

failed=0
wrong() { echo "FAILED: $*" >&2; failed=1; }
[ $status = 0 ] || { wrong "gpu_all.sh exits with $status"; tail -n 20 "$out"/*.txt >&2; }
for step in tests tests_portable golden errors_{64,512} measure_{statistics,value_and_grad}_bf16_{64,512} benches \
    peers{,_errors} ncu_{statistics,expected,gradient,output} sanitizers; do
    grep -Eq "^$step +ok" "$work/table" || wrong "step $step is not ok"
    [ -e "$out/clocks/$step.csv" ] || wrong "no clocks of step $step"
done
for suite in tests tests_portable; do
    grep -Eq 'test result: ok. [1-9][0-9]* passed' "$out/$suite.txt" || wrong "no test ran in $suite"
done
# A short step may be over before its first sample.
grep -Eq '^tests .*SM clock 1755 to 1980 MHz, throttled \(0x0+4\)$' "$work/table" ||
    wrong "the table does not say clocks and throttling: $(grep '^tests ' "$work/table")"
ps -ef | grep "[n]vidia-smi.*$work" && wrong "a watcher of clocks still runs"

# Nsight Compute: the kernels that its regular expressions match, and nothing else. The names are those of the images that
# this checkout has built, since an executable holds its images compressed.
names=$(find target -path '*/build/catalog-softmax-*/out/*.fatbin' -size +0 -exec .cuda/nvidia/cu13/bin/cuobjdump -ptx {} \; |
    grep -oP '\.entry \Kstream_\w+' | sort -u) || wrong "no kernel of a stream is in target/"
profiled() { sed -n "s|.*--kernel-name regex:\([^ ]*\) .*--export $out/ncu_$1 .*|\1|p" "$calls/ncu"; }
# matches NAME KERNEL...: the expression of that profile matches these, and every match is one of them with another
# number or type.
matches() {
    local name=$1 expression matched kernel
    shift
    expression=$(profiled "$name")
    if [ -z "$expression" ]; then
        wrong "ncu is not called for $name"
        return
    fi
    matched=$(grep -E -- "$expression" <<< "$names" || true)
    for kernel in "$@"; do
        grep -qx "${kernel}_\([0-9]_\)\?bf16" <<< "$matched" || wrong "ncu's $expression matches no $kernel"
        matched=$(grep -vx "${kernel}_\([0-9]_\)\?\(bf16\|f16\|f32\|tf32\)" <<< "$matched" || true)
    done
    [ -z "$matched" ] || wrong "ncu's $expression matches $matched"
}
matches statistics stream_statistics stream_hopper_{statistics,bounded,bounded_expected,wide_statistics,wide_bounded}
matches expected stream_expected stream_hopper_{expected,bounded_expected,wide_expected}
matches gradient stream_gradient stream_hopper_{gradient,wide_gradient}
matches output stream_hopper_wide_output
for wanted in "--launch-skip 1" "--launch-count 1" l1tex__data_pipe_lsu_wavefronts_mem_shared.sum "--set full" \
    "--clock-control none"; do
    [ "$(grep -cF -- "$wanted" "$calls/ncu")" = 4 ] || wrong "ncu is not called with $wanted for each kernel"
done
[ "$(grep -c -- '--import' "$calls/ncu")" = 4 ] || wrong "ncu's reports are not read"

for tool in memcheck racecheck initcheck synccheck; do
    grep -q -- "--tool $tool --error-exitcode 1 $bundle/bin/gpu" "$calls/compute-sanitizer" || wrong "$tool is not run"
done

timed="gpu.py --bin $bundle/bin --queries 40 --candidates 300 --dims 64 512 --dtype bf16 --iterations 2 --out $out/"
grep -q "$timed" "$calls/python-with-torch" || wrong "the peers are not timed"
grep -q "gpu.py --bin $bundle/bin --errors" "$calls/python-with-torch" || wrong "the peers' errors are not taken"
for module in cut_cross_entropy liger_kernel packaging; do
    [ -d "$bundle/packages/$module" ] || wrong "$module is not carried in the bundle"
done
[ $failed = 1 ] || echo "the rehearsal went well"
exit $failed
