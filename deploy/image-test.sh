#!/usr/bin/env bash
# Builds the image and runs what is in it: deploy/image-test.sh STATIC_BINARY. As root, who may change the root folder of a process.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "deploy/image-test.sh: $*" >&2; exit 1; }
[[ $EUID -eq 0 ]] || fail "run it as root"
work=$(mktemp -d)
gateway=
clean() {
    [[ -z $gateway ]] || kill "$gateway" 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT

deploy/image.py "$1" >/dev/null
cp target/image/tollgate.tar "$work/first.tar"
deploy/image.py "$1" >/dev/null
cmp target/image/tollgate.tar "$work/first.tar" || fail "two images of one binary differ"
mkdir "$work/image" "$work/root"
tar -xf target/image/tollgate.tar -C "$work/image"
tar -xf "$work"/image/*/layer.tar -C "$work/root"
(cd "$work/root" && find . -type f | sort) >"$work/files"
printf '%s\n' ./etc/group ./etc/passwd ./etc/ssl/certs/ca-certificates.crt ./usr/bin/tollgate | cmp - "$work/files" ||
    fail "the root file system has other files"
[[ -z $(find "$work/root" -perm /6000) ]] || fail "a file of the image has a setuid bit"
[[ $(stat -c '%u %a' "$work/root/var/lib/tollgate") == "10001 750" ]] || fail "/var/lib/tollgate"

# As a runtime starts it: in that root, as that user, with /dev, /etc/hosts and the configuration from outside. The backend's name has
# to be resolved.
mkdir "$work/root/dev"
mknod -m 0666 "$work/root/dev/null" c 1 3
mknod -m 0666 "$work/root/dev/random" c 1 8
mknod -m 0666 "$work/root/dev/urandom" c 1 9
printf '127.0.0.1 localhost backend\n' >"$work/root/etc/hosts"
port=$((20000 + $$ % 5000))
cat >"$work/root/etc/tollgate/tollgate.toml" <<TOML
[server]
listen = ["127.0.0.1:$port"]
[admin]
listen = "127.0.0.1:$((port + 5000))"
[[upstream]]
name = "api"
servers = ["backend:$((port + 5000))"]
[api]
prefixes = ["/healthz"]
[[store]]
kind = "sqlite"
path = "/var/lib/tollgate/tollgate.db"
TOML
inside() { chroot --userspec=10001:10001 "$work/root" /usr/bin/tollgate "$@"; }
inside --version >/dev/null || fail "the binary does not start"
inside check --config /etc/tollgate/tollgate.toml >"$work/log" 2>&1 || { cat "$work/log"; fail "check"; }
token=$(inside token create --config /etc/tollgate/tollgate.toml --user alice 2>"$work/log") || { cat "$work/log"; fail "token create"; }
chroot --userspec=10001:10001 "$work/root" /usr/bin/tollgate run --config /etc/tollgate/tollgate.toml >"$work/log" 2>&1 &
gateway=$!
# The backend is the gateway's own admin listener, which is enough of one.
for _ in $(seq 100); do
    status=$(curl -s -o "$work/body" -w '%{http_code}' -H "PRIVATE-TOKEN: $token" -H 'Host: localhost' "http://127.0.0.1:$port/healthz" || true)
    [[ $status != 200 ]] || break
    kill -0 "$gateway" || { cat "$work/log"; fail "the gateway ended"; }
    sleep 0.1
done
[[ $status == 200 && $(cat "$work/body") == ok ]] || { cat "$work/log"; fail "no answer through the gateway: $status"; }
echo "image: $(wc -l <"$work/files") files, $(stat -c %s target/image/tollgate.tar) bytes; two are the same; it answers in its own root"
