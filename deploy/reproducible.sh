#!/usr/bin/env bash
# Builds the same source in two folders and compares the binaries (`make reproducible`). PROFILE=dist (default) is what is released; dev
# is quicker. The folders' names, the user's home and the time must not be in the binary.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${PROFILE:-dist}
work=$(mktemp -d "${TMPDIR:-/tmp}/tollgate-reproducible.XXXXXX")
trap 'rm -rf "$work"' EXIT
home=${CARGO_HOME:-$HOME/.cargo}
sums=()
for folder in one a/folder/with/another/name; do
    mkdir -p "$work/$folder"
    # What is committed, without anything that a build left behind.
    git archive HEAD | tar -x -C "$work/$folder"
    (
        cd "$work/$folder"
        export RUSTFLAGS="--remap-path-prefix=$PWD=/tollgate --remap-path-prefix=$home=/cargo"
        # C sources name their files in assertions. The variable takes the place of the one in .cargo/config.toml.
        own=$(sed -n 's/^CFLAGS = "\(.*\)"$/\1/p' .cargo/config.toml)
        export CFLAGS="$own -ffile-prefix-map=$PWD=/tollgate -ffile-prefix-map=$home=/cargo"
        # SQLite, mimalloc and zlib must not learn the time.
        SOURCE_DATE_EPOCH=$(git -C "$OLDPWD" log -1 --format=%ct) CARGO_INCREMENTAL=0 CARGO_TARGET_DIR="$PWD/target" \
            cargo build --locked --quiet --profile "$profile" --bin tollgate ${OFFLINE:+--offline}
    )
    built=$work/$folder/target/$([ "$profile" = dev ] && echo debug || echo "$profile")/tollgate
    for name in "$work" "$home"; do
        if grep -qaF "$name" "$built"; then echo "note: $name is in the binary: $(grep -aoF "$name" "$built" | wc -l) times"; fi
    done
    sum=$(sha256sum "$built" | cut -d' ' -f1)
    echo "$sum  $folder ($(stat -c %s "$built") bytes, profile $profile)"
    sums+=("$sum")
    [ "${#sums[@]}" -ne 1 ] || cp "$built" "$work/first"
done
if [ "${sums[0]}" != "${sums[1]}" ]; then
    echo "the binaries differ in $(cmp -l "$work/first" "$built" | wc -l) bytes"
    exit 1
fi
echo "the same"
