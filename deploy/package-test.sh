#!/usr/bin/env bash
# Installs the Debian package on this machine, upgrades, removes and purges it, and looks at what is there after each:
# deploy/package-test.sh BINARY. For machines that are thrown away, as root. Refuses to run where tollgate is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:?the binary to package}

fail() { echo "deploy/package-test.sh: $*" >&2; exit 1; }
[[ $EUID -eq 0 ]] || fail "run it as root, on a machine that is thrown away"
! dpkg-query -W -f '${Status}' tollgate 2>/dev/null | grep -q 'installed' || fail "tollgate is installed here"
for path in /etc/tollgate /var/lib/tollgate /var/log/tollgate; do [[ ! -e $path ]] || fail "$path exists"; done

work=$(mktemp -d)
gateway=
backend=
clean() {
    [[ -z $gateway ]] || kill "$gateway" 2>/dev/null || true
    [[ -z $backend ]] || kill "$backend" 2>/dev/null || true
    dpkg --purge tollgate >/dev/null 2>&1 || true
    rm -rf "$work" /var/lib/tollgate /var/log/tollgate /etc/tollgate
}
trap clean EXIT
began=$(date +%s)
step() { echo "$(($(date +%s) - began)) s: $*"; }

for version in 0.1.0 0.1.1; do
    VERSION=$version COMPRESSION=gzip deploy/package.sh "$binary" >/dev/null
    cp "target/package/tollgate_$version-1_$(dpkg --print-architecture).deb" "$work/$version.deb"
done
step "packaged twice, $(stat -c %s "$work/0.1.0.deb") bytes"
said=$(lintian --fail-on error,warning "$work/0.1.0.deb" 2>&1) || { echo "$said"; fail "lintian finds fault"; }
step "lintian finds nothing"

dpkg -i "$work/0.1.0.deb" >"$work/log" 2>&1 || { cat "$work/log"; fail "cannot be installed"; }
grep -q 'set the backend in /etc/tollgate/tollgate.toml' "$work/log" || fail "the installation does not say what comes next"
id tollgate >/dev/null || fail "there is no user tollgate"
[[ $(command -v tollgate) == /usr/bin/tollgate ]] || fail "tollgate is not in PATH"
# From the package: machines without manual pages leave them out when they install.
dpkg-deb -x "$work/0.1.0.deb" "$work/files"
for page in tollgate tollgate-run tollgate-token tollgate-check; do
    man --warnings -l "$work/files/usr/share/man/man1/$page.1.gz" >"$work/page" 2>"$work/warnings" || fail "man $page"
    [[ -s $work/page && ! -s $work/warnings ]] || { cat "$work/warnings"; fail "man $page"; }
done
bash -n "$work"/files/usr/share/bash-completion/completions/tollgate || fail "the completions are no bash"
logrotate --debug /etc/logrotate.d/tollgate >"$work/log" 2>&1 || { cat "$work/log"; fail "logrotate"; }
step "installed; manual pages, completions and logrotate's file are good"

# What systemd makes at the start of the service.
install -d -o tollgate -g tollgate -m 0750 /var/lib/tollgate /var/log/tollgate
as_tollgate() { setpriv --reuid tollgate --regid tollgate --clear-groups --no-new-privs -- "$@"; }
python3 -u -c '
import http.server
class Backend(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "3"); self.end_headers(); self.wfile.write(b"ok\n")
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Backend)
print(server.server_port)
server.serve_forever()' >"$work/port" &
backend=$!
while [[ ! -s $work/port ]]; do sleep 0.1; done
sed -i "s/127.0.0.1:3000/127.0.0.1:$(cat "$work/port")/" /etc/tollgate/tollgate.toml
as_tollgate tollgate check --config /etc/tollgate/tollgate.toml >"$work/log" 2>&1 || { cat "$work/log"; fail "check refuses the package's configuration"; }
token=$(as_tollgate tollgate token create --config /etc/tollgate/tollgate.toml --user alice)
command=$(sed -n 's/^ExecStart=//p' /usr/lib/systemd/system/tollgate.service)
# shellcheck disable=SC2086
(cd /var/lib/tollgate && exec setpriv --reuid tollgate --regid tollgate --clear-groups --no-new-privs -- $command) 2>"$work/gateway.log" &
gateway=$!
for _ in $(seq 100); do
    [[ $(curl -s -o "$work/body" -w '%{http_code}' -H "PRIVATE-TOKEN: $token" http://127.0.0.1:8080/api/v3/user) != 200 ]] || break
    kill -0 "$gateway" || { cat "$work/gateway.log"; fail "the service does not start"; }
    sleep 0.1
done
[[ $(cat "$work/body") == ok ]] || { cat "$work/gateway.log"; fail "no answer of the backend"; }
[[ $(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8080/api/v3/user) == 401 ]] || fail "without a token: not 401"
grep -q '"user":"alice"' /var/log/tollgate/access.log || fail "no line in the access log"
step "the service's command answers for a token, and 401 without"

dpkg -i "$work/0.1.1.deb" >"$work/log" 2>&1 </dev/null || { cat "$work/log"; fail "cannot be upgraded"; }
grep -q "127.0.0.1:$(cat "$work/port")" /etc/tollgate/tollgate.toml || fail "the upgrade changed the configuration"
kill -0 "$gateway" || fail "the upgrade ended the gateway"
as_tollgate tollgate upgrade --config /etc/tollgate/tollgate.toml >"$work/log" || { cat "$work/log"; fail "tollgate upgrade"; }
next=$(sed -n 's/^upgraded: process \([0-9]*\) .*/\1/p' "$work/log")
[[ $(curl -s -H "PRIVATE-TOKEN: $token" http://127.0.0.1:8080/api/v3/user) == ok ]] || fail "no answer after the upgrade"
wait "$gateway" || fail "the replaced gateway ended with an error"
gateway=$next
step "upgraded: the configuration stays, and the new binary took over"

kill "$gateway"
while kill -0 "$gateway" 2>/dev/null; do sleep 0.1; done
gateway=
dpkg --remove tollgate >"$work/log" 2>&1
[[ ! -e /usr/bin/tollgate && -e /etc/tollgate/tollgate.toml ]] || fail "a removal takes the binary and leaves the configuration"
dpkg --purge tollgate >"$work/log" 2>&1
[[ ! -e /etc/tollgate && ! -e /etc/logrotate.d/tollgate && ! -e /var/log/tollgate ]] || fail "a purge takes configuration and logs"
[[ -s /var/lib/tollgate/tollgate.db ]] || fail "a purge must not take the tokens"
grep -q 'it may have tokens' "$work/log" || fail "a purge says what it leaves"
step "removed and purged: the tokens are left"
