#!/usr/bin/env bash
# Runs build.rs under cargo on stubs of nvcc, in a package of its own that has no dependencies: needs no toolkit and no
# network.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset NVCC CUDA_HOME CUDA_PATH DOCS_RS RUSTFLAGS
for variable in CUDA_ARCHS REQUIRE_NVCC DENY_WARNINGS LINEINFO PTXAS_REPORT IMAGES; do unset "CATALOG_SOFTMAX_$variable"; done
if [ -e /usr/local/cuda/bin/nvcc ]; then
    echo "not run: build.rs would find /usr/local/cuda/bin/nvcc" >&2
    exit 0
fi
# A PATH with what a build needs, and no nvcc.
mkdir -p "$work/path" "$work/late"
for tool in cargo rustc cc gcc ld; do
    found=$(if command -v rustup > /dev/null && [[ $tool == cargo || $tool == rustc ]]; then rustup which "$tool"
            else command -v "$tool"; fi)
    ln -s "$found" "$work/path/$tool"
done
export PATH="$work/path:$work/late:/usr/bin:/bin" CARGO_TERM_COLOR=never CARGO_TARGET_DIR="$work/target"
if command -v nvcc > /dev/null; then
    echo "not run: build.rs would find $(command -v nvcc)" >&2
    exit 0
fi

package="$work/package"
mkdir -p "$package/src" "$package/kernels/some"
cp -r build.rs build "$package/"
touch "$package/kernels/one.cu" "$package/kernels/some/two.cu" "$package/kernels/some/three_sm90a.cu"
cat > "$package/Cargo.toml" << 'TOML'
[package]
name = "stubbed"
version = "0.0.0"
edition = "2024"
[features]
default = ["cuda"]
cuda = []
[workspace]
TOML
cat > "$package/src/lib.rs" << 'RUST'
#![allow(dead_code)]
pub mod image {
    pub enum NotBuilt {
        NoCompiler(std::borrow::Cow<'static, str>),
        NoArchitecture(std::borrow::Cow<'static, str>),
        CompilerFailed(std::borrow::Cow<'static, str>),
    }
    pub struct Kernels {
        pub nvcc: (i32, i32),
        pub compressed: bool,
        pub portable: &'static [&'static str],
        pub hopper: &'static [&'static str],
    }
    include!(concat!(env!("OUT_DIR"), "/built.rs"));
}
RUST

# stub FILE VERSION LIST HELP COMPILE...: an nvcc that answers so, and whose compilation is the shell's COMPILE.
stub() {
    cat > "$1" << STUB
#!/bin/sh
case "\$1" in
    --version) echo 'Cuda compilation tools, release $2, V$2.1' ;;
    --list-gpu-arch) for number in $3; do echo "compute_\$number"; done ;;
    --help) echo '$4' ;;
    *) echo "\$@" >> "$work/calls"
       while [ \$# -gt 0 ]; do [ "\$1" = -o ] && output=\$2; known="\$known \$1"; shift; done
       $5 ;;
esac
STUB
    chmod +x "$1"
}
compiles='echo image > "$output"'
# What nvcc 12.4 says of an architecture that came later.
refuses='case "$known" in
    *_100*|*_120*) echo "nvcc fatal   : Unsupported gpu architecture '"'compute_100'"'" >&2; exit 1 ;;
esac'
stub "$work/nvcc-12.4" 12.4 "75 80 86 87 89 90" "--no-compress" "$refuses; $compiles"
stub "$work/nvcc-13.0" 13.0 "75 80 86 89 90 100 120" "--compress-mode [default,size]" "$compiles"
stub "$work/nvcc-fails" 13.0 "80 90 100 120 86 89" "" "echo 'error: no such intrinsic' >&2; exit 1"
stub "$work/nvcc-no-gcc" 13.0 "80 90 100 120 86 89" "" "echo 'gcc: fatal error: cannot execute cc1plus' >&2
    echo 'nvcc fatal: Failed to preprocess host compiler properties.' >&2; exit 1"

failed=0
# build NAME EXPECTED [VARIABLE=VALUE...]: one cargo check; EXPECTED is its exit status, 0 or 101. What it printed is in
# $work/said.
build() {
    local name=$1 expected=$2 status=0
    shift 2
    rm -f "$work/calls"
    touch "$work/calls"
    (cd "$package" && env "$@" cargo check --offline) > "$work/said" 2>&1 || status=$?
    [ $status = "$expected" ] || wrong "$name: cargo exits with $status"
    images=$(find "$work/target" -name '*.fatbin' -size +0 | wc -l)
    built=$(cat "$work"/target/debug/build/*/out/built.rs 2> /dev/null || true)
    echo "$name"
}
wrong() { echo "FAILED: $1" >&2; sed 's/^/    /' "$work/said" >&2; failed=1; }
# says NAME TEXT, records NAME TEXT, compiled NAME COUNT, has NAME COUNT: what the last build must have shown.
says() { grep -qF -- "$2" "$work/said" || wrong "$1: cargo does not say '$2'"; }
silent() { ! grep -qF -- "$2" "$work/said" || wrong "$1: cargo says '$2'"; }
records() { grep -qF -- "$2" <<< "$built" || wrong "$1: the record does not say '$2', but $built"; }
calls() { grep -qF -- "$2" "$work/calls" || wrong "$1: nvcc is not called with $2"; }
never() { ! grep -qF -- "$2" "$work/calls" || wrong "$1: nvcc is called with $2"; }
compiled() {
    local files
    files=$(wc -l < "$work/calls")
    [ "$files" = "$2" ] || wrong "$1: nvcc compiles $files files, not $2"
}
has() { [ "$images" = "$2" ] || wrong "$1: $images images have content, not $2"; }

build "no nvcc" 0
says "no nvcc" "built without CUDA kernels: PATH and /usr/local/cuda have no nvcc"
records "no nvcc" "NotBuilt::NoCompiler"
has "no nvcc" 0
build "no nvcc, again" 0
silent "no nvcc, again" Compiling
silent "no nvcc, again" Checking

stub "$work/late/nvcc" 13.0 "80 86 89 90 100 120" "--compress-mode" "$compiles"
# As a package's files are: older than the build.
touch -d 2020-01-01 "$work/late/nvcc"
build "an nvcc comes to a folder of PATH" 0
has "an nvcc comes to a folder of PATH" 3
build "an nvcc that came, again" 0
silent "an nvcc that came, again" Checking
rm "$work/late/nvcc"

mkdir -p "$package/.cuda/nvidia/cu13/bin"
build "no nvcc once more" 0
has "no nvcc once more" 0
stub "$package/.cuda/nvidia/cu13/bin/nvcc" 13.0 "80 86 89 90 100 120" "--compress-mode" "$compiles"
build "an nvcc comes to a fixed place" 0
has "an nvcc comes to a fixed place" 3
compiled "an nvcc comes to a fixed place" 3
build "another PATH" 0 PATH="$work:$PATH"
has "another PATH" 3
compiled "another PATH" 0
echo '// changed' > "$package/kernels/one.cu"
build "another kernel" 0
compiled "another kernel" 3
rm -r "$package/.cuda"

build "nvcc 12.4" 0 NVCC="$work/nvcc-12.4"
says "nvcc 12.4" "nvcc 12.4 does not know sm_100, sm_120: kernels are built without them"
records "nvcc 12.4" 'nvcc: (12, 4), compressed: false'
records "nvcc 12.4" 'portable: &["sm_80", "sm_86", "sm_89", "sm_90", "compute_80"], hopper: &["sm_90a"]'
has "nvcc 12.4" 3
for flag in -lineinfo --threads=0 -Werror -compress-mode; do never "nvcc 12.4" $flag; done

build "nvcc 13.0" 0 NVCC="$work/nvcc-13.0"
silent "nvcc 13.0" warning
calls "nvcc 13.0" "arch=compute_120,code=sm_120"
calls "nvcc 13.0" -compress-mode=size
records "nvcc 13.0" 'nvcc: (13, 0), compressed: true'
build "warnings are errors" 0 NVCC="$work/nvcc-13.0" CATALOG_SOFTMAX_DENY_WARNINGS=1
calls "warnings are errors" -Werror=all-warnings
build "line numbers" 0 NVCC="$work/nvcc-13.0" CATALOG_SOFTMAX_LINEINFO=1
calls "line numbers" -lineinfo
never "line numbers" -Werror
build "one job" 0 NVCC="$work/nvcc-13.0" CARGO_BUILD_JOBS=1
calls "one job" --threads=1

shared=CATALOG_SOFTMAX_IMAGES="$work/images"
for lines in 1 0; do
    build "images to share, line numbers: $lines" 0 NVCC="$work/nvcc-13.0" "$shared" CATALOG_SOFTMAX_LINEINFO=$lines
    compiled "images to share, line numbers: $lines" 3
done
build "another target folder" 0 NVCC="$work/nvcc-13.0" "$shared" CARGO_TARGET_DIR="$work/target/other"
compiled "another target folder" 0
[ "$(find "$work/target/other" -name '*.fatbin' -size +0 | wc -l)" = 3 ] || wrong "another target folder: no images"
rm -r "$work/target/other"

build "a failing nvcc" 0 NVCC="$work/nvcc-fails"
says "a failing nvcc" "error: no such intrinsic"
records "a failing nvcc" "NotBuilt::CompilerFailed"
has "a failing nvcc" 0
build "an nvcc without g++" 0 NVCC="$work/nvcc-no-gcc"
says "an nvcc without g++" "cannot execute cc1plus"
has "an nvcc without g++" 0
build "NVCC=/bin/false" 0 NVCC=/bin/false
says "NVCC=/bin/false" '/bin/false: `nvcc --version` failed (exit status: 1)'
has "NVCC=/bin/false" 0
build "no architecture" 0 NVCC="$work/nvcc-12.4" CATALOG_SOFTMAX_CUDA_ARCHS=sm_120
records "no architecture" "NotBuilt::NoArchitecture"
has "no architecture" 0

build "a typo in NVCC" 0 NVCC=/nonexistent/nvcc
says "a typo in NVCC" "NVCC=/nonexistent/nvcc: there is no file /nonexistent/nvcc; no other nvcc was found"
build "a typo in CUDA_HOME" 0 CUDA_HOME=/nonexistent NVCC="$work/nvcc-13.0"
says "a typo in CUDA_HOME" "CUDA_HOME=/nonexistent: there is no file /nonexistent/bin/nvcc; $work/nvcc-13.0 is used"
has "a typo in CUDA_HOME" 3

build "no nvcc, required" 101 CATALOG_SOFTMAX_REQUIRE_NVCC=1
says "no nvcc, required" "CATALOG_SOFTMAX_REQUIRE_NVCC=1, and no CUDA kernels are built"
build "a failing nvcc, required" 101 CATALOG_SOFTMAX_REQUIRE_NVCC=1 NVCC="$work/nvcc-fails"
says "a failing nvcc, required" "no such intrinsic"
build "nvcc 12.4, required" 0 CATALOG_SOFTMAX_REQUIRE_NVCC=1 NVCC="$work/nvcc-12.4"
build "before documentation" 0 NVCC="$work/nvcc-13.0"
build "documentation" 0 DOCS_RS=1 NVCC="$work/nvcc-13.0"
silent "documentation" warning
has "documentation" 0
build "after documentation" 0 NVCC="$work/nvcc-13.0"
has "after documentation" 3
exit $failed
