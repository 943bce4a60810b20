#!/bin/sh
# Checks the files that are not compiled: presets, unit file, Dockerfile, Prometheus files and the tables in docs/.
# Usage: deploy/check.sh [PATH OF THE tollgate BINARY]        (default: target/debug/tollgate, or $TOLLGATE)
# Needs promtool (Debian: prometheus), systemd-analyze (systemd), ca-certificates, python3 and awk, cmp, grep, sed, sort, comm. A missing tool is a failure.
set -eu
cd "$(dirname "$0")/.."
LC_ALL=C
export LC_ALL
tollgate=${1:-${TOLLGATE:-target/debug/tollgate}}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
files=0

fail() {
    echo "deploy/check.sh: $*" >&2
    exit 1
}

# run FILE COMMAND...: prints the command's output only if it fails.
run() {
    file=$1
    shift
    [ -s "$file" ] || fail "$file is missing or empty"
    "$@" >"$work/out" 2>&1 || {
        cat "$work/out" >&2
        fail "$file: failed: $*"
    }
    files=$((files + 1))
    echo "ok $file"
}

for tool in promtool systemd-analyze python3 awk cmp grep sed sort comm; do
    command -v "$tool" >/dev/null || fail "$tool is missing (apt-get install prometheus systemd)"
done
[ -x "$tollgate" ] || fail "$tollgate is missing (cargo build)"

# Folders of the machine that a configuration is for; here others stand in their place.
mkdir -p "$work/tls" "$work/lib" "$work/log" "$work/run"
here() { sed "s#/etc/tollgate/tls#$work/tls#g; s#\[::\]:443#127.0.0.1:58443#; s#\[::\]:80#127.0.0.1:58080#; s#/var/lib/tollgate#$work/lib#; s#/var/log/tollgate#$work/log#; s#/run/tollgate#$work/run#" "$1"; }

# --- Presets -----------------------------------------------------------------
"$tollgate" cert self-signed --name api --out "$work/tls" >"$work/out" || fail "tollgate cert self-signed"
for preset in minimal gitlab-v3 gitlab-v4 at-the-edge verdict/tollgate; do
    mkdir -p "$work/verdict"
    here "config/$preset.toml" >"$work/$preset.toml"
    run "config/$preset.toml" "$tollgate" check --offline --config "$work/$preset.toml"
done
# Again with every commented entry enabled; of a key that then occurs twice, the second value is used.
for preset in gitlab-v3 gitlab-v4; do
    awk '
        /^#(\[\[|[a-z_]+ = )/ { sub(/^#/, "") }
        /^\[/ { section = $0 NR }
        /^[a-z_]+ = / { key = section SUBSEP $1; if (key in at) delete line[at[key]]; at[key] = NR }
        { line[NR] = $0 }
        END { for (i = 1; i <= NR; i++) if (i in line) print line[i] }
    ' "$work/$preset.toml" >"$work/all.toml"
    run "config/$preset.toml" "$tollgate" check --offline --config "$work/all.toml"
    doors=$(grep -c '^#reason' "config/$preset.toml")
    [ "$(grep -c '^  /.*): ' "$work/out")" -eq "$doors" ] || fail "not all $doors doors of $preset.toml are listed as open"
    files=$((files - 1))
done

# --- Stores --------------------------------------------------------------------
# The secret files named in a store's configuration are the user's; placeholders are used here.
mkdir "$work/stores"
for file in config/stores/*.toml; do here "$file" >"$work/stores/${file##*/}"; done
printf 'token = []\n' >"$work/stores/tokens.toml"
printf '{"token": []}\n' >"$work/stores/tokens.json"
sed -n 's/^[a-z_]*_file = "\([a-z._-]*\)"$/\1/p' config/stores/*.toml | sort -u >"$work/secrets"
while read -r secret; do printf '%064d\n' 0 >"$work/stores/$secret"; done <"$work/secrets"
for file in config/stores/*.toml; do
    run "$file" "$tollgate" check --offline --config "$work/stores/${file##*/}"
done
# Writes each ```toml and ```json block of docs/stores.md to its own file, and compares it with config/stores/.
stores() {
    mkdir "$work/blocks"
    awk -v to="$work/blocks/" '
        /^```/ { open = $0 == "```toml" || $0 == "```json"; if (open) out = to sprintf("%03d", ++count); next }
        open { print >out }
    ' docs/stores.md
    for block in "$work"/blocks/*; do
        case $(head -n 1 "$block") in
        "# config/stores/"*)
            named=$(head -n 1 "$block" | cut -c3-)
            cmp "$named" "$block" || { echo "a block of docs/stores.md differs from $named"; return 1; }
            ;;
        "# tokens.toml") cp "$block" "$work/stores/tokens.toml" ;;
        "{"*) cp "$block" "$work/stores/tokens.json" ;;
        *) echo "a block of docs/stores.md is neither a file of config/stores/ nor a token file:"; cat "$block"; return 1 ;;
        esac
    done
    for example in config/stores/*.toml; do
        [ "$(head -n 1 "$example")" = "# $example" ] || { echo "$example does not begin with its own name"; return 1; }
        grep -qxF "# $example" docs/stores.md || { echo "$example is not in docs/stores.md"; return 1; }
    done
    for kind in file file-json; do
        "$tollgate" token list --config "$work/stores/$kind.toml" >"$work/tokens" || return 1
        [ "$(wc -l <"$work/tokens")" -eq 3 ] || { cat "$work/tokens"; echo "the tokens of docs/stores.md are not two"; return 1; }
    done
}
run docs/stores.md stores

# --- systemd -----------------------------------------------------------------
# systemd-analyze checks that the binary exists, and tollgate need not be installed.
sed 's#/usr/bin/tollgate#/bin/true#' deploy/systemd/tollgate.service >"$work/tollgate.service"
unit() {
    said=$(systemd-analyze verify --man=no "$work/tollgate.service" 2>&1) && [ -z "$said" ] || { echo "$said"; return 1; }
    systemd-analyze security --offline=yes --threshold=15 "$work/tollgate.service"
}
run deploy/systemd/tollgate.service unit

cp deploy/systemd/tollgate.socket "$work/tollgate.socket"
sockets() {
  local said
  said=$(systemd-analyze verify --man=no "$work/tollgate.socket" 2>&1) && [ -z "$said" ] || { echo "$said"; return 1; }
}
run deploy/systemd/tollgate.socket sockets
sysusers() { grep -Eq '^u tollgate - "[^"]*" /var/lib/tollgate$' deploy/systemd/tollgate.sysusers.conf; }
run deploy/systemd/tollgate.sysusers.conf sysusers

# --- Docker ------------------------------------------------------------------
# Without a Docker daemon: the copied paths must exist and must not be excluded by the ignore file.
dockerfile() {
    awk '$1 == "COPY" && $2 !~ /^--from/ { for (i = 2; i < NF; i++) print $i }' deploy/docker/Dockerfile >"$work/copied"
    grep -q . "$work/copied" || { echo "nothing is copied"; return 1; }
    while read -r path; do
        [ -e "$path" ] || { echo "$path does not exist"; return 1; }
        grep -qxF "!${path%/}" deploy/docker/Dockerfile.dockerignore || { echo "$path is ignored"; return 1; }
    done <"$work/copied"
    grep -q -- '--locked' deploy/docker/Dockerfile && grep -q '^USER [1-9]' deploy/docker/Dockerfile
}
run deploy/docker/Dockerfile dockerfile
run deploy/docker/Dockerfile.dockerignore grep -qx '\*' deploy/docker/Dockerfile.dockerignore

# --- Compose, Kubernetes -------------------------------------------------------
venv=${TOLLGATE_PY_VENV:-target/py-clients}
[ -d "$venv/deploy-tools" ] || fail "$venv/deploy-tools is missing: run bash tests/install.sh"
run deploy/references.py env PYTHONPATH="$venv/deploy-tools" "$venv/bin/python" deploy/references.py "$work/kubernetes"
cat "$work/out"
# The gateways' configurations, as they will be mounted.
for file in deploy/compose/tollgate.toml deploy/debian/tollgate.toml; do
    here "$file" >"$work/mounted.toml"
    run "$file" "$tollgate" check --offline --config "$work/mounted.toml"
done
for file in "$work"/kubernetes/*/tollgate.toml; do
    [ -e "$file" ] || continue
    sed -i "s#/etc/tollgate-secrets/password#$work/stores/postgres.password#" "${file%/*}"/conf.d/*.toml
    run "$file" "$tollgate" check --offline --config "$file"
done

# --- Prometheus --------------------------------------------------------------
run deploy/prometheus/prometheus.yml promtool check config deploy/prometheus/prometheus.yml
run deploy/prometheus/alerts.yml promtool check rules deploy/prometheus/alerts.yml
run deploy/prometheus/recording.yml promtool check rules deploy/prometheus/recording.yml
run deploy/prometheus/alerts.test.yml promtool test rules deploy/prometheus/alerts.test.yml

# --- Grafana -----------------------------------------------------------------
# tests/monitoring.rs has a real Prometheus evaluate each expression.
dashboard() { deploy/grafana/dashboard.py | cmp - deploy/grafana/tollgate.json; }
run deploy/grafana/tollgate.json dashboard

# --- Names, against the source -------------------------------------------------
grep -oh '"tollgate_[a-z0-9_]*"' src/telemetry/*metrics.rs src/telemetry/heavy_hitters.rs | tr -d '"' | sort -u >"$work/metrics"
sed -n '/const fn terms/,/^    }/p' src/reply/refusal.rs | grep -o '"[a-z_]*"' | tr -d '"' | sort -u >"$work/reasons"
[ "$(wc -l <"$work/metrics")" -ge 20 ] && [ "$(wc -l <"$work/reasons")" -ge 40 ] || fail "cannot extract the names from the source"

# same WHAT: the lists `$work/known` (source) and `$work/said` (document) must be equal.
same() {
    comm -3 "$work/known" "$work/said" >"$work/differ"
    [ ! -s "$work/differ" ] || { echo "$1 differ (left: source only, right: document only)"; cat "$work/differ"; return 1; }
}
operations() {
    cp "$work/metrics" "$work/known"
    sed -n 's/^| `\(tollgate_[a-z0-9_]*\)` | \(counter\|gauge\|histogram\) |.*/\1/p' docs/operations.md | sort >"$work/said"
    same metrics || return 1
    cp "$work/reasons" "$work/known"
    sed -n 's/^| `\([a-z_]*\)` | [345][0-9][0-9] |.*/\1/p' docs/operations.md | sort >"$work/said"
    same reasons || return 1
    sed -n 's/^ *- alert: //p' deploy/prometheus/alerts.yml | sort >"$work/known"
    sed -n 's/^## \(Tollgate[A-Za-z0-9]*\)$/\1/p' docs/alerts.md | sort >"$work/said"
    same alerts || return 1
    # The link of each alert leads to its own section.
    awk -v wanted="$(wc -l <"$work/known")" '/- alert: /{ name = tolower($3) } /runbook_url: /{ sub(/.*alerts.md#/, ""); sub(/"$/, ""); if ($0 == name) good++; else { print name ": its runbook_url ends in #" $0; bad = 1 } } END { if (good != wanted) { print good " of " wanted " alerts have a runbook_url"; bad = 1 } exit bad }' \
        deploy/prometheus/alerts.yml || return 1
    # Each alert must be tested both ways: that it fires and that it does not.
    while read -r alert; do
        grep -q "alertname: $alert}" deploy/prometheus/alerts.test.yml || { echo "$alert: no test that it does not fire"; return 1; }
        grep -q "alertname: $alert\$" deploy/prometheus/alerts.test.yml || { echo "$alert: no test that it fires"; return 1; }
    done <"$work/known"
}
run docs/operations.md operations
known_names() {
    # What recording.yml records has colons, and is no metric of tollgate's.
    find docs -maxdepth 1 -name "*.md" ! -name configuration.md -exec cat deploy/prometheus/alerts.yml deploy/prometheus/recording.yml deploy/grafana/tollgate.json {} + | sed -E 's/[a-z_]+:tollgate_[a-z_]+:[a-z0-9_]+//g' |
        grep -oE '\btollgate_[a-z0-9_]*[a-z]' | sed -E 's/_(bucket|sum|count)$//' | sort -u >"$work/said"
    comm -13 "$work/metrics" "$work/said" >"$work/differ"
    [ ! -s "$work/differ" ] || { echo "no such metrics:"; cat "$work/differ"; return 1; }
}
known_names || fail "metrics that do not exist"
# Every query of docs/monitoring.md must be valid PromQL.
queries() {
    awk '
        BEGIN { print "groups:"; print "- name: docs"; print "  rules:" }
        /^```/ { open = $0 == "```promql"; next }
        open && /^[^#]/ { gsub(/"/, "\\\""); printf "  - record: docs:query%d\n    expr: \"%s\"\n", ++count, $0 }
    ' docs/monitoring.md >"$work/queries.yml"
    [ "$(grep -c 'expr:' "$work/queries.yml")" -ge 10 ] || { echo "fewer than 10 queries found"; return 1; }
    promtool check rules "$work/queries.yml"
}
run docs/monitoring.md queries

# --- Links and paths in docs/ ---------------------------------------------------
places() {
    grep -oE '`(src|tests|deploy|config)/[A-Za-z0-9_./-]+`?' "$1" | tr -d '`' | sort -u >"$work/places"
    while read -r place; do [ -e "$place" ] || { echo "$place does not exist"; return 1; }; done <"$work/places"
    grep -oE '\]\([a-z-]+\.md' "$1" | sed 's/](//' | sort -u >"$work/links" || true
    while read -r link; do [ -e "docs/$link" ] || { echo "docs/$link does not exist"; return 1; }; done <"$work/links"
    # module::test must name a test function in that module's file, a class of tests/attacks, or a module of tests.
    grep -oE '(attacks::)?[a-z0-9_]+::[a-z0-9_]{9,}' "$1" | sort -u >"$work/tests" || true
    while read -r test; do
        [ ! -e "tests/$(echo "$test" | sed 's#::#/#g').rs" ] || continue
        module=tests/$(echo "${test%::*}" | sed 's#::#/#').rs
        [ -e "$module" ] || module=${module%.rs}/mod.rs
        name=${test##*::}
        [ -e "$module" ] && grep -qE "fn $name\(\)|^    $name [0-9]+,\$" "$module" || { echo "$test: no such test in $module"; return 1; }
    done <"$work/tests"
}
for page in README explain security framework-traps clients threat-model dependencies; do run "docs/$page.md" places "docs/$page.md"; done
for page in alerts backup limits monitoring operations stores tls; do places "docs/$page.md" || fail "docs/$page.md names what does not exist"; done

echo "deploy/check.sh: $files files checked"
