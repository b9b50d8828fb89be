#!/usr/bin/env bash
# The size of each fat binary, from what a build with CATALOG_SOFTMAX_PTXAS_REPORT=FOLDER leaves. Every executable that
# uses the crate holds all of them: fails where they have more than 12 MB together.
#   scripts/check_sizes.sh FOLDER
set -euo pipefail
shopt -s nullglob
sizes=("$1"/*.bytes)
[ ${#sizes[@]} -gt 0 ] || { echo "no size of a fat binary in $1" >&2; exit 1; }
sort -rn "${sizes[@]}" | awk '
    { printf "%-24s %6.2f MB\n", $2, $1 / 1e6; sum += $1 }
    END { printf "%-24s %6.2f MB, at most 12\n", NR " fat binaries", sum / 1e6; exit sum > 12e6 }
'
