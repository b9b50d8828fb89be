#!/usr/bin/env bash
# Runs a command on a machine whose processor seems to have other caches:
#
#   scripts/with_cache_sizes.sh 2048K 32768K cargo test        second-level cache, third-level cache, command
#
# The matmul library reads the sizes of the caches from the kernel's files under /sys/devices/system/cpu. The command runs in a
# mount namespace of its own, in which that folder is a copy with these sizes; nothing else of the machine changes.
# Needs Linux and either root or a kernel that lets users make namespaces.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 SECOND_LEVEL THIRD_LEVEL COMMAND [ARGUMENT...], with sizes such as 2048K" >&2
    exit 2
fi
second_level=$1 third_level=$2
shift 2

real=/sys/devices/system/cpu
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

# The files that tell how many processors there are; others, such as frequencies, are left out.
for file in online possible present; do
    cp "$real/$file" "$copy/$file"
done
cache() { # LEVEL TYPE SIZE WAYS
    local folder=$copy/cpu0/cache/index$1$2
    mkdir -p "$folder"
    echo "$1" >"$folder/level"
    echo "$2" >"$folder/type"
    echo "$3" >"$folder/size"
    echo "$4" >"$folder/ways_of_associativity"
    echo 64 >"$folder/coherency_line_size"
    echo 0 >"$folder/shared_cpu_list"
}
cache 1 Data 32K 8
cache 2 Unified "$second_level" 16
cache 3 Unified "$third_level" 16

namespace=(unshare --mount)
[ "$(id -u)" = 0 ] || namespace+=(--map-root-user)
"${namespace[@]}" bash -euc 'mount --bind "$1" "$2"; shift 2; exec "$@"' -- "$copy" "$real" "$@"
