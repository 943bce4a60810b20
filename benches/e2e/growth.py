#!/usr/bin/env python3
"""How the cost of a request grows with what the gateway has to know, to hold and to read.

    growth.py measure [CURVE ...]   instructions in user space per request (callgrind) into docs/growth/CURVE.json
    growth.py draw                  docs/growth/CURVE.svg from those

Each curve changes one thing and leaves the others as they are: 100 known tokens, one server, no routes, 64 connections, a token in
the header. docs/growth.md says what follows."""
import argparse, contextlib, json, math, socket, sys
from pathlib import Path

sys.dont_write_bytecode = True
import run
from lab import ROOT, Lab, Problem, tell

FOLDER = ROOT / "docs/growth"
# What is changed, to how much, and what stands under the plot.
CURVES = {
    "known": ((100, 1_000, 10_000, 100_000, 1_000_000), "known tokens, of which up to 10,000 are in use"),
    "routes": ((1, 10, 100, 1_000, 10_000), "routes, each asked for in turn"),
    "servers": ((1, 10, 100, 1_000), "servers of the upstream"),
    "connections": ((64, 100, 1_000, 10_000, 19_000), "open connections, of which 64 are in use"),
    "fields": ((4, 10, 30, 60, 100), "header fields of the request"),
    "query": ((24, 100, 400, 1_000, 4_000), "bytes of the query"),
}
OWN_FIELDS, OWN_QUERY, ACTIVE = 4, 23, 64  # of each request, of which 64 are on their way at a time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "draw"])
    parser.add_argument("curves", nargs="*", metavar="CURVE", help=f"of {', '.join(CURVES)} (default: all)")
    parser.add_argument("--at", type=run.positive, help="one more value for the curve: 10000000 known tokens need 8 GiB and 10 minutes")
    parser.add_argument("--requests", type=run.positive, default=3_000, help="per point (default: %(default)s)")
    parser.add_argument("--tollgate", default=run.TARGET / "dist/tollgate", help="the binary (default: %(default)s)")
    parser.add_argument("--work", default=run.TARGET / "bench-growth", help="folder for generated files (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.curves) - set(CURVES):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(CURVES)}")
    try:
        for curve in args.curves or CURVES:
            if args.command == "measure":
                measure(curve, args)
            elif (FOLDER / f"{curve}.json").exists():
                draw(curve)
    except Problem as problem:
        tell(f"growth.py: {problem}")
        return 2


# ---- measure ---------------------------------------------------------------------------------------------------------

def measure(curve, args):
    values, points = CURVES[curve][0], {}
    for value in values + ((args.at,) if args.at else ()):
        points[value] = round(cost(curve, value, args))
        tell(f"{curve} {value}: {points[value]} instructions")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{curve}.json").write_text(json.dumps(points, indent=1) + "\n")


def cost(curve, value, args):
    """Instructions for a request."""
    of = lambda name, usual: value if curve == name else usual
    lab = Lab(args.work, args.tollgate, of("known", 100), extra="")
    lab.servers = of("servers", 1)
    group = {"kind": "h", "conns": ACTIVE, "fields": of("fields", OWN_FIELDS) - OWN_FIELDS, "query": of("query", OWN_QUERY) - OWN_QUERY}
    if curve == "routes":
        lab.extra = "".join(f'[[route]]\npath = "/api/v3/projects/r{i}/x"\nmethods = ["GET"]\n' for i in range(value))
        group["paths"] = value
    tokens = lab.tokens()
    with lab.wire(tokens, addresses=lab.servers) as wire:
        under = run.under_callgrind(lab)
        with lab.gateway("tollgate", tokens, wire.upstream, under, patience=300) as running:
            with open_connections(running.port, lab.read_tokens(tokens)[0], of("connections", ACTIVE) - ACTIVE):
                # As many requests at first as it takes to have been at every token, route and server.
                return run.per_request(lab, wire, running, {**group, "spread": 10_000}, args.requests, first=12_000)


@contextlib.contextmanager
def open_connections(port, token, count):
    """Connections that have had an answer each, and are kept."""
    held = []
    try:
        for _ in range(count):
            s = socket.create_connection(("127.0.0.1", port), 30)
            held.append(s)
            s.sendall(f"GET /api/v3/projects HTTP/1.1\r\nHost: h.test\r\nPRIVATE-TOKEN: {token}\r\n\r\n".encode())
        for s in held:
            if not s.recv(65536).startswith(b"HTTP/1.1 200"):
                raise Problem("an open connection was refused")
        yield
    finally:
        for s in held:
            s.close()


# ---- draw ------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 260, 60, 46, 16


def draw(curve):
    """A logarithmic axis of what was changed, and one of instructions that begins at zero."""
    points = {int(value): count for value, count in json.loads((FOLDER / f"{curve}.json").read_text()).items()}
    low, high = math.log10(min(points)), math.log10(max(points))
    step = 10 ** math.floor(math.log10(max(points.values())))
    ceiling = math.ceil(1.1 * max(points.values()) / step) * step
    x = lambda value: LEFT + 30 + (WIDTH - LEFT - 70) * (math.log10(value) - low) / (high - low)
    y = lambda count: HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * count / ceiling
    text = lambda at, down, words, anchor="middle": f'<text x="{at:.0f}" y="{down:.0f}" text-anchor="{anchor}">{words}</text>'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for n in range(5):
        count = ceiling * n // 4
        lines += [f'<path d="M{LEFT} {y(count):.0f}H{WIDTH - 10}" stroke="#ddd"/>', text(LEFT - 6, y(count) + 4, f"{count:,}", "end")]
    path = " ".join(f"{x(value):.1f},{y(count):.1f}" for value, count in points.items())
    lines.append(f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    for value, count in points.items():
        lines += [f'<circle cx="{x(value):.1f}" cy="{y(count):.1f}" r="3" fill="#1f6feb"/>',
                  text(x(value), y(count) - 8, f"{count:,}"), text(x(value), HEIGHT - BOTTOM + 16, f"{value:,}")]
    lines += [text((LEFT + WIDTH) / 2, HEIGHT - 8, f"{CURVES[curve][1]} (instructions per request)"), "</svg>"]
    (FOLDER / f"{curve}.svg").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
