#!/usr/bin/env python3
"""The cost of TLS and HTTP/2 at the edge, and what floods of frames do to others, beside HAProxy and nginx.

    handshakes     TLS handshakes per second of CPU time: 1.3 and 1.2, full and resumed, ECDSA P-256
    requests       CPU time of a request on kept TLS connections, HTTP/1 and HTTP/2
    memory         idle connections with and without TLS, and streams that wait for their backend
    floods         HTTP/2: CPU time, memory, what becomes of the attacker, and the latency of somebody else

Each gateway has one worker, on CPU 0, and does the whole job of run.py: the same configurations with a listener for TLS. Everything
else is on CPU 1. Prints Markdown; edge.json and edge.md in the work folder have it as well. Needs gcc, openssl and h2load:
`apt-get install gcc openssl haproxy nginx nghttp2-client`."""
import argparse, contextlib, json, os, re, select, signal, subprocess, sys, time
from statistics import median

sys.dont_write_bytecode = True
import floods, held, run
from lab import HERE, TARGET, USUAL, Edge, Lab, Problem, RssWatch, child_setup, family, rss_mib, stop, tell

ATTACKERS_NICE = 10
PARTS = ["handshakes", "requests", "memory", "floods"]


class Size:
    """How much is done, in the long form and in the short one."""

    def __init__(self, quick):
        of = lambda long, short: short if quick else long
        self.rounds, self.handshake_seconds, self.requests = of(5, 1), of(1, 0.5), of(20_000, 4_000)
        self.idle, self.waiting = of(10_000, 200), of(10, 2)
        self.alone, self.flood, self.probe = of(3, 0.5), of(10, 1.5), of(3, 0.5)
        self.attacks = of(list(floods.ATTACKS), [name for name in floods.ATTACKS if not name.endswith("_unread")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round of everything, short: less than two minutes")
    parser.add_argument("--gateways", type=run.names(USUAL), default=USUAL)
    parser.add_argument("--attacks", type=run.names(floods.ATTACKS), help=f"of {','.join(floods.ATTACKS)} (default: all)")
    parser.add_argument("--tollgate", default=TARGET / "dist/tollgate", help="the binary (default: %(default)s)")
    parser.add_argument("--work", default=TARGET / "bench-edge", help="folder for generated files (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return measure(args)
    except Problem as problem:
        tell(f"edge.py: {problem}")
        return 2
    except KeyboardInterrupt:
        return 130


def measure(args):
    began, size = time.monotonic(), Size(args.quick)
    size.attacks = args.attacks or size.attacks
    lab = Lab(args.work, args.tollgate, 1_000)
    lab.edge = Edge(certificate(lab), size.idle + 4_000)  # nginx closes idle ones when fewer than a sixteenth are free
    if lab.load_cpu is not None:
        os.sched_setaffinity(0, {lab.load_cpu})
    # Everything but the attackers goes before other work of the machine, where that is allowed, and before them in any case.
    with contextlib.suppress(PermissionError):
        os.nice(-ATTACKERS_NICE)
    for name, package in (("openssl", "openssl"), ("h2load", "nghttp2-client")):
        try:
            lab.program(name)
        except Problem:
            raise Problem(f"{name} is not installed: apt-get install {package}") from None
    gateways = lab.available(args.gateways)
    report = Report(lab, gateways, size)
    try:
        for part in args.parts or PARTS:
            tell(f"{part}, after {time.monotonic() - began:.0f} s")
            {"handshakes": handshakes, "requests": requests, "memory": memory, "floods": flooded}[part](lab, gateways, size, report)
        report.line(f"\n{time.monotonic() - began:.0f} s in all.")
    finally:
        report.write()
    for problem in report.problems:
        tell(f"edge.py: {problem}")
    return 1 if report.problems else 0


class Report:
    def __init__(self, lab, gateways, size):
        self.lab, self.lines, self.problems = lab, [], []
        self.figures = {"machine": run.machine(lab, gateways), "size": vars(size)}
        self.line(self.figures["machine"])

    def line(self, text):
        self.lines.append(text)
        print(text, flush=True)

    def table(self, title, columns, rows):
        self.line(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in rows:
            self.line("| " + " | ".join(map(str, row)) + " |")

    def write(self):
        (self.lab.work / "edge.md").write_text("\n".join(self.lines) + "\n")
        (self.lab.work / "edge.json").write_text(json.dumps(self.figures, indent=1) + "\n")


def certificate(lab):
    """A certificate of our own with its key behind it, which HAProxy wants in one file."""
    pem, key = lab.work / "edge.pem", lab.work / "edge.key"
    if not pem.exists() or pem.stat().st_mtime < time.time() - 20 * 86400:
        done = subprocess.run([lab.program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                               "-days", "30", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", pem],
                              text=True, capture_output=True)
        if done.returncode:
            raise Problem(f"openssl made no certificate:\n{done.stderr}")
        pem.write_text(pem.read_text() + key.read_text())
        pem.chmod(0o600)
    return pem


def cpu_seconds(pid):
    """Of a family of processes, by its clocks: to the nanosecond, with threads that have ended."""
    try:
        return sum(time.clock_gettime((~member << 3) | 2) for member in family(pid))
    except OSError:
        raise Problem(f"process {pid} has ended") from None


@contextlib.contextmanager
def client(lab, role, **order):
    process = subprocess.Popen([sys.executable, str(HERE / "floods.py"), json.dumps({"role": role, **order})], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=child_setup(lab.load_cpu))
    try:
        yield process
    finally:
        stop(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def result(process, seconds):
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Problem(f"a client did not end within {seconds:.0f} s: {process.args[-1]}") from None
    if process.returncode or not out.strip():
        raise Problem(f"a client failed: {process.args[-1]}\n{errors[-2000:]}")
    return json.loads(out.strip().splitlines()[-1])


def ask(lab, role, within, **order):
    with client(lab, role, **order) as process:
        return result(process, within)


def spread(values, digits=0):
    """Median, and the range of all."""
    text = lambda value: f"{value:,.{digits}f}"
    return f"{text(median(values))} ({text(min(values))} – {text(max(values))})" if len(values) > 1 else text(values[0])


def order_of(gateways, turn):
    """Each round in another order."""
    turn %= len(gateways)
    return gateways[turn:] + gateways[:turn]


# ---- TLS -------------------------------------------------------------------------------------------------------------

KINDS = {f"{version}, {'resumed' if resumed else 'full'}": {"version": version, "resumed": resumed}
         for resumed in (False, True) for version in ("1.3", "1.2")}


def handshakes(lab, gateways, size, report):
    tokens, taken, ciphers = lab.tokens(), {}, {}
    with lab.wire(tokens) as wire, contextlib.ExitStack() as stack:
        up = [stack.enter_context(lab.gateway(name, tokens, wire.upstream)) for name in gateways]
        for n in range(size.rounds):
            for kind, order in KINDS.items():
                for running in order_of(up, n):
                    before = cpu_seconds(running.pid)
                    got = ask(lab, "handshakes", 30, port=running.tls, seconds=size.handshake_seconds, **order)
                    spent = cpu_seconds(running.pid) - before
                    if got["resumed"] < got["count"] * order["resumed"]:
                        tell(f"{running.name}, {kind}: only {got['resumed']} of {got['count']} were resumed")
                        taken.setdefault((running.name, kind), [])
                        continue
                    taken.setdefault((running.name, kind), []).append(got["count"] / spent)
                    ciphers[kind] = ciphers.get(kind, set()) | {got["cipher"]}
    report.figures["handshakes per CPU second"] = {f"{name}, {kind}": rates for (name, kind), rates in taken.items()}
    report.table(f"TLS handshakes per second of CPU time, ECDSA P-256; median and range of {size.rounds} rounds",
                 ["gateway", *(f"TLS {kind}" for kind in KINDS)],
                 [[name, *(spread(taken[name, kind]) if taken[name, kind] else "not resumed" for kind in KINDS)] for name in gateways])
    report.line("\nCiphers: " + "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in ciphers.items()) + ".")


# ---- requests on kept connections ------------------------------------------------------------------------------------

# Options of h2load; target, whether the token is in the header, and the class of the status.
LOADS = {"HTTP/1, 32 connections": ["--h1", "-c", "32"], "HTTP/2, 8 connections of 8 streams": ["-c", "8", "-m", "8"]}
WORKS = {"header": ("/api/v3/projects?per_page=20", True, 2),
         "query, strip and clamp": ("/api/v3/projects?private_token={token}&per_page=1000", False, 2),
         "unknown token": ("/api/v3/projects?private_token=unknown--AAAAAAAAAAA", False, 4)}


def requests(lab, gateways, size, report):
    tokens, taken = lab.tokens(), {}
    token = lab.read_tokens(tokens)[0]
    with lab.wire(tokens) as wire, contextlib.ExitStack() as stack:
        for name in gateways:
            for what, why in run.verified(lab, wire, name, tokens)[2]:
                report.problems.append(f"{name} does another job: {what}: {why}")
        up = [stack.enter_context(lab.gateway(name, tokens, wire.upstream)) for name in gateways]
        # Connections to the backend, and memory, as they are when it has been at work.
        for n in range(-1, size.rounds):
            for load, options in LOADS.items():
                for work, (target, header, status) in WORKS.items():
                    for running in order_of(up, n):
                        before = cpu_seconds(running.pid)
                        words = [lab.program("h2load"), *options, "-n", str(size.requests if n >= 0 else 500),
                                 *(["-H", f"private-token: {token}"] if header else []), f"https://127.0.0.1:{running.tls}{target.format(token=token)}"]
                        try:
                            done = subprocess.run(words, text=True, capture_output=True, timeout=120)
                        except subprocess.TimeoutExpired:
                            raise Problem(f"h2load did not end: {running.name}, {load}, {work}") from None
                        spent = cpu_seconds(running.pid) - before
                        good = re.search(rf"status codes: .*?(\d+) {status}xx", done.stdout)
                        count = int(good[1]) if good else 0
                        if n < 0:
                            continue
                        if count != size.requests:
                            report.problems.append(f"{running.name}, {load}, {work}: {count} of {size.requests} were answered {status}xx")
                        if count:
                            taken.setdefault((running.name, load, work), []).append(1e6 * spent / count)
    report.figures["CPU µs per request"] = {", ".join(key): values for key, values in taken.items()}
    cells = [(load, work) for load in LOADS for work in WORKS]
    report.table(f"CPU µs of a request on kept TLS connections; median and range of {size.rounds} rounds of {size.requests:,}",
                 ["gateway", *(f"{load}: {work}" for load, work in cells)],
                 [[name, *(spread(taken.get((name, *cell), [float("nan")]), 1) for cell in cells)] for name in gateways])


# ---- memory ----------------------------------------------------------------------------------------------------------

def memory(lab, gateways, size, report):
    tokens, rows = lab.tokens(), []
    token = lab.read_tokens(tokens)[0]
    streams = 100
    for name in gateways:
        row = {}
        for what in ("idle, TLS", "idle, plain", "waiting streams"):
            with held.Backend() as backend, lab.gateway(name, tokens, backend.port) as running:
                # A few first, for what the first of a kind allocates.
                tls = what != "idle, plain"
                common = {"port": running.tls if tls else running.port, "token": token, "tls": tls}
                with client(lab, "hold", count=20, **common) as process:
                    told(process, 30)
                    result(started(process), 10)
                before = rss_mib(running.pid)
                count = size.waiting * streams if what == "waiting streams" else size.idle
                more = {"role": "hold", "count": count}
                if what == "waiting streams":
                    more = {"role": "wait", "connections": size.waiting, "streams": streams}
                with client(lab, **more, **common) as process:
                    told(process, 180)
                    if what == "waiting streams":
                        count = reached(backend, count)
                    time.sleep(1)
                    grown = rss_mib(running.pid) - before
                    lost = result(started(process), 30)["lost"]
                row[what] = {"KiB": 1024 * grown / max(1, count), "count": count, "lost": lost, "before MiB": before}
                if lost or what == "waiting streams" and count < size.waiting * streams:
                    tell(f"{name}, {what}: {count} held, {lost} lost")
        cells = []
        for cell in row.values():
            whole = not cell["lost"] and cell["count"] in (size.idle, size.waiting * streams)
            cells.append(f"{cell['KiB']:.1f}" + ("" if whole else f" ({cell['count']:,} arrived, {cell['lost']:,} lost)"))
        rows.append([name, *cells, f"{row['idle, TLS']['before MiB']:.0f}"])
        report.figures.setdefault("memory", {})[name] = row
    report.table(f"Resident memory, KiB each: {size.idle:,} idle connections, {size.waiting * streams:,} streams on {size.waiting} connections",
                 ["gateway", "idle HTTP/1 connection, TLS", "idle HTTP/1 connection, plain", "HTTP/2 stream that waits for its backend, TLS",
                  "MiB before"], rows)


def told(process, seconds):
    """Until the client says that it holds what it should."""
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(1000 * seconds):
        raise Problem(f"a client did not get its connections within {seconds} s: {process.args[-1]}")
    line = process.stdout.readline()
    if '"held"' not in line:
        raise Problem(f"a client failed: {line or process.stderr.read()[-2000:]}")


def started(process):
    """Tells it to let go; the rest is read by result()."""
    process.stdin.write("\n")
    process.stdin.flush()
    return process


def reached(backend, count, seconds=15):
    """How many requests the backend has."""
    give_up = time.monotonic() + seconds
    while backend.hanging < count and time.monotonic() < give_up:
        time.sleep(0.05)
    return min(backend.hanging, count)


# ---- floods ----------------------------------------------------------------------------------------------------------

ATTACKING = 4  # connections at a time


def flooded(lab, gateways, size, report):
    lab.edge = lab.edge._replace(requests=1_000)
    tokens, all_rows = lab.tokens(), report.figures.setdefault("floods", {})
    token = lab.read_tokens(tokens)[0]
    for attack in size.attacks:
        tell(floods.ATTACKS[attack].text)
        for name in gateways:
            # Anew for each: what one attack leaves behind is not taken for the next one's.
            with lab.wire(tokens) as wire, lab.gateway(name, tokens, wire.upstream) as running:
                row = flood(lab, running, attack, token, size)
            all_rows.setdefault(attack, {})[name] = row
            if name == "tollgate" and row["during"]["failed"]:
                report.problems.append(f"{name}, {attack}: {row['during']['failed']} requests of others failed")
    report.table(f"Floods of HTTP/2 frames over {ATTACKING} connections, {size.flood} s each; others ask 50 times a second",
                 ["attack", "gateway", "CPU s per s", "sent per s", "grown by, MiB", "the attacker's connection", "connections, refused",
                  "others alone, p50 / p99 ms", "in the flood", "failed"],
                 [flood_row(floods.ATTACKS[attack], name, row, size.flood) for attack, rows in all_rows.items() for name, row in rows.items()])


def flood(lab, running, attack, token, size):
    person = {"port": running.tls, "token": token, "rate": 50}
    alone = ask(lab, "honest", 30, seconds=size.alone, **person)
    attacker = {"attack": attack, "port": running.tls, "token": token}
    probe = ask(lab, "probe", 30, most=20_000, seconds=size.probe, **attacker)
    before = cpu_seconds(running.pid)
    with RssWatch(running.pid, 0.05) as watch, client(lab, "honest", seconds=size.flood, **person) as other:
        got = ask(lab, "attack", size.flood + 30, seconds=size.flood, connections=ATTACKING, nice=ATTACKERS_NICE, **attacker)
        during = result(other, 30)
        spent = cpu_seconds(running.pid) - before
    return {"CPU s per s": spent / size.flood, "grown MiB": watch.top - watch.first, **got, "probe": probe, "alone": alone, "during": during}


def flood_row(kind, name, row, seconds):
    probe, each = row["probe"], row["units"] // max(1, row["connections"])
    came_back = row["connections"] > ATTACKING
    if not kind.chunk or kind.pace:
        ended = f"cut within {seconds} s" if came_back else f"not cut in {seconds} s"
    elif probe["cut"] is not None:
        ended = f"cut after {probe['cut']:,}, {probe['code']}"
    else:
        ended = f"cut after about {each:,}" if came_back else f"not cut by {each:,} in {seconds} s"
    return [kind.text, name, f"{row['CPU s per s']:.2f}", f"{row['units'] / seconds:,.0f} {kind.unit}", f"{row['grown MiB']:.1f}", ended,
            f"{row['connections']:,}, {row['failed']:,}", f"{row['alone']['p50']} / {row['alone']['p99']}",
            f"{row['during']['p50']} / {row['during']['p99']}", row["during"]["failed"]]


if __name__ == "__main__":
    sys.exit(main())
