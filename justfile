# A contributor's commands. `just` (cargo install just) lists them; each is a line that also runs without it.

[private]
default:
    @just --list --unsorted

# the crate's suite, doc tests and the guide's Rust among it: `just test --lib`, `just test properties`
test *arguments:
    cargo test {{arguments}}

# formats the Rust of all workspaces; `just format --check` only looks
format *arguments:
    scripts/format.sh {{arguments}}

# clippy, without kernels
lint:
    DOCS_RS=1 cargo clippy --workspace --all-targets -- -D warnings

# the documentation of types and functions, in a browser
doc:
    DOCS_RS=1 cargo doc --no-deps --open

# the guide: figures from docs/results.md, links, and the book in docs/guide/book
guide:
    scripts/guide_figures.py
    scripts/check_links.py
    scripts/build_guide.sh

# the Python package and its tests, in an environment of its own
python:
    scripts/test_python.sh

# candle's package: its lints with the CUDA path's types, and its tests
candle:
    integrations/candle/check_cuda.sh
    cargo test --manifest-path integrations/candle/Cargo.toml

# an nvcc in .cuda/, which builds the kernels
nvcc:
    scripts/install_nvcc.sh

# the kernels' suite on an emulated device
emulated *arguments:
    scripts/test_emulated.sh {{arguments}}

# each fuzz target for some seconds: `just fuzz 60`
fuzz seconds="20":
    scripts/fuzz.sh {{seconds}}

# one configuration's time and memory: `just measure --queries 512 --candidates 100000`
measure *arguments:
    cargo run --release --example measure -- {{arguments}}

# what would be published: its files and its size
package:
    scripts/check_package.sh

# licences, advisories and sources of all dependencies (cargo install cargo-deny)
deny:
    scripts/check_dependencies.sh

# everything that a change must pass
ci:
    .ci/run

# refuses commits that are not formatted or have broken links
hooks:
    git config core.hooksPath scripts/hooks
