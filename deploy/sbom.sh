#!/usr/bin/env bash
# What is in the binary (`make sbom`): target/tollgate.cdx.json, CycloneDX 1.5, by cargo-cyclonedx. Without build and test dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! cargo cyclonedx --version >/dev/null 2>&1; then
    echo "cargo-cyclonedx is not installed (cargo install cargo-cyclonedx --locked)" >&2
    exit 1
fi
mkdir -p target
# It writes beside Cargo.toml. The time would be the only thing that differs between two runs.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) cargo cyclonedx --quiet --format json --spec-version 1.5 --no-build-deps \
    --override-filename tollgate.cdx
mv tollgate.cdx.json target/tollgate.cdx.json
python3 - <<'CHECK'
import json
with open("target/tollgate.cdx.json") as file:
    bom = json.load(file)
names = {part["name"] for part in bom["components"]}
assert bom["bomFormat"] == "CycloneDX" and {"pingora-core", "rustls", "h2", "libsqlite3-sys"} <= names, "parts are missing"
print(f"target/tollgate.cdx.json: {len(bom['components'])} parts")
CHECK
