#!/usr/bin/env python3
"""Compares tollgate with nginx and HAProxy, each doing the same job: read and check the token, clean the query, forward.

    verify         checks that they do the same job, with raw requests and an echoing upstream
    cpu            CPU time per request, throughput and latency; one worker on CPU 0, everything else on CPU 1
    peers          both for every peer and every workload, on one and two workers, and latency at half of saturation
    instructions   instructions in user space per request under callgrind: exact where the clock is noisy
    memory         resident memory with all known tokens cached, and for each connection: idle, waiting, not reading
    bodies         a body of 5 GiB either way, and with a slow receiver: does memory stay constant?
    servers        some servers of the upstream are dead: errors, and requests that waited for a timeout
    load           known and unknown tokens mixed: are all answers right, how long do they take, does memory grow?
    flood          a flood of distinct unknown tokens: do known ones still get through, does memory stay bounded?

Needs gcc; for the peers `apt-get install haproxy nginx`; for instructions `apt-get install valgrind`.
README.md in this folder explains the tables."""
import argparse, contextlib, json, os, platform, re, signal, socket, subprocess, sys, time
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.dont_write_bytecode = True
from lab import GATEWAYS, REFUSAL, TARGET, USUAL, Client, Lab, Problem, Running, RssWatch, family, pss_mib, rss_mib, tell


class Work(NamedTuple):
    text: str
    group: dict  # as wire.c reads it


WORKLOADS = {
    "h": Work("known token in the header, nothing to rewrite", {"kind": "h"}),
    "q": Work("known token in the query and per_page=1000: strip and clamp", {"kind": "q"}),
    "i": Work("unknown token, refused (half of them never seen before)", {"kind": "i"}),
    "h512": Work("as h, over 512 connections", {"kind": "h", "conns": 512}),
    "down64k": Work("an answer of 64 KiB", {"kind": "h", "down": 1 << 16}),
    "down1m": Work("an answer of 1 MiB, over 8 connections", {"kind": "h", "down": 1 << 20, "conns": 8}),
    "up1m": Work("a request body of 1 MiB, over 8 connections", {"kind": "h", "up": 1 << 20, "conns": 8}),
}
SHORT = ["h", "q", "i"]
SPREAD = 10_000  # known tokens in use at a time: more than fit the CPU's caches, few enough to meet again in a second


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return args.command(args)
    except Problem as problem:
        tell(f"run.py: {problem}")
        return 2
    except KeyboardInterrupt:
        return 130


def arguments():
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tollgate", default=TARGET / "dist/tollgate", help="the binary (default: %(default)s)")
    common.add_argument("--work", default=TARGET / "bench-e2e", help="folder for generated files (default: %(default)s)")
    common.add_argument("--known", type=positive, default=100_000, help="number of known tokens (default: %(default)s)")
    common.add_argument("--extra", metavar="FILE", help="TOML to append to tollgate's configuration")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, help):
        p = commands.add_parser(function.__name__, parents=[common], help=help, description=help)
        p.set_defaults(command=function)
        return p

    p = command(verify, "check by raw requests that each gateway does the same job")
    p.add_argument("--gateways", type=names(GATEWAYS), default=USUAL)

    p = command(cpu, "CPU time per request, throughput and latency, in interleaved rounds")
    p.add_argument("--gateways", type=names(GATEWAYS), default=USUAL)
    p.add_argument("--workloads", type=names(WORKLOADS), default=SHORT, help=f"of {','.join(WORKLOADS)} (default: {','.join(SHORT)})")
    p.add_argument("--seconds", type=positive, default=4, help="length of one measurement (default: %(default)s)")
    p.add_argument("--rounds", type=positive, default=9, help="(default: %(default)s)")
    p.add_argument("--connections", type=positive, default=64, help="(default: %(default)s)")

    p = command(peers, "verify, then CPU time, throughput, latency and memory of all peers, on one and on two workers")
    p.add_argument("--gateways", type=names(GATEWAYS), default=list(GATEWAYS))
    p.add_argument("--workloads", type=names(WORKLOADS), default=list(WORKLOADS), help=f"of {','.join(WORKLOADS)} (default: all)")
    p.add_argument("--workers", type=positive, action="append", help="1 or 2 (default: both)")
    p.add_argument("--seconds", type=positive, default=3, help="length of one measurement (default: %(default)s)")
    p.add_argument("--rounds", type=positive, default=5, help="(default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="one round of 0.8 s: less than three minutes")
    p.set_defaults(connections=64)

    p = command(instructions, "instructions in user space per request, under callgrind")
    p.add_argument("--requests", type=positive, default=10_000, help="per measurement (default: %(default)s)")
    p.add_argument("--workloads", type=names(WORKLOADS), default=SHORT, help=f"of {','.join(WORKLOADS)} (default: {','.join(SHORT)})")
    p.add_argument("--peers", action="store_true", help="the peers as well")
    p.add_argument("--gateways", type=names(GATEWAYS), default=USUAL)
    p.add_argument("--guard", metavar="FILE", help="compare tollgate's counts with those in FILE: more than 3 %% above is a failure")
    p.add_argument("--update", action="store_true", help="with --guard: write the counts to FILE instead")

    p = command(memory, "resident memory: known tokens in the cache, idle connections, waiting ones, clients that do not read")
    p.add_argument("--gateways", type=names(GATEWAYS), default=USUAL)
    p.add_argument("--connections", type=positive, default=500, help="of each kind (default: %(default)s)")

    p = command(bodies, "a large body in each direction, and with a slow receiver: memory must not grow with it")
    p.add_argument("--gateways", type=names(GATEWAYS), default=["tollgate"])
    p.add_argument("--mib", type=positive, default=5120, help="size of each body (default: %(default)s)")
    p.add_argument("--slow", type=positive, default=15, help="seconds for which a slow receiver takes 1 MiB a second (default: %(default)s)")

    p = command(servers, "some servers of the upstream are dead: errors, and requests that waited for a timeout")
    p.add_argument("--gateways", type=names(GATEWAYS), default=USUAL)

    for function, help in ((load, "known and unknown tokens mixed over many connections: right answers, latency, memory"),
                           (flood, "distinct unknown tokens as fast as they go, beside a trickle of known ones")):
        p = command(function, help)
        p.add_argument("--gateway", choices=GATEWAYS, default="tollgate", help="which one to start (default: %(default)s)")
        p.add_argument("--threads", type=positive, default=1, help="tollgate's workers (default: %(default)s)")
        p.add_argument("--connections", type=positive, default=64, help="(default: %(default)s)")
        p.add_argument("--tokens" if function is load else "--good", dest="tokens", metavar="FILE",
                       help="known tokens, one per line (default: generated); given to a gateway that run.py starts")
        p.add_argument("--port", type=positive, help="use the gateway on 127.0.0.1:PORT, and start none")
        p.add_argument("--pid", type=positive, help="with --port: its process, for memory and CPU")
        p.add_argument("--upstream-port", type=positive, help="with --port: be its upstream, on this port")
        p.add_argument("--path", default="/api/v3/projects", help="path to request (default: %(default)s)")
        if function is load:
            p.add_argument("--seconds", type=positive, default=60, help="(default: %(default)s)")
            p.add_argument("--bad", type=percent, metavar="PERCENT", default=20, help="unknown tokens (default: %(default)s)")
        else:
            p.add_argument("--count", type=positive, default=1_000_000, help="unknown tokens (default: %(default)s)")
            p.add_argument("--rate", type=positive, default=50, help="requests with known tokens per second (default: %(default)s)")
            p.add_argument("--alone", type=positive, default=5, help="seconds of known tokens alone, to compare (default: %(default)s)")
    return parser.parse_args()


def positive(text):
    number = int(text.replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def percent(text):
    number = int(text)
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError("must be 0 to 100")
    return number


def names(allowed):
    def parse(text):
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return chosen
    return parse


def open_lab(args):
    return Lab(args.work, args.tollgate, args.known, getattr(args, "threads", 1), args.extra)


def machine(lab, gateways):
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (f"{', '.join(map(lab.version, gateways))}; {os.cpu_count()} x {model[1] if model else platform.machine()}, "
            f"Linux {platform.release()}, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d %H:%M')}")


def print_machine(lab, gateways):
    print(machine(lab, gateways))


def table(columns, rows):
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def wrong(group):
    return group["known_wrong"] + group["unknown_wrong"] + group["mixed_up"]


def faults(group):
    """A description of the errors in a group of requests; empty if there are none."""
    words = {"known_wrong": "known tokens not answered 200", "unknown_wrong": "unknown tokens not answered 401",
             "mixed_up": "responses for a token other than the one sent", "errors": "malformed, truncated or missing responses"}
    found = [f"{group[key]} {text}" for key, text in words.items() if group[key]]
    return "; ".join(found) + (f" (statuses: {group['statuses']})" if found else "")


# ---- verify ----------------------------------------------------------------------------------------------------------

def verify(args):
    lab, failed = open_lab(args), 0
    gateways, tokens = lab.available(args.gateways), lab.tokens()
    print_machine(lab, gateways)
    with lab.wire(tokens) as wire:
        for name, holds, bad in (verified(lab, wire, name, tokens) for name in gateways):
            failed += len(bad)
            print(f"\n{name}: {holds} of {holds + len(bad)} checks hold")
            for what, why in bad:
                print(f"  FAILS  {what}: {why}")
    return 1 if failed else 0


def verified(lab, wire, name, tokens):
    """The gateway's name, how many checks hold, and those that do not with what was seen."""
    with lab.gateway(name, tokens, wire.upstream) as running:
        results = [(what, outcome(check)) for what, check in checks(running.port, lab.read_tokens(tokens))]
    bad = [(what, why) for what, why in results if why]
    return name, len(results) - len(bad), bad


def outcome(check):
    """What was seen instead; None if the check passes."""
    try:
        return check()
    except (OSError, ValueError, IndexError) as error:
        return str(error)


def checks(port, tokens):
    """Pairs of (what is checked, a function that returns what it saw instead, or None)."""
    token, other, path = tokens[0], tokens[-1], "/api/v3/echo"
    known = set(tokens)
    in_header, unknown = {"PRIVATE-TOKEN": token}, "unknown--AAAAAAAAAAA"
    cased = next((t for t in tokens if t.swapcase() not in known), None)

    def forwarded(target, headers, expect):
        """The head that the upstream received, if the gateway forwarded exactly the expected target and one token."""
        with Client(port) as client:
            answer = client.get(target, headers)
        if answer.status != 200:
            return f"status {answer.status} {answer.body[:80]!r}", {}
        lines = answer.body.decode("latin-1").rstrip("\r\n").split("\r\n")
        seen = {}
        for key, _, value in (line.partition(":") for line in lines[1:]):
            seen.setdefault(key.lower(), []).append(value.strip())
        # a remaining "?" means the same target
        if lines[0].replace("? HTTP", " HTTP") != f"GET {expect} HTTP/1.1":
            return f"upstream saw {lines[0]!r}", seen
        if seen.get("private-token") != [token] or answer.body.count(token.encode()) != 1:
            return f"upstream saw PRIVATE-TOKEN {seen.get('private-token')}, token {answer.body.count(token.encode())} times in all", seen
        return None, seen

    def forwards(target, headers, expect):
        return forwarded(target, headers, expect)[0]

    def refused(target, headers):
        with Client(port) as client:
            answer = client.get(target, headers)
        if answer.status != 401 or answer.body != REFUSAL or not answer.headers.get("content-type", "").startswith("application/json"):
            return f"{answer.status} {answer.headers.get('content-type')} {answer.body[:80]!r}"

    def client_named(headers):
        why, seen = forwarded(path, {**in_header, **headers}, path)
        return why or unless(seen.get("x-forwarded-for") == ["127.0.0.1"], seen.get("x-forwarded-for"))

    def fresh_ids():
        ids = [forwarded(path, in_header, path)[1].get("x-request-id", [""])[0] for _ in range(2)]
        return unless(all(ids) and ids[0] != ids[1], ids)

    def apart():
        with Client(port) as client:
            answers = [client.get(path, {"PRIVATE-TOKEN": t}).body.count(t.encode()) for t in (token, other, token)]
        return unless(answers == [1, 1, 1], f"their own tokens {answers} times")

    def outlives():
        with Client(port) as client:
            statuses = [client.get(path, headers).status for headers in (in_header, {"PRIVATE-TOKEN": unknown}, in_header)]
        return unless(statuses == [200, 401, 200], statuses)

    for what, target, headers, expect in (
            ("token in the header", f"{path}?per_page=20&order_by=id", in_header, f"{path}?per_page=20&order_by=id"),
            ("header name in lower case", path, {"private-token": token}, path),
            ("token in the query, stripped; per_page=1000 clamped", f"{path}?private_token={token}&per_page=1000&order_by=id", {}, f"{path}?per_page=100&order_by=id"),
            ("token in the middle of the query", f"{path}?order_by=id&private_token={token}&sort=asc", {}, f"{path}?order_by=id&sort=asc"),
            ("token at the end of the query", f"{path}?order_by=id&private_token={token}", {}, f"{path}?order_by=id"),
            ("token alone in the query", f"{path}?private_token={token}", {}, path),
            ("per_page=1000 clamped with the token in the header", f"{path}?order_by=id&per_page=1000", in_header, f"{path}?order_by=id&per_page=100"),
            ("per_page=100 left alone", f"{path}?per_page=100", in_header, f"{path}?per_page=100")):
        yield what, partial(forwards, target, headers, expect)

    yield "unknown token in the header refused", partial(refused, path, {"PRIVATE-TOKEN": unknown})
    yield "unknown token in the query refused", partial(refused, f"{path}?private_token={unknown}", {})
    yield "no token refused", partial(refused, path, {})
    if cased:
        yield "known token in the wrong case refused", partial(refused, path, {"PRIVATE-TOKEN": cased.swapcase()})
    yield "X-Forwarded-For names the client", partial(client_named, {})
    yield "X-Forwarded-For of the client is not believed", partial(client_named, {"X-Forwarded-For": "203.0.113.7"})
    yield "X-Request-Id is there and fresh", fresh_ids
    yield "two callers on one connection stay apart", apart
    yield "the connection outlives a refusal", outlives


def unless(holds, seen):
    return None if holds else f"saw {seen}"


# ---- cpu -------------------------------------------------------------------------------------------------------------

def cpu(args):
    lab = open_lab(args)
    gateways, tokens = lab.available(args.gateways), lab.tokens()
    print_machine(lab, gateways)
    with lab.wire(tokens, busy=True) as wire:
        samples = interleaved(lab, wire, gateways, tokens, args)
    print_samples(samples, gateways, args.workloads)
    return status_of(samples)


def interleaved(lab, wire, gateways, tokens, args, half=False):
    """Lists of samples by gateway and workload. `half`: each also at half the rate that it has just reached."""
    samples = {}
    # The gateways are all up (the idle ones cost nothing) and take turns every few seconds, each round in another order:
    # a noisy minute affects all of them. They are restarted each round, because the memory layout influences the figures.
    for n in range(args.rounds):
        tell(f"round {n + 1} of {args.rounds}")
        turn = n % len(gateways)
        with contextlib.ExitStack() as stack:
            up = [stack.enter_context(lab.gateway(name, tokens, wire.upstream)) for name in gateways]
            for work in args.workloads:
                for running in up[turn:] + up[:turn]:
                    taken = samples.setdefault((running.name, work), [])
                    group = sample(wire, running, WORKLOADS[work].group, args)
                    if group and half:
                        group["half"] = sample(wire, running, {**WORKLOADS[work].group, "rate": group["rps"] / 2}, args)
                    # An overloaded machine may cost a sample, and then the ratios of this round, but not the others.
                    taken.append(group if group and group.get("half", True) else None)
    return samples


def print_samples(samples, gateways, workloads):
    for work in workloads:
        print(f"\n### {work}: {WORKLOADS[work].text}")
        rows = []
        for name in gateways:
            ratios = [ratio(samples[name, work], samples.get((peer, work))) for peer in ("haproxy", "nginx")]
            taken = list(filter(None, samples[name, work]))
            if not taken:
                rows.append([name, *["-"] * 10])
                continue
            middle = lambda key: f"{median(group[key] for group in taken):.0f}"
            costs = [group["cpu"] for group in taken]
            rows.append([name, f"{median(costs):.2f}", f"{min(costs):.2f}..{max(costs):.2f}", *ratios, middle("rps"),
                         middle("p50"), middle("p99"), middle("pss"), sum(map(wrong, taken)), sum(group["errors"] for group in taken)])
        table(["gateway", "CPU ms/1,000 requests", "min..max", "x haproxy", "x nginx", "req/s", "p50 µs", "p99 µs", "PSS MiB", "wrong", "errors"], rows)


def status_of(samples):
    for (name, work), taken in samples.items():
        for why in filter(None, map(faults, filter(None, taken))):
            tell(f"{name} {work}: {why}")
    return 1 if any(not group or faults(group) for taken in samples.values() for group in taken) else 0


def sample(wire, running, group, args):
    """What was measured; `None` if nothing was answered."""
    result = wire.run({"conns": args.connections, "spread": SPREAD, **group}, port=running.port,
                      pid=",".join(map(str, family(running.pid))), warm=min(1, args.seconds / 3), secs=args.seconds)
    group = result["groups"][0]
    if not group["in_time"]:
        tell(f"{running.name} answered nothing in {args.seconds} s: {faults(group)}")
        return None
    group["cpu"] = result["cpu_ns"] / group["in_time"] / 1000
    group["pss"] = pss_mib(running.pid)
    return group


# ---- peers -----------------------------------------------------------------------------------------------------------

def peers(args):
    if args.quick:
        args.rounds, args.seconds = 1, 0.8
    lab = open_lab(args)
    lab.install()
    gateways, tokens = lab.available(args.gateways), lab.tokens()
    print_machine(lab, gateways)
    with lab.wire(tokens) as wire:
        rows = [verified(lab, wire, name, tokens) for name in gateways]
    print("\n### Do they do the same job?")
    table(["gateway", "checks that hold", "what it does otherwise"],
          [[name, f"{holds} of {holds + len(bad)}", "; ".join(f"{what}: {why}" for what, why in bad) or "-"] for name, holds, bad in rows])
    status = 0
    for workers in args.workers or (1, 2):
        lab.set_threads(workers)
        # With two workers the load shares their CPUs: it sleeps when it has nothing to do, and the throughput is the machine's.
        with lab.wire(tokens, busy=workers == 1) as wire:
            samples = interleaved(lab, wire, gateways, tokens, args, half=workers == 1)
        print(f"\n## {workers} worker{'s' * (workers > 1)}")
        print_samples(samples, gateways, args.workloads)
        if workers == 1:
            print_half(samples, gateways, args.workloads)
        status |= status_of(samples)
    return status


def print_half(samples, gateways, workloads):
    print("\n### At half of its own saturation (sent at a fixed rate; from when each was due), p50 / p99 / p99.9 in µs")
    def cell(taken):
        return " / ".join(f"{median(group['half'][key] for group in taken):.0f}" for key in ("p50", "p99", "p999")) if taken else "-"

    table(["gateway", *workloads], [[name, *(cell(list(filter(None, samples[name, work]))) for work in workloads)] for name in gateways])


def ratio(ours, theirs):
    """Median of the ratios within each round; '-' if the peer was not measured."""
    both = [a["cpu"] / b["cpu"] for a, b in zip(ours, theirs or []) if a and b]
    return f"{median(both):.2f}" if both else "-"


# ---- instructions ----------------------------------------------------------------------------------------------------

def instructions(args):
    lab = open_lab(args)
    gateways, tokens = lab.available(args.gateways if args.peers else ["tollgate"]), lab.tokens()
    under = under_callgrind(lab)
    print_machine(lab, gateways)
    counts = {}
    with lab.wire(tokens) as wire:
        for name in gateways:
            tell(f"{name} under callgrind (it starts slowly)")
            with lab.gateway(name, tokens, wire.upstream, under, patience=300) as running:
                for work in args.workloads:
                    counts[name, work] = per_request(lab, wire, running, {"spread": 1000, **WORKLOADS[work].group}, args.requests)
    print(f"\nInstructions in user space per request ({args.requests} requests, 64 connections, {lab.known} known tokens)")
    table(["gateway", *(f"{work}: {WORKLOADS[work].text}" for work in args.workloads)],
          [[name, *(f"{counts[name, work]:.0f}" for work in args.workloads)] for name in gateways])
    if args.guard:
        return guard(Path(args.guard), {work: round(counts["tollgate", work]) for work in args.workloads}, args.update)


def guard(file, counts, update):
    """Compares with the counts that the repository keeps."""
    if update:
        file.write_text(json.dumps(counts, indent=2) + "\n")
        return 0
    status = 0
    for work, kept in json.loads(file.read_text()).items():
        change = counts[work] / kept - 1
        print(f"{work}: {counts[work]} instructions, {change:+.1%} from the {kept} in {file.name}")
        if change > 0.03:
            print(f"{work}: more than 3 % above. If that is what the change is worth, run this with --update and say why")
            status = 1
        elif change < -0.03:
            print(f"{work}: more than 3 % below. Run this with --update, so that it stays so")
    return status


def under_callgrind(lab):
    """The command to run a gateway with. Instrumentation is off during start-up and the first requests, which is also much faster."""
    return [lab.program("valgrind"), "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={lab.work}/callgrind"]


def per_request(lab, wire, running, load, requests, first=2000):
    """The difference of two runs, in which connecting and other fixed costs cancel out. `first`: requests before that, so that
    what can be cached is."""
    vgdb = lab.program("vgdb")
    for old in lab.work.glob("callgrind.*"):
        old.unlink()

    def ask(what):
        done = subprocess.run([vgdb, f"--pid={running.pid}", *what.split()], text=True, capture_output=True, timeout=120)
        if done.returncode:
            raise Problem(f"vgdb cannot reach valgrind (is ptrace allowed here?): {done.stderr.strip()[-300:]}")

    def send(count):
        group = wire.run({**load, "count": count}, port=running.port, stall=60, limit=1800)["groups"][0]
        if why := faults(group):
            raise Problem(f"{running.name} {load}: {why}")

    def cost(count):
        before = set(lab.work.glob("callgrind.*"))
        ask("zero")
        send(count)
        ask("dump")
        text = "".join(file.read_text() for file in set(lab.work.glob("callgrind.*")) - before)
        total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
        if not total:
            raise Problem(f"no total in the profile that callgrind left in {lab.work}")
        return int(total[1])

    send(first)
    ask("instrumentation on")
    send(200)
    once = requests // 4
    return (cost(once + requests) - cost(once)) / requests


# ---- load and flood --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def under_test(args):
    """The wire, and the gateway to load: started here, or already running (--port)."""
    if (args.pid or args.upstream_port) and not args.port:
        raise Problem("--pid and --upstream-port are for a running gateway: give its --port")
    if args.port and not args.tokens:
        raise Problem("with --port, a file of tokens that this gateway knows is needed (--tokens or --good)")
    lab = open_lab(args)
    tokens = args.tokens or lab.tokens()
    lab.read_tokens(tokens)
    ours = not args.port or bool(args.upstream_port)
    with lab.wire(tokens, mirror=ours, upstream=args.upstream_port) as wire:
        if args.port:
            yield wire, Running("gateway", args.port, args.pid)
            return
        lab.available([args.gateway])
        print_machine(lab, [args.gateway])
        with lab.gateway(args.gateway, tokens, wire.upstream) as running:
            yield wire, running


def watched(pid, every):
    return RssWatch(pid, every) if pid else contextlib.nullcontext()


def print_groups(groups):
    table(["requests", "answers", "req/s", "wrong", "errors", "reconnects", "p50 µs", "p99 µs", "p99.9 µs", "max µs", "statuses"],
          [[name, g["requests"], f"{g['rps']:.0f}", wrong(g), g["errors"], g["reconnects"], g["p50"], g["p99"], g["p999"], g["max"],
            ", ".join(f"{status}: {n}" for status, n in g["statuses"].items())] for name, g in groups.items()])
    bad = {name: why for name, g in groups.items() if (why := faults(g))}
    for name, why in bad.items():
        print(f"\nWRONG  {name}: {why}")
    return 1 if bad else 0


def print_memory(memory):
    if memory:
        print(f"\nRSS MiB: start {memory.first:.1f}, max {memory.top:.1f}, end {memory.last:.1f}")


DEAD = {"one of two refuses": ("refusing", 1, 1), "one of two is silent": ("silent", 1, 1),
        "three of four refuse": ("refusing", 3, 1), "three of four are silent": ("silent", 3, 1)}


def servers(args):
    """GET, which may be sent again. The gateway is started anew for each row, so that it has to find out."""
    args.known = 100
    lab = open_lab(args)
    gateways, tokens = lab.available(args.gateways), lab.tokens()
    print_machine(lab, gateways)
    rows = []
    for what, (how, dead, alive) in DEAD.items():
        lab.servers = alive
        for name in gateways:
            row = [what, name]
            for clients in (1, 8, 32):
                with lab.wire(tokens, addresses=alive) as wire, contextlib.ExitStack() as stack:
                    lab.dead = [stack.enter_context(dead_server(how)) for _ in range(dead)]
                    running = stack.enter_context(lab.gateway(name, tokens, wire.upstream))
                    group = wire.run({"kind": "h", "conns": clients}, port=running.port, secs=4)["groups"][0]
                    failed = sum(n for status, n in group["statuses"].items() if status != "200") + group["errors"]
                    row.append(f"{failed} / {group['slow']} of {group['requests'] + group['errors']}")
            rows.append(row)
    print("\nFailed / waited 0.9 s or more, of all requests in 4 s; timeouts of 1 s to connect and to read")
    table(["servers", "gateway", *(f"{n} client{'s' * (n > 1)}" for n in (1, 8, 32))], rows)


@contextlib.contextmanager
def dead_server(how):
    """The address of a server that refuses connections, or takes them and says nothing."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if how == "silent":
            s.listen(4096)
        yield f"127.0.0.1:{s.getsockname()[1]}"


BODY_MEMORY = 2  # MiB by which a body of any size may raise the memory of the process

HELD = {"idle": "idle", "hang": "waiting for the backend", "big": "not reading a 20 MB answer", "unfinished": "head of 31 KB, unfinished"}


def memory(args):
    """Each gateway anew for each kind, so that memory that a kind leaves behind is not taken for the next one's."""
    import held
    lab = open_lab(args)
    gateways, tokens = lab.available(args.gateways), lab.tokens()
    print_machine(lab, gateways)
    known = lab.read_tokens(tokens)
    rows = []
    for name in gateways:
        row = [name]
        with lab.wire(tokens) as wire, lab.gateway(name, tokens, wire.upstream) as running:
            started = rss_mib(running.pid)
            group = wire.run({"kind": "h", "count": 3 * len(known), "spread": len(known), "conns": 512}, port=running.port, limit=600)["groups"][0]
            if why := faults(group):
                raise Problem(f"{name}: {why}")
            row += [f"{started:.0f}", f"{rss_mib(running.pid):.0f}"]
        for what in HELD:
            with held.Backend() as backend, lab.gateway(name, tokens, backend.port) as running:
                held.per_connection(running, known[0], "idle", 20)
                row.append(f"{held.per_connection(running, known[0], what, args.connections):.1f}")
        rows.append(row)
    print(f"\nResident memory with {lab.known} known tokens, and KiB for each of {args.connections} connections")
    table(["gateway", "started, MiB", "tokens used, 512 connections, MiB", *(f"{text}, KiB" for text in HELD.values())], rows)


def bodies(args):
    import held
    args.known = 100  # memory that reading many tokens left behind would take the bodies in
    lab, size, rows = open_lab(args), args.mib << 20, []
    gateways, tokens = lab.available(args.gateways), lab.tokens()
    token = lab.read_tokens(tokens)[0]
    print_machine(lab, gateways)

    def carried(wire, running, **body):
        group = wire.run({"kind": "h", "conns": 1, "count": 1, **body}, port=running.port, stall=300, limit=300)["groups"][0]
        return 0 if faults(group) else size

    def carry(name, what, how, wire, running):
        with RssWatch(running.pid, 0.05) as memory:
            began = time.monotonic()
            whole = how(wire, running) == size
        grown = memory.top - memory.first
        rows.append([name, what, "whole" if whole else "CUT", f"{time.monotonic() - began:.1f}", f"{memory.first:.1f}", f"{memory.top:.1f}", f"{grown:.1f}"])
        return whole and grown <= BODY_MEMORY

    good = True
    for name in gateways:
        with lab.wire(tokens) as wire:
            for what, how in {
                "answer": lambda wire, running: carried(wire, running, down=size),
                "request": lambda wire, running: carried(wire, running, up=size),
                "answer, slow client": lambda _, running: held.slow_answer(running.port, token, size, args.slow),
            }.items():
                with lab.gateway(name, tokens, wire.upstream) as running:
                    good &= carry(name, what, how, wire, running)
        with held.Backend() as backend, lab.gateway(name, tokens, backend.port) as running:
            good &= carry(name, "request, slow backend", lambda _, running: held.slow_upload(running.port, token, size, args.slow), None, running)
    print(f"\nBodies of {args.mib} MiB; a slow receiver takes 1 MiB a second for {args.slow} s, then all that comes")
    table(["gateway", "body", "arrived", "seconds", "RSS before, MiB", "at most", "grown by"], rows)
    return 0 if good else 1


def load(args):
    with under_test(args) as (wire, running):
        with watched(running.pid, 1) as memory:
            result = wire.run({"kind": "m", "conns": args.connections, "bad": args.bad}, port=running.port, pid=running.pid or 0,
                              secs=args.seconds, path=args.path, seed=seed())
        status = print_groups({f"mixed, {args.bad} % unknown": result["groups"][0]})
        print_memory(memory)
    return status


def flood(args):
    good = {"kind": "m", "conns": 1, "rate": args.rate}
    with under_test(args) as (wire, running):
        common = {"port": running.port, "pid": running.pid or 0, "path": args.path}
        alone = wire.run(good, secs=args.alone, seed=seed(), **common)
        with watched(running.pid, 0.2) as memory:
            result = wire.run({"kind": "x", "conns": args.connections, "count": args.count}, good,
                              limit=60 + args.count / 500, seed=seed(), **common)
        unknown, known = result["groups"]
        status = print_groups({"known, alone": alone["groups"][0], "known, in the flood": known, "unknown": unknown})
        print_memory(memory)
    return status


def seed():
    """Unknown tokens that differ from those of earlier runs, which a running gateway may have cached."""
    return time.time_ns() // 1_000_000 % (1 << 31)


if __name__ == "__main__":
    sys.exit(main())
