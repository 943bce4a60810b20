#!/usr/bin/env python3
"""pictures.py --tollgate BINARY [--into FOLDER] [--seconds N] [--axe FILE]: fills a gateway with traffic, checks its page with a real
Chromium in the long form, and takes the pictures that the documents have. The more seconds, the fuller the plots."""
import argparse, os, pathlib, signal, struct, sys, time, zlib
import checks
from browser import Browser
from traffic import Site

MOST = 250_000
VIEWS = [("desk", 1280, 900, 1, None), ("phone", 390, 844, 1, 2600)]


def smaller(png):
    """The same picture with at most 256 colours: those that are there most, and for the others the nearest of these."""
    at, chunks, body = 8, {}, b""
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == b"IDAT":
            body += png[at + 8 : at + 8 + length]
        else:
            chunks[kind] = png[at + 8 : at + 8 + length]
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert depth == 8 and colour in (2, 6)
    size, raw, rows, before = {2: 3, 6: 4}[colour], zlib.decompress(body), [], None
    stride = width * size
    for y in range(height):
        kind, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        above = before or bytearray(stride)
        if kind == 1:
            for x in range(size, stride):
                line[x] = (line[x] + line[x - size]) & 255
        elif kind == 2:
            line = bytearray((a + b) & 255 for a, b in zip(line, above))
        elif kind == 3:
            for x in range(stride):
                line[x] = (line[x] + ((line[x - size] if x >= size else 0) + above[x]) // 2) & 255
        elif kind == 4:
            for x in range(stride):
                a, b, c = (line[x - size] if x >= size else 0), above[x], (above[x - size] if x >= size else 0)
                p = a + b - c
                pa, pb, pc = abs(p - a), abs(p - b), abs(p - c)
                line[x] = (line[x] + (a if pa <= pb and pa <= pc else b if pb <= pc else c)) & 255
        rows.append([bytes(line[x : x + 3]) for x in range(0, stride, size)])
        before = line
    counts = {}
    for row in rows:
        for pixel in row:
            counts[pixel] = counts.get(pixel, 0) + 1
    palette = sorted(counts, key=counts.get, reverse=True)[:256]
    index = {pixel: number for number, pixel in enumerate(palette)}
    for pixel in counts:
        if pixel not in index:
            index[pixel] = min(range(len(palette)), key=lambda n: sum((a - b) ** 2 for a, b in zip(pixel, palette[n])))
    lines = b"".join(b"\0" + bytes(index[pixel] for pixel in row) for row in rows)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return png[:8] + chunk(b"IHDR", header) + chunk(b"PLTE", b"".join(palette)) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def take(browser, url, into):
    for scheme in ("light", "dark"):
        browser.colours(scheme)
        for name, width, height, scale, most in VIEWS:
            browser.size(width, height, phone=width < 640, scale=scale)
            browser.open(url)
            picture = smaller(browser.picture(most))
            assert len(picture) < MOST, f"{name}-{scheme}: {len(picture)} bytes"
            (into / f"page-{name}-{scheme}.png").write_bytes(picture)
            print(f"page-{name}-{scheme}.png: {len(picture)} bytes", flush=True)


def main():
    # So that what was started is ended in any case.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    read = argparse.ArgumentParser()
    read.add_argument("--tollgate", required=True)
    read.add_argument("--into", default="docs/pictures")
    read.add_argument("--seconds", type=float, default=60)
    read.add_argument("--axe", help="axe.min.js, for its rules as well")
    read.add_argument("--serve", action="store_true", help="only fill a gateway, until interrupted")
    wanted = read.parse_args()
    into = pathlib.Path(wanted.into)
    into.mkdir(parents=True, exist_ok=True)
    with Site(os.path.abspath(wanted.tollgate)) as site:
        print(site.url, flush=True)
        began = time.monotonic()
        time.sleep(min(20, wanted.seconds / 3))
        text = site.config.read_text()
        print(site.reload(text.replace("900/min", "600/min").replace('balance = "least_requests"\n', "")).stdout, end="")
        time.sleep(2)
        site.reload(text.replace("600/min", "lots/min").replace("900/min", "lots/min"))
        site.reload(text.replace("900/min", "600/min").replace("threads = 1", "threads = 2"))
        site.config.write_text(text.replace("900/min", "600/min"))
        while wanted.serve:
            time.sleep(1)
        time.sleep(max(0, wanted.seconds - (time.monotonic() - began)))
        with Browser() as browser:
            take(browser, site.url, into)
            browser.requests(), browser.messages()
            axe = pathlib.Path(wanted.axe).read_text() if wanted.axe else None
            seen, focusable = checks.looks(browser, site.url, axe)
            print(f"{min(seen.values())} texts in each of {len(seen)} views; Tab reaches all {focusable}; axe: {'no violations' if axe else 'not asked'}")
            before = checks.live(browser, site.url)
            checks.went_on(browser, before)
            asked = checks.own(browser, site.url)
            checks.paused(browser)
            rows = checks.without_scripts(browser, site.url, ["alice", "limit_rate", "gitlab", "api.example.com"])
            print(f"live, paused while hidden, {asked} requests, all to the gateway; {rows} rows without scripts; {checks.forged(browser, site.url)} forged requests refused")


if __name__ == "__main__":
    sys.exit(main())
