"""RFC 9113, frame by frame, against a listener that speaks HTTP/2 without TLS: frames.py PORT TOKEN

Each case opens a connection, sends frames made here by hand, and says what must follow. Field blocks are coded by the hpack
package, which nobody here wrote. A stream error may be answered as a connection error (5.4.2); which of them the library
chooses is what each case lists. Prints a Markdown table, and ends with the number of cases and of requests that must have
reached the backend."""

import socket
import struct
import sys

import hpack

PORT, TOKEN = int(sys.argv[1]), sys.argv[2]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIO = 1, 1, 4, 8, 32
NO_ERROR, PROTOCOL, INTERNAL, FLOW, SETTINGS_TIMEOUT, CLOSED, SIZE, REFUSED, CANCEL, COMPRESSION = range(10)
CALM = 11


def frame(kind, flags, stream, payload=b"", length=None):
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def fields(method=b"GET", path=b"/api/v3/projects", scheme=b"http", authority=b"h.test", more=(), token=True):
    pseudo = [(b":method", method), (b":scheme", scheme), (b":path", path), (b":authority", authority)]
    own = [(b"private-token", TOKEN.encode())] if token else []
    return [pair for pair in pseudo if pair[1] is not None] + own + list(more)


class Connection:
    def __init__(self, preface=PREFACE, settings=True):
        self.socket = socket.create_connection(("127.0.0.1", PORT))
        self.socket.settimeout(5)
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        # Without the dynamic table, a block can be sent in any order.
        self.encoder.header_table_size = 0
        self.buffer, self.log = b"", []
        if preface:
            self.send(preface)
        if settings:
            self.send(frame(SETTINGS, 0, 0))

    def send(self, data):
        try:
            self.socket.sendall(data)
        except OSError:
            pass

    def block(self, pairs):
        return self.encoder.encode(pairs, huffman=False)

    def headers(self, stream, pairs=None, flags=END_HEADERS | END_STREAM):
        self.send(frame(HEADERS, flags, stream, self.block(pairs or fields())))

    def next(self):
        while True:
            if len(self.buffer) >= 9:
                length = int.from_bytes(self.buffer[:3], "big")
                if len(self.buffer) >= 9 + length:
                    kind, flags = self.buffer[3], self.buffer[4]
                    stream = int.from_bytes(self.buffer[5:9], "big") & 0x7FFFFFFF
                    payload, self.buffer = self.buffer[9 : 9 + length], self.buffer[9 + length :]
                    return kind, flags, stream, payload
            try:
                data = self.socket.recv(65536)
            except socket.timeout:
                return None
            except OSError:
                return "closed"
            if not data:
                return "closed"
            self.buffer += data

    def events(self, until):
        """What follows, up to the first event that `until` takes."""
        while True:
            got = self.next()
            if got is None:
                event = ("silence",)
            elif got == "closed":
                event = ("closed",)
            else:
                kind, flags, stream, payload = got
                if kind == SETTINGS and not flags & ACK:
                    self.send(frame(SETTINGS, ACK, 0))
                    continue
                if kind == HEADERS:
                    event = ("status", stream, int(dict(self.decoder.decode(payload, raw=True))[b":status"]))
                elif kind == RST:
                    event = ("rst", stream, int.from_bytes(payload, "big"))
                elif kind == GOAWAY:
                    event = ("goaway", int.from_bytes(payload[4:8], "big"))
                elif kind == PING and flags & ACK:
                    event = ("pong", payload)
                else:
                    continue
            self.log.append(event)
            if until(event) or event[0] in ("closed", "silence"):
                return event


CASES = []
FORWARDED = 0


def case(section, what, *expected, forwarded=0):
    def take(function):
        CASES.append((section, what, function, expected, forwarded))
        return function

    return take


def simple(section, what, pairs, *expected, flags=END_HEADERS | END_STREAM, forwarded=0):
    CASES.append((section, what, lambda c: c.headers(1, pairs, flags), expected, forwarded))


def raw(section, what, data, *expected, forwarded=0):
    CASES.append((section, what, lambda c: c.send(data(c) if callable(data) else data), expected, forwarded))


OK = ("status", 1, 200)
RESET = ("rst", 1, PROTOCOL)
BROKEN = ("goaway", PROTOCOL)

# ---- 3.4 preface, 4 frames ----
simple("3.4", "a request", fields(), OK, forwarded=1)
raw("4.1", "a frame of an unknown kind is ignored", lambda c: frame(0x42, 0xFF, 3, b"x" * 8) + frame(HEADERS, 5, 1, c.block(fields())), OK, forwarded=1)
raw("4.1", "the reserved bit of a stream is ignored", lambda c: frame(HEADERS, 5, 0x80000001, c.block(fields())), OK, forwarded=1)
raw("4.1", "unknown flags are ignored", lambda c: frame(PING, 0xFE, 0, b"12345678") + frame(HEADERS, 5, 1, c.block(fields())), OK, forwarded=1)
raw("4.2", "a frame above the frame size", frame(DATA, 0, 0, b"x" * 17000), ("goaway", SIZE), BROKEN)
raw("4.3", "a field block that cannot be decoded", frame(HEADERS, 5, 1, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), ("goaway", COMPRESSION), BROKEN)
raw("4.3", "a block that is interrupted by PING", lambda c: frame(HEADERS, 1, 1, c.block(fields())) + frame(PING, 0, 0, b"12345678"), BROKEN)
raw("4.3", "a block that is interrupted by another stream", lambda c: frame(HEADERS, 1, 1, c.block(fields())) + frame(CONTINUATION, 4, 3), BROKEN)
# ---- 5.1 streams ----
raw("5.1", "DATA on an idle stream", frame(DATA, 1, 1, b"x"), BROKEN)
raw("5.1", "RST_STREAM on an idle stream", frame(RST, 0, 1, struct.pack(">I", CANCEL)), BROKEN)
raw("5.1", "WINDOW_UPDATE on an idle stream", frame(WINDOW, 0, 1, struct.pack(">I", 1)), BROKEN)
raw("5.1", "CONTINUATION on an idle stream", frame(CONTINUATION, 4, 1), BROKEN)
raw("5.1", "PRIORITY on an idle stream is allowed", lambda c: frame(PRIORITY, 0, 3, b"\0\0\0\0\x0f") + frame(HEADERS, 5, 1, c.block(fields())), OK, forwarded=1)


# The library has forgotten the stream when its answer is out, and calls it PROTOCOL_ERROR then.
@case("5.1", "DATA behind END_STREAM", ("rst", 1, CLOSED), ("goaway", CLOSED), BROKEN, forwarded=None)
def _(c):
    c.headers(1)
    c.send(frame(DATA, 1, 1, b"x"))


@case("5.1", "HEADERS behind END_STREAM", ("rst", 1, CLOSED), ("goaway", CLOSED), BROKEN, forwarded=None)
def _(c):
    c.headers(1)
    c.headers(1)


@case("5.1", "DATA on a stream that was reset", ("goaway", CLOSED), ("rst", 1, CLOSED), ("pong", b"87654321"))
def _(c):
    c.headers(1, fields(method=b"POST"), END_HEADERS)
    c.send(frame(RST, 0, 1, struct.pack(">I", CANCEL)) + frame(DATA, 1, 1, b"x") + frame(PING, 0, 0, b"87654321"))


raw("5.1.1", "a stream with an even number", lambda c: frame(HEADERS, 5, 2, c.block(fields())), BROKEN)
raw("5.1.1", "HEADERS on stream 0", lambda c: frame(HEADERS, 5, 0, c.block(fields())), BROKEN)


@case("5.1.1", "a number that is lower than one before", BROKEN, ("goaway", CLOSED), ("rst", 3, CLOSED), forwarded=None)
def _(c):
    c.headers(5)
    c.headers(3)


# ---- 6 frames ----
raw("6.1", "DATA on stream 0", frame(DATA, 1, 0, b"x"), BROKEN)


@case("6.1", "padding longer than the frame", BROKEN, forwarded=None)
def _(c):
    c.headers(1, fields(method=b"POST"), END_HEADERS)
    c.send(frame(DATA, PADDED | END_STREAM, 1, b"\x06hello"))


@case("6.1", "padded DATA", OK, forwarded=1)
def _(c):
    c.headers(1, fields(method=b"POST", more=[(b"content-type", b"application/octet-stream"), (b"content-length", b"2")]), END_HEADERS)
    c.send(frame(DATA, PADDED | END_STREAM, 1, b"\x03hi\0\0\0"))


raw("6.2", "padded HEADERS", lambda c: frame(HEADERS, 5 | PADDED, 1, b"\x02" + c.block(fields()) + b"\0\0"), OK, forwarded=1)
raw("6.2", "HEADERS with padding longer than the frame", lambda c: frame(HEADERS, 5 | PADDED, 1, b"\xff" + c.block(fields())), BROKEN)
raw("6.2", "HEADERS with a priority", lambda c: frame(HEADERS, 5 | PRIO, 1, b"\0\0\0\0\x0f" + c.block(fields())), OK, forwarded=1)
raw("6.3", "PRIORITY of the wrong size", lambda c: frame(HEADERS, 4, 1, c.block(fields(method=b"POST"))) + frame(PRIORITY, 0, 1, b"\0\0\0\0"), ("rst", 1, SIZE), ("goaway", SIZE), BROKEN)
raw("6.3", "PRIORITY on stream 0", frame(PRIORITY, 0, 0, b"\0\0\0\0\x0f"), BROKEN)
raw("6.4", "RST_STREAM on stream 0", frame(RST, 0, 0, struct.pack(">I", CANCEL)), BROKEN)
raw("6.4", "RST_STREAM of the wrong size", lambda c: frame(HEADERS, 4, 1, c.block(fields(method=b"POST"))) + frame(RST, 0, 1, b"\0\0\0"), ("goaway", SIZE), BROKEN)
raw("6.5", "SETTINGS with ACK and content", frame(SETTINGS, ACK, 0, b"\0\x03\0\0\0\x01"), ("goaway", SIZE), BROKEN)
raw("6.5", "SETTINGS on a stream", frame(SETTINGS, 0, 1, b"\0\x03\0\0\0\x01"), BROKEN)
raw("6.5", "SETTINGS of the wrong size", frame(SETTINGS, 0, 0, b"\0\x03\0\0\0"), ("goaway", SIZE), BROKEN)
raw("6.5.2", "ENABLE_PUSH is neither 0 nor 1", frame(SETTINGS, 0, 0, b"\0\x02\0\0\0\x02"), BROKEN)
raw("6.5.2", "INITIAL_WINDOW_SIZE is too large", frame(SETTINGS, 0, 0, b"\0\x04\x80\0\0\0"), ("goaway", FLOW), BROKEN)
raw("6.5.2", "MAX_FRAME_SIZE is too small", frame(SETTINGS, 0, 0, b"\0\x05\0\0\x3f\xff"), BROKEN)
raw("6.5.2", "MAX_FRAME_SIZE is too large", frame(SETTINGS, 0, 0, b"\0\x05\x01\0\0\0"), BROKEN)
raw("6.5.2", "an unknown setting is ignored", lambda c: frame(SETTINGS, 0, 0, b"\0\xff\0\0\0\x01") + frame(HEADERS, 5, 1, c.block(fields())), OK, forwarded=1)
raw("6.6", "PUSH_PROMISE from a client", lambda c: frame(PUSH, 4, 1, b"\0\0\0\x02" + c.block(fields())), BROKEN)
raw("6.7", "PING is answered", frame(PING, 0, 0, b"abcdefgh"), ("pong", b"abcdefgh"))
raw("6.7", "PING with ACK is not", frame(PING, ACK, 0, b"zzzzzzzz") + frame(PING, 0, 0, b"abcdefgh"), ("pong", b"abcdefgh"))
raw("6.7", "PING on a stream", frame(PING, 0, 1, b"abcdefgh"), BROKEN)
raw("6.7", "PING of the wrong size", frame(PING, 0, 0, b"abcdef"), ("goaway", SIZE), BROKEN)
raw("6.8", "GOAWAY on a stream", frame(GOAWAY, 0, 1, b"\0" * 8), BROKEN)
raw("6.9", "WINDOW_UPDATE of 0 on the connection", frame(WINDOW, 0, 0, b"\0\0\0\0"), BROKEN)
raw("6.9", "WINDOW_UPDATE of 0 on a stream", lambda c: frame(HEADERS, 4, 1, c.block(fields(method=b"POST"))) + frame(WINDOW, 0, 1, b"\0\0\0\0"), RESET, BROKEN)
raw("6.9", "WINDOW_UPDATE of the wrong size", frame(WINDOW, 0, 0, b"\0\0\x01"), ("goaway", SIZE), BROKEN)
raw("6.9.1", "a window above 2^31-1", frame(WINDOW, 0, 0, struct.pack(">I", 0x7FFFFFFF)), ("goaway", FLOW))
raw("6.10", "a block in several CONTINUATIONs", lambda c: (lambda b: frame(HEADERS, 1, 1, b[:10]) + frame(CONTINUATION, 0, 1, b[10:20]) + frame(CONTINUATION, 4, 1, b[20:]))(c.block(fields())), OK, forwarded=1)
raw("6.10", "CONTINUATION behind END_HEADERS", lambda c: frame(HEADERS, 4, 1, c.block(fields(method=b"POST"))) + frame(CONTINUATION, 4, 1), BROKEN)
raw("6.10", "CONTINUATION on stream 0", lambda c: frame(HEADERS, 1, 1, c.block(fields())) + frame(CONTINUATION, 4, 0), BROKEN)
# ---- 8 HTTP ----
simple("8.2", "a name with a capital", fields(more=[(b"X-Test", b"1")]), RESET, BROKEN, ("goaway", COMPRESSION))
for bad in (b"a\rb", b"a\nb", b"a\0b"):
    simple("8.2.1", f"a value with {bad[1:2]!r}", fields(more=[(b"x-test", bad)]), RESET, BROKEN, ("goaway", COMPRESSION))
for bad in (b" a", b"a ", b"\ta"):
    simple("8.2.1", f"a value like {bad!r}", fields(more=[(b"x-test", bad)]), RESET)
for name, value in ((b"connection", b"close"), (b"keep-alive", b"1"), (b"proxy-connection", b"x"), (b"transfer-encoding", b"chunked"), (b"upgrade", b"h2c"), (b"te", b"gzip")):
    simple("8.2.2", f"{name.decode()}: {value.decode()}", fields(more=[(name, value)]), RESET, BROKEN)
simple("8.2.2", "te: trailers", fields(more=[(b"te", b"trailers")]), OK, forwarded=1)
simple("8.2.3", "cookies in pieces", fields(more=[(b"cookie", b"a=1"), (b"cookie", b"b=2")]), OK, forwarded=1)
simple("8.3", "an unknown pseudo field", fields(more=[(b":test", b"1")]), RESET, BROKEN)
simple("8.3", "a pseudo field of answers", [(b":status", b"200")] + fields(), RESET, BROKEN)
simple("8.3", "a pseudo field behind a field", fields(path=None, more=[(b":path", b"/api/v3/projects")]), RESET, BROKEN)
for name in ("method", "path", "scheme"):
    simple("8.3.1", f"no :{name}", fields(**{name: None}), RESET, BROKEN)
for pair in ((b":method", b"GET"), (b":path", b"/api/v3/projects"), (b":scheme", b"http"), (b":authority", b"h.test")):
    simple("8.3.1", f"{pair[0].decode()} twice", [pair] + fields(), RESET, BROKEN)
simple("8.3.1", "an empty :path", fields(path=b""), RESET, BROKEN)
simple("8.3.1", "a :path without a slash", fields(path=b"api"), RESET, BROKEN, ("status", 1, 400))
simple("8.3.1", "neither :authority nor host", fields(authority=None), ("status", 1, 400))
simple("8.3.1", "host in place of :authority", fields(authority=None, more=[(b"host", b"h.test")]), OK, forwarded=1)
simple("8.3.1", "host that says the same", fields(more=[(b"host", b"h.test")]), OK, forwarded=1)
simple("8.3.1", "host that says another thing", fields(more=[(b"host", b"evil.test")]), ("status", 1, 400))
simple("8.5", "CONNECT", [(b":method", b"CONNECT"), (b":authority", b"h.test:443"), (b"private-token", TOKEN.encode())], ("status", 1, 400), ("status", 1, 405), RESET)
simple("8.1.1", "content-length without content", fields(method=b"POST", more=[(b"content-length", b"5")]), RESET, BROKEN)
simple("8.1.1", "two lengths", fields(method=b"POST", more=[(b"content-length", b"5"), (b"content-length", b"6")]), ("status", 1, 400), RESET, flags=END_HEADERS)
simple("8.1.1", "a length that is no number", fields(method=b"POST", more=[(b"content-length", b"+5")]), ("status", 1, 400), RESET, flags=END_HEADERS)


def upload(section, what, length, pieces, *expected, forwarded=0):
    def run(c):
        more = [(b"content-type", b"application/octet-stream")] + ([(b"content-length", length)] if length else [])
        c.headers(1, fields(method=b"POST", more=more), END_HEADERS)
        for index, piece in enumerate(pieces):
            c.send(frame(DATA, END_STREAM if index == len(pieces) - 1 else 0, 1, piece))

    CASES.append((section, what, run, expected, forwarded))


upload("8.1.1", "less content than its length", b"5", [b"abc"], RESET, BROKEN, forwarded=None)
upload("8.1.1", "more content than its length", b"2", [b"abc"], RESET, BROKEN, forwarded=None)
upload("8.1", "content of its length", b"3", [b"a", b"bc"], OK, forwarded=1)
upload("8.1", "content without a length", None, [b"a", b"bc"], OK, forwarded=1)
upload("8.1", "empty DATA before the end", None, [b"a", b"", b"bc", b""], OK, forwarded=1)
upload("8.1", "nothing but an empty DATA", None, [b""], OK, forwarded=1)


@case("8.1", "trailers end a request", OK, forwarded=1)
def _(c):
    c.headers(1, fields(method=b"POST", more=[(b"content-type", b"application/octet-stream")]), END_HEADERS)
    c.send(frame(DATA, 0, 1, b"abc"))
    c.headers(1, [(b"private-token", b"other"), (b"x-trailer", b"1")])


@case("8.1", "trailers without END_STREAM", RESET, BROKEN, forwarded=None)
def _(c):
    c.headers(1, fields(method=b"POST", more=[(b"content-type", b"application/octet-stream")]), END_HEADERS)
    c.headers(1, [(b"x-trailer", b"1")], END_HEADERS)


# The library does not look at the names of trailers. None of them is forwarded, so nothing is read into them.
@case("8.1", "trailers with a pseudo field, which are dropped", OK, forwarded=1)
def _(c):
    c.headers(1, fields(method=b"POST", more=[(b"content-type", b"application/octet-stream")]), END_HEADERS)
    c.headers(1, [(b":path", b"/")])


# ---- what tollgate judges ----
simple("gate", "no token", fields(token=False), ("status", 1, 401))
simple("gate", "two tokens", fields(more=[(b"private-token", b"other")]), ("status", 1, 401))
simple("gate", "another token in the query", fields(path=b"/api/v3/projects?private_token=x"), ("status", 1, 401))
simple("gate", "outside of the prefixes", fields(path=b"/elsewhere"), ("status", 1, 404))
simple("gate", "dot segments", fields(path=b"/api/v3/../v3/projects"), ("status", 1, 400))
simple("gate", "encoded dot segments", fields(path=b"/api/v3/%2e%2e/x"), ("status", 1, 400))
simple("gate", "a length above the limit", fields(method=b"POST", more=[(b"content-length", b"2000000")]), ("status", 1, 413), flags=END_HEADERS)
simple("gate", "a method that is not forwarded", fields(method=b"PURGE"), ("status", 1, 405))
simple("gate", "a head above the limit", fields(more=[(b"x-big", b"x" * 12_000)] * 3), ("status", 1, 431), flags=END_STREAM)


def big(c):
    block = c.block(fields(more=[(b"x-big%d" % n, b"x" * 9_000) for n in range(4)]))
    parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
    c.send(frame(HEADERS, END_STREAM, 1, parts[0]))
    for index, part in enumerate(parts[1:], 2):
        c.send(frame(CONTINUATION, END_HEADERS if index == len(parts) else 0, 1, part))


CASES[-1] = ("gate", "a head above the limit", big, (("status", 1, 431),), 0)


def run():
    global FORWARDED
    failed = 0
    print("| section | case | what follows |\n|---|---|---|")
    for section, what, act, expected, forwarded in CASES:
        c = Connection()
        act(c)
        event = c.events(lambda event: event in expected or event[0] in ("goaway", "rst", "status"))
        names = {NO_ERROR: "NO_ERROR", PROTOCOL: "PROTOCOL_ERROR", FLOW: "FLOW_CONTROL_ERROR", CLOSED: "STREAM_CLOSED", SIZE: "FRAME_SIZE_ERROR", REFUSED: "REFUSED_STREAM", CANCEL: "CANCEL", COMPRESSION: "COMPRESSION_ERROR"}
        said = {"status": lambda e: f"status {e[2]}", "rst": lambda e: f"RST_STREAM {names.get(e[2], e[2])}", "goaway": lambda e: f"GOAWAY {names.get(e[1], e[1])}", "pong": lambda e: "PING is answered"}
        text = said.get(event[0], lambda e: e[0])(event)
        # An answer may come before what is wrong behind it does.
        if event not in expected and forwarded is None:
            event = c.events(lambda event: event in expected)
            text = said.get(event[0], lambda e: e[0])(event)
        if event not in expected:
            failed += 1
            text += f" **expected {expected}, log {c.log}**"
        elif event[0] == "rst" or (event[0] == "status" and event[2] != 431):
            # The connection goes on.
            c.headers(7)
            event = c.events(lambda event: event == ("status", 7, 200) or event[0] == "goaway")
            FORWARDED += 1
            if event != ("status", 7, 200):
                failed += 1
                text += f" **the connection does not go on: {event}**"
        FORWARDED += forwarded or 0
        c.socket.close()
        print(f"| {section} | {what} | {text} |")
    undecided = sum(1 for *_, forwarded in CASES if forwarded is None)
    print(f"cases={len(CASES)} failed={failed} forwarded={FORWARDED} undecided={undecided}")
    return failed


sys.exit(1 if run() else 0)
