#!/usr/bin/env python3
"""Runs tollgate for a long time at half of what it can do (or another --share), with a fault every other ten seconds, and asks whether anything grows:
memory, descriptors, threads, connections, requests in flight, latency. Draws docs/soak.svg.

    soak.py [--seconds 3600] [--share 0.5] [--tollgate BINARY] [--draw]

Fails if a request fails, or if the last third of the time is worse than the first: more than 2 MiB of memory, 4 descriptors or
2 threads more, or a latency without faults of more than 1.5 times as much."""
import argparse, contextlib, json, os, re, signal, socket, sys, threading, time
from pathlib import Path
from statistics import median

sys.dont_write_bytecode = True
from lab import TARGET, Client, Lab, Problem, Wire, free_port, rss_mib, tell, tollgate_token, write

ROOT = Path(__file__).resolve().parents[2]
SLICE = 10  # seconds: one fault, or none
KNOWN = 20_000
HELD = 200  # connections that a fault opens
FAILS = {"memory, MiB": 2, "descriptors": 4, "threads": 2}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=3600)
    options.add_argument("--share", type=float, default=0.5, help="of the rate at which it is saturated (default: %(default)s)")
    options.add_argument("--tollgate", default=TARGET / "dist/tollgate")
    options.add_argument("--work", default=TARGET / "soak")
    options.add_argument("--draw", action="store_true", help="write docs/soak.svg")
    args = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return soak(args)
    except Problem as problem:
        tell(f"soak.py: {problem}")
        return 2


class Soaked:
    """The gateway, its two servers, and what is done to them."""

    def __init__(self, lab, tokens, wire, second, running):
        self.lab, self.tokens, self.wire, self.second, self.running = lab, tokens, wire, second, running
        self.config = lab.work / "tollgate.toml"
        self.admin = int(re.search(r'\[admin\]\nlisten = "127.0.0.1:(\d+)"', self.config.read_text())[1])
        self.store = lab.derived(tokens, "toml", tollgate_token)
        self.token = lab.read_tokens(tokens)[-1]

    def metrics(self):
        with Client(self.admin) as client:
            text = client.get("/metrics").body.decode()
        value = lambda name: sum(float(found) for found in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))
        return {"connections": value("tollgate_connections"), "in flight": value("tollgate_requests_in_flight"),
                "panics": value("tollgate_panics_total")}

    def state(self):
        process = Path(f"/proc/{self.running.pid}")
        return {"memory, MiB": rss_mib(self.running.pid), "descriptors": sum(1 for _ in (process / "fd").iterdir()),
                "threads": sum(1 for _ in (process / "task").iterdir()), **self.metrics()}

    # -- faults: each ends within a slice, and leaves everything as it was

    def no_fault(self):
        pass

    def server_dies(self):
        """One of two servers is gone for six seconds. What it was answering is lost only where a retry may not be."""
        self.second.close()
        time.sleep(SLICE * 0.6)
        self.second = Wire(self.lab, self.tokens, mirror=True, upstream=self.second.upstream)

    def reloads(self):
        text = self.config.read_text()
        for turn in range(4):
            self.config.write_text(text.replace('level = "warn"', f'level = "{["error", "warn"][turn % 2]}"'))
            os.kill(self.running.pid, signal.SIGHUP)
            time.sleep(1.5)
        self.config.write_text(text)
        os.kill(self.running.pid, signal.SIGHUP)

    def revoked(self):
        """A token ends, and comes back."""
        text = self.store.read_text()
        write(self.store, text.replace(tollgate_token(self.token), ""))
        time.sleep(3)
        status = self.status()
        write(self.store, text)
        if status != 401:
            raise Problem(f"a revoked token got {status}")

    def status(self):
        with Client(self.running.port) as client:
            return client.get("/api/v3/projects", {"PRIVATE-TOKEN": self.token}).status

    def held(self, text):
        """Connections that send this, and nothing more for some seconds."""
        with contextlib.ExitStack() as stack:
            for _ in range(HELD):
                s = stack.enter_context(socket.create_connection(("127.0.0.1", self.running.port), 5))
                s.sendall(text.encode())
            time.sleep(SLICE * 0.6)

    def half_heads(self):
        self.held("GET /api/v3/projects HTTP/1.1\r\nHost: a\r\nPRIV")

    def no_readers(self):
        self.held(f"GET /api/v3/bytes/1000000 HTTP/1.1\r\nHost: a\r\nPRIVATE-TOKEN: {self.token}\r\n\r\n")

    def cut_bodies(self):
        head = f"POST /api/v3/projects HTTP/1.1\r\nHost: a\r\nPRIVATE-TOKEN: {self.token}\r\nContent-Length: 100000\r\n\r\n"
        self.held(head + "x" * 5000)

    FAULTS = [server_dies, reloads, revoked, half_heads, no_readers, cut_bodies]


def soak(args):
    lab = Lab(args.work, args.tollgate, KNOWN, threads=2)
    second_port = free_port()
    lab.dead = [f"127.0.0.1:{second_port}"]  # it dies from time to time
    tokens = lab.tokens()
    slices, failed = [], []
    with lab.wire(tokens, mirror=True) as wire, contextlib.ExitStack() as stack:
        second = Wire(lab, tokens, mirror=True, upstream=second_port)
        with lab.gateway("tollgate", tokens, wire.upstream) as running:
            soaked = Soaked(lab, tokens, wire, second, running)
            stack.callback(lambda: soaked.second.close())
            full = load(soaked, 5, conns=64)["rps"]
            rate = round(full * args.share)
            tell(f"saturated at {full:.0f} requests a second; {args.seconds} s at {rate}")
            began = time.monotonic()
            while time.monotonic() - began < args.seconds:
                turn = len(slices)
                fault = Soaked.no_fault if turn % 2 == 0 else Soaked.FAULTS[turn // 2 % len(Soaked.FAULTS)]
                result = one_slice(soaked, fault, rate)
                result["at"] = round(time.monotonic() - began, 1)
                slices.append(result)
                if result["failed"]:
                    failed.append(f"{result['fault']} at {result['at']:.0f} s: {result['failed']}")
                if turn % 30 == 0:
                    tell(f"{result['at']:6.0f} s  {result['memory, MiB']:.1f} MiB  {result['descriptors']} fds  p99 {result['p99']} µs")
    (Path(args.work) / "soak.json").write_text(json.dumps(slices, indent=1) + "\n")
    worse = report(slices, rate)
    for why in failed[:20] + worse:
        print(f"FAILED  {why}")
    if args.draw:
        draw(slices, ROOT / "docs/soak.svg")
    print(f"{sum(s['requests'] for s in slices)} requests in {slices[-1]['at']:.0f} s, {len(slices)} slices, {len(failed)} with a failure")
    return 1 if failed or worse else 0


def load(soaked, seconds, **group):
    return soaked.wire.run({"kind": "m", "bad": 10, **group}, port=soaked.running.port, secs=seconds, stall=20,
                           seed=int(time.time()))["groups"][0]


def one_slice(soaked, fault, rate):
    went_wrong = []

    def run():
        try:
            fault(soaked)
        except Exception as error:
            went_wrong.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run)
    thread.start()
    group = load(soaked, SLICE, conns=32, rate=rate)
    thread.join()
    statuses = {status: count for status, count in group["statuses"].items() if status not in ("200", "401")}
    wrong = [f"{count} x {status}" for status, count in statuses.items()] + went_wrong
    if group["errors"]:
        wrong.append(f"{group['errors']} errors")
    if group["requests"] < rate * SLICE * 0.5:
        wrong.append(f"only {group['requests']} of {rate * SLICE} requests")
    return {"fault": fault.__name__, "requests": group["requests"], "p50": group["p50"], "p99": group["p99"],
            "failed": "; ".join(wrong), **soaked.state()}


def report(slices, rate):
    """The first third beside the last, behind a tenth of the time in which caches fill."""
    calm = [s for s in slices if s["fault"] == "no_fault"]
    calm = calm[len(calm) // 10:] if len(calm) > 20 else calm
    third = max(1, len(calm) // 3)
    first, last = calm[:third], calm[-third:]
    of = lambda part, key: median(s[key] for s in part)
    worse = []
    print(f"\nAt {rate} requests a second, medians of the slices without a fault\n\n| | first third | last third |\n|---|---|---|")
    for key in ["memory, MiB", "descriptors", "threads", "connections", "in flight", "p50", "p99"]:
        before, after = of(first, key), of(last, key)
        print(f"| {key}{', µs' if key in ('p50', 'p99') else ''} | {before:.1f} | {after:.1f} |")
        limit = before * 1.5 if key in ("p50", "p99") else before + FAILS.get(key, float("inf"))
        if after > limit:
            worse.append(f"{key}: {before:.1f} at first, {after:.1f} at last")
    if panics := slices[-1]["panics"]:
        worse.append(f"{panics:.0f} panics")
    print("\n| fault | slices | p99, µs (median) | with a failure |\n|---|---|---|---|")
    for name in ["no_fault", *(fault.__name__ for fault in Soaked.FAULTS)]:
        own = [s for s in slices if s["fault"] == name]
        if own:
            print(f"| {name.replace('_', ' ')} | {len(own)} | {of(own, 'p99'):.0f} | {sum(bool(s['failed']) for s in own)} |")
    return worse


# ---- draw ------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, GAP = 720, 110, 70, 26
CURVES = [("memory, MiB", "memory, MiB", 1), ("descriptors", "descriptors", 1), ("p50", "p50, ms", 1000), ("p99", "p99, ms", 1000)]


def draw(slices, file):
    """One strip for each of what was measured, all from zero, over minutes; faults are dots."""
    most = slices[-1]["at"]
    height = len(CURVES) * (HEIGHT + GAP) + 30
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    x = lambda at: LEFT + (WIDTH - LEFT - 20) * at / most
    for number, (key, title, divisor) in enumerate(CURVES):
        values = [s[key] / divisor for s in slices]
        # A few slices with a fault may be far above: they are drawn at the edge.
        ceiling = max(1.25 * sorted(values)[int(len(values) * 0.98) - 1], 0.001)
        bottom = number * (HEIGHT + GAP) + HEIGHT + 16
        y = lambda value: bottom - (HEIGHT - 16) * min(value / ceiling, 1)
        lines += [f'<path d="M{LEFT} {bottom}H{WIDTH - 20}M{LEFT} {y(ceiling):.0f}H{WIDTH - 20}" stroke="#ddd"/>',
                  f'<text x="{LEFT - 6}" y="{y(ceiling) + 4:.0f}" text-anchor="end">{ceiling:.3g}</text>',
                  f'<text x="{LEFT - 6}" y="{bottom + 4}" text-anchor="end">0</text>',
                  f'<text x="{LEFT}" y="{bottom - HEIGHT + 8}">{title}</text>']
        calm = [(s["at"], v) for s, v in zip(slices, values) if s["fault"] == "no_fault"]
        lines.append('<polyline points="' + " ".join(f"{x(at):.1f},{y(v):.1f}" for at, v in calm)
                     + '" fill="none" stroke="#1f6feb" stroke-width="1.5"/>')
        lines += [f'<circle cx="{x(s["at"]):.1f}" cy="{y(v):.1f}" r="1.8" fill="#d1242f"/>'
                  for s, v in zip(slices, values) if s["fault"] != "no_fault"]
    for part in range(7):
        lines.append(f'<text x="{x(most * part / 6):.0f}" y="{height - 10}" text-anchor="middle">{most * part / 360:.0f} min</text>')
    lines.append("</svg>")
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
