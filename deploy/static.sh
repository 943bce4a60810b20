#!/usr/bin/env bash
# Builds a static tollgate, which needs no library of the system: deploy/static.sh [PROFILE] prints its path. PROFILE: dist (default) or
# dev, which is quicker. glibc and not musl: it is there wherever Rust builds, and names are resolved by the same code as usual (files
# and DNS are within glibc's static library; other sources of /etc/nsswitch.conf are not).
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${1:-dist}
target=$(rustc --print host-tuple)
RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=pie" \
    cargo build --locked --profile "$profile" --target "$target" --target-dir target/static --bin tollgate >&2
binary=target/static/$target/${profile/#dev/debug}/tollgate
# The kernel's own word: a static binary names no interpreter.
! readelf --program-headers --wide "$binary" | grep -q INTERP || { echo "deploy/static.sh: $binary is not static" >&2; exit 1; }
echo "$binary"
