#!/usr/bin/env bash
# compute-sanitizer's four tools on a reduced suite of tests/gpu.rs.
#   scripts/sanitize.sh [EXECUTABLE]      default: built here, by cargo
# Exits with 1 where a tool reports errors or a test fails, after all have run, and with 2 where there is no compute-sanitizer.
set -euo pipefail
command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not installed: it comes with the CUDA toolkit" >&2; exit 2; }
if [ $# -gt 0 ]; then
    executable=$1
else
    cd "$(dirname "$0")/.."
    executable=$(cargo test --release --no-run --test gpu --message-format=json-render-diagnostics | python3 -c '
import json, sys
print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])')
fi
export REQUIRE_GPU=1 PROPTEST_CASES=${PROPTEST_CASES:-8}
suite=(golden:: agrees_at_the_edges agrees_on_random steps_on_device a_reserved ranks_count)
# A name that matches no test would pass.
names=$("$executable" --list)
for tests in "${suite[@]}"; do
    grep -q "$tests.*: test$" <<< "$names" || { echo "no test is called $tests" >&2; exit 1; }
done
failed=()
for tool in memcheck racecheck initcheck synccheck; do
    for tests in "${suite[@]}"; do
        echo "== $tool, $tests"
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$executable" "$tests" --test-threads 1 || failed+=("$tool $tests")
    done
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
