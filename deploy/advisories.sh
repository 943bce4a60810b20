#!/usr/bin/env bash
# Known vulnerabilities of the crates in the tree (`make advisories`). Refreshes a copy of RustSec's database, and pins the state that
# was used in target/advisories. Where the database cannot be reached, the copy of an earlier run is used if there is one; without
# any, nothing is checked, which is said, and is no failure: CI has no network. What is found is one.
set -euo pipefail
cd "$(dirname "$0")/.."
deny=${CARGO_DENY:-cargo-deny}
copies=${CARGO_HOME:-$HOME/.cargo}/advisory-dbs
if ! command -v "$deny" >/dev/null; then
    echo "NOT CHECKED: cargo-deny is not installed (cargo install cargo-deny --locked)"
    exit 0
fi
if ! timeout 120 "$deny" fetch db >target/advisories.log 2>&1; then
    echo "the database cannot be refreshed: $(grep -m1 -iE 'error|fatal' target/advisories.log || tail -1 target/advisories.log)"
fi
copy=$(find "$copies" -mindepth 1 -maxdepth 1 -name 'advisory-db-*' -type d 2>/dev/null | head -1)
if [ -z "$copy" ] || ! state=$(git -C "$copy" log -1 --format='%H of %cs' 2>/dev/null); then
    echo "NOT CHECKED: there is no copy of the database in $copies; run this once with network access to github.com"
    exit 0
fi
echo "$state" | tee target/advisories
# --disable-fetch: exactly the state that was named.
"$deny" --offline --locked check --disable-fetch advisories
