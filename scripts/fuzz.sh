#!/usr/bin/env bash
# Fuzzes what reads bytes from outside (fuzz/fuzz_targets), each target for a time: scripts/fuzz.sh SECONDS [TARGET...]
# RUNS=N ends a target after N inputs, from a corpus of seeds alone, so that each time tries the same; SECONDS is then
# the most that they may take. Without it the corpus grows from one call to the next. Prints what was run, and ends with
# 1 at the first input that fails, whose file it names. SEED=N tries others (1 unless it is given).
#
# libFuzzer comes with the crate libfuzzer-sys and is compiled by the machine's C++ compiler; coverage is LLVM's, which
# any rustc has. So this needs neither nightly nor cargo-fuzz, whose layout and flags these are: `cargo fuzz run TARGET`
# works, too.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:?usage: scripts/fuzz.sh SECONDS [TARGET...]}
shift
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
    for source in fuzz/fuzz_targets/*.rs; do targets+=("$(basename "$source" .rs)"); done
fi
if ! "${CXX:-c++}" --version > /dev/null 2>&1; then
    echo "fuzz: skipped, there is no C++ compiler (${CXX:-c++}) to build libFuzzer with"
    exit 0
fi

coverage="-Cpasses=sancov-module -Ccodegen-units=1 -Cllvm-args=-sanitizer-coverage-level=4"
for part in inline-8bit-counters pc-table trace-compares; do coverage+=" -Cllvm-args=-sanitizer-coverage-$part"; done
host=$(rustc -vV | sed -n 's/^host: //p')
# With a target given, build scripts and macros are built without these flags.
build=(cargo build --quiet --locked --release --manifest-path fuzz/Cargo.toml --target "$host")
for target in "${targets[@]}"; do build+=(--bin "$target"); done
RUSTFLAGS="--cfg fuzzing -Cdebug-assertions -Coverflow-checks $coverage" "${build[@]}"

mkdir -p fuzz/artifacts
# The readers of files get files, which are quick to write there.
if [ -w /dev/shm ]; then export TMPDIR=/dev/shm; fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for target in "${targets[@]}"; do
    log=fuzz/artifacts/$target.log
    if [ -n "${RUNS:-}" ]; then corpus=$scratch/$target; else corpus=fuzz/corpus/$target; fi
    mkdir -p "$corpus"
    # No address sanitizer: the readers are safe code. What a reader takes is bounded by the resident memory.
    limits=(-max_total_time="$seconds" -runs="${RUNS:--1}" -seed="${SEED:-1}")
    limits+=(-rss_limit_mb=512 -timeout=10 -max_len=8192)
    if ! "fuzz/target/$host/release/$target" "$corpus" "${limits[@]}" \
        -artifact_prefix="fuzz/artifacts/$target-" -print_final_stats=1 > "$log" 2>&1; then
        tail -n 40 "$log"
        echo "fuzz: $target failed, see $log"
        exit 1
    fi
    # "#1234 DONE cov: 56 ft: 78 corp: 9/1011b ...": inputs, edges, features (edges with hit counts), corpus.
    summary=$(grep -E '^#[0-9]+\s+DONE' "$log")
    read -r inputs _ _ edges _ features _ corpus _ <<< "$summary"
    took=$(sed -n 's/^Done [0-9]* runs in \([0-9]*\) .*/\1/p' "$log")
    echo "fuzz: $target: ${inputs#"#"} inputs in $took s, $edges edges, $features features, a corpus of $corpus"
done
