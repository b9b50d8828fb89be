#!/usr/bin/env bash
# Everything that a GPU is needed for, from a bundle of scripts/gpu_bundle.sh on the machine that has one. A short table
# on stdout, all else under OUT. A step that fails is recorded, and the rest runs; exits with 1 where one failed.
#   gpu_all.sh [OUT]                   default: out of the current folder
#   STEPS                              which, of: tests sanitizers errors measure benches peers ncu (default: all)
#   QUERIES, CANDIDATES, DIMS, DTYPES  what is measured (8192, 1000000, "64 128 256 512 1024", bf16); peers and ncu
#                                      take the first type
#   ITERATIONS                         timed calls of each (10)
#   ERRORS_SHAPE                       where errors are taken, BxN (256x8192)
#   NCU_DIM                            the width that Nsight Compute looks at (128)
#   TEST_ARGS                          arguments of the tests, such as a filter
#   GPU_BENCH_SHAPES, BENCH_ARGS       of benches/gpu.rs (BENCH_ARGS: --bench)
#   PEERS_ARGS                         more arguments of benches/peers/gpu.py, such as "--peers eager ours"
# OUT/clocks has the GPU's clocks, power and reasons for throttling while each step ran, five times a second.
# What a machine lacks (compute-sanitizer, ncu, python3, cuBLAS) is said, and is no failure.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-out}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
queries=${QUERIES:-8192} candidates=${CANDIDATES:-1000000} iterations=${ITERATIONS:-10} shape=${ERRORS_SHAPE:-256x8192}
read -ra dims <<< "${DIMS:-64 128 256 512 1024}"
read -ra dtypes <<< "${DTYPES:-bf16}"
read -ra test_args <<< "${TEST_ARGS:-}"
read -ra bench_args <<< "${BENCH_ARGS:---bench}"
read -ra peers_args <<< "${PEERS_ARGS:-}"
export REQUIRE_GPU=1 GOLDEN=${GOLDEN:-$here/golden}
failed=0

wanted() { [[ " ${STEPS:-tests sanitizers errors measure benches peers ncu} " == *" $1 "* ]]; }

# The lines of a step's output that the table has room for, as one.
summary() { grep -E '^test result|passed,|^seconds|^speed' "$1" | tail -n 2 | tr -s ' ' | paste -sd ';'; }

# Newer drivers call throttling by another name.
throttling=clocks_event_reasons.active
nvidia-smi --query-gpu=$throttling --format=csv,noheader > /dev/null 2>&1 || throttling=clocks_throttle_reasons.active
watched=timestamp,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,utilization.gpu,$throttling
mkdir -p "$out/clocks"

# clocks FILE: of the samples in which the GPU was busy, the least and the greatest clock, and the reasons that
# throttled it.
clocks() {
    awk -F ', ' '
        NR > 1 && $7 + 0 > 0 {
            if (!busy++ || $2 + 0 < least) least = $2 + 0
            if ($2 + 0 > greatest) greatest = $2 + 0
            if ($8 !~ /^0x0*[01]?$/) reasons[$8]
        }
        END {
            if (!busy) exit
            printf "; SM clock %d to %d MHz", least, greatest
            for (reason in reasons) printf ", throttled (%s)", reason
        }' "$1"
}

# report NAME COMMAND...: runs it, keeps what it prints and the clocks meanwhile, says how it ended.
report() {
    local name=$1 start=$SECONDS result=ok watcher='' said
    shift
    if command -v nvidia-smi > /dev/null; then
        nvidia-smi --id=0 --query-gpu="$watched" --format=csv --loop-ms=200 > "$out/clocks/$name.csv" 2> /dev/null &
        watcher=$!
    fi
    "$@" > "$out/$name.txt" 2>&1 || { result="FAILED ($?)" failed=1; }
    if [ -n "$watcher" ]; then
        kill "$watcher" 2> /dev/null
        wait "$watcher" 2> /dev/null
        said=$(clocks "$out/clocks/$name.csv")
    fi
    if [ "$result" = ok ]; then said=$(summary "$out/$name.txt")${said:-}; else said=$(tail -n 1 "$out/$name.txt"); fi
    printf '%-34s %-12s %4d s  %s\n' "$name" "$result" $((SECONDS - start)) "$said"
}

# Folders with cuBLAS and NVRTC that the loader does not know: the toolkit's, and those of PyTorch's wheels.
cuda_libraries() {
    ls -d /usr/local/cuda/lib64 2> /dev/null
    python3 -c 'import glob, os, sys
names = [f"{path}/nvidia/*/lib/lib{name}.so*" for path in sys.path for name in ("cublasLt", "nvrtc")]
found = [file for name in names for file in glob.glob(name)]
print("\n".join(sorted({os.path.dirname(f) for f in found})))' 2> /dev/null
}

# measure NAME MODE DIM DTYPE [COMMAND...]: one configuration of the target table.
measure() {
    local name=$1 mode=$2 dim=$3 dtype=$4
    shift 4
    report "$name" "$@" "$here/bin/measure" --backend cuda --queries "$queries" --candidates "$candidates" \
        --dim "$dim" --dtype "$dtype" --mode "$mode" --log-q --ids zipf --iterations "$iterations"
}

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || echo 'no nvidia-smi')
echo "commit $(cat "$here/commit"), $gpu"
nvidia-smi -q > "$out/nvidia-smi.txt" 2>&1

if wanted tests; then
    report tests "$here/bin/gpu" ${test_args[@]+"${test_args[@]}"}
    report tests_portable env GPU_TESTS_HOPPER=0 "$here/bin/gpu" ${test_args[@]+"${test_args[@]}"}
    report golden "$here/bin/replay" --backend cuda "$GOLDEN"/*.safetensors
fi
if wanted errors; then
    for dim in "${dims[@]}"; do
        report "errors_$dim" "$here/bin/errors" --backend cuda --queries "${shape%x*}" --candidates "${shape#*x}" \
            --dim "$dim"
    done
fi
if wanted measure; then
    for dtype in "${dtypes[@]}"; do
        for mode in statistics value_and_grad; do
            for dim in "${dims[@]}"; do measure "measure_${mode}_${dtype}_$dim" "$mode" "$dim" "$dtype"; done
        done
    done
fi
if wanted benches; then
    libraries=$(cuda_libraries | paste -sd :)
    report benches env CRITERION_HOME="$out/criterion" \
        LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}${LD_LIBRARY_PATH:+:}$libraries" "$here/bin/bench_gpu" "${bench_args[@]}"
fi
if wanted peers; then
    if command -v python3 > /dev/null; then
        report peers "$here/peers_gpu.sh" --queries "$queries" --candidates "$candidates" --dims "${dims[@]}" \
            --dtype "${dtypes[0]}" --iterations "$iterations" --out "$out/peers" ${peers_args[@]+"${peers_args[@]}"}
        report peers_errors "$here/peers_gpu.sh" --errors --queries "${shape%x*}" --candidates "${shape#*x}" \
            --dims "${dims[@]}" --dtype "${dtypes[0]}"
    else
        echo "peers: not run, there is no python3"
    fi
fi
if wanted ncu; then
    if command -v ncu > /dev/null; then
        # profile NAME MODE KERNELS: the second launch of a kernel whose name matches, since the first one is cold. Rows
        # of up to 256 elements take one launch of each in a call, so that the second belongs to the call that is timed.
        # Clocks are left as they are. The counters beside the full set say how many passes shared memory takes.
        profile() {
            measure "ncu_$1" "$2" "${NCU_DIM:-128}" "${dtypes[0]}" \
                ncu --clock-control none --set full --metrics "$wavefronts.sum,${wavefronts}_op_ld.sum" \
                --kernel-name "regex:^stream_(hopper_)?(wide_)?($3)_.*" --launch-skip 1 --launch-count 1 \
                --force-overwrite --export "$out/ncu_$1"
        }
        wavefronts=l1tex__data_pipe_lsu_wavefronts_mem_shared
        profile statistics statistics 'statistics|bounded'
        profile expected value_and_grad '(bounded_)?expected'
        profile gradient value_and_grad gradient
        # Wide rows' outputs are a matmul of their own, on Hopper.
        if [ "${NCU_DIM:-128}" -gt 256 ]; then profile output value_and_grad output; fi
        for profiled in "$out"/ncu_*.ncu-rep; do
            ncu --import "$profiled" --page details > "${profiled%.ncu-rep}_details.txt" 2>&1
        done
    else
        echo "ncu: not run, Nsight Compute is not installed"
    fi
fi
if wanted sanitizers; then
    if command -v compute-sanitizer > /dev/null; then
        report sanitizers "$here/sanitize.sh" "$here/bin/gpu"
    else
        echo "sanitizers: not run, compute-sanitizer is not installed"
    fi
fi
exit $failed
