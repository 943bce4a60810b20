"""The load of tests/life: clients that keep an account of every request. It must not know what is done to the gateway meanwhile.

A request has exactly one of three ends. It is *right*: 200, and the body that belongs to it and to no other. It is *not taken*:
the server said so, as HTTP/2 allows (a stream above the last one of GOAWAY, or REFUSED_STREAM); it is sent again. Or it has
*failed*: anything else. A client does not send on a connection whose end it has been told of, by `Connection: close`, GOAWAY or
the end itself; a request on any other connection has to be answered."""
import asyncio, collections, functools, hashlib, itertools, json, random, ssl, struct, time
from dataclasses import dataclass, field

import hpack

from backend import DOWNLOAD

PATIENCE = 15  # seconds for a request, or for a connection
UPLOAD = bytes(reversed(range(256))) * (len(DOWNLOAD) // 256)
UPLOAD_DIGEST = hashlib.sha256(UPLOAD).hexdigest()
UPLOAD_PIECES, BETWEEN_PIECES = 16, 0.03


class Broken(Exception):
    """A request that has no whole answer."""


class Ended(Exception):
    """The client knew of the connection's end before it sent the request."""


class NotTaken(Exception):
    """The server has said that it did not begin with it."""


# ---- The account ----


@dataclass
class Exchange:
    kind: str
    began: float
    connected: float = 0.0  # when the connection was there
    across: bool = False  # in flight when something happened


@dataclass
class Ledger:
    """What became of the requests of a phase."""

    open: dict = field(default_factory=dict)
    begun: collections.Counter = field(default_factory=collections.Counter)
    right: collections.Counter = field(default_factory=collections.Counter)
    not_taken: collections.Counter = field(default_factory=collections.Counter)
    failed: collections.Counter = field(default_factory=collections.Counter)
    first: dict = field(default_factory=dict)  # of each failure, when it was
    times: list = field(default_factory=list)  # of the quick ones
    longest: float = 0.0
    slowest: str = ""
    across: int = 0
    ends: collections.Counter = field(default_factory=collections.Counter)  # of connections that were to be kept
    events: int = 0

    def begin(self, kind):
        exchange = Exchange(kind, time.monotonic())
        self.open[id(exchange)] = exchange
        self.begun[kind] += 1
        return exchange

    def happens(self):
        """Something is about to be done to the gateway."""
        self.events += 1
        for exchange in self.open.values():
            exchange.across = True

    def end(self, exchange, counter, why=None):
        del self.open[id(exchange)]  # a second end of one request is an error of ours
        counter[exchange.kind if why is None else (exchange.kind, why)] += 1
        took = time.monotonic() - exchange.began
        if why is not None:
            self.first.setdefault((exchange.kind, why), (time.strftime("%H:%M:%S"), self.events, round(took, 3)))
        elif counter is self.right:
            self.across += exchange.across
            if exchange.kind in QUICK:
                if took > self.longest:
                    self.longest = took
                    connecting = exchange.connected - exchange.began
                    self.slowest = f"{exchange.kind}, {took:.3f} s, {connecting:.3f} s of it to connect, after event {self.events}"
                self.times.append(took)

    def close(self):
        for exchange in list(self.open.values()):
            self.end(exchange, self.failed, "no end")
        ends = sum(self.right.values()) + sum(self.not_taken.values()) + sum(self.failed.values())
        assert ends == sum(self.begun.values()), "the account does not balance"


# ---- What is asked ----

NUMBERS = itertools.count(1)
QUICK = ("HTTP/1 kept", "HTTP/1 new", "HTTP/2")


@dataclass
class Question:
    what: str
    name: str
    token: str

    @classmethod
    def new(cls, what, token):
        return cls(what, str(next(NUMBERS)), token)

    @property
    def path(self):
        return f"/api/v3/{self.what}/{self.name}"

    @property
    def body(self):
        return UPLOAD if self.what == "upload" else b""

    def judge(self, status, answers, body):
        if status != 200:
            raise Broken(f"status {status} {' '.join(body[:80].decode('latin-1').split())}")
        if answers != self.name:
            raise Broken("the answer to another request")
        if self.what == "download":
            right = body == DOWNLOAD
        else:
            told = json.loads(body)
            right = told["id"] == self.name and told["length"] == len(self.body)
            right = right and (not self.body or told["sha256"] == UPLOAD_DIGEST)
        if not right:
            raise Broken("a wrong body")


# ---- HTTP/1 ----


class Http1:
    """A connection. `usable`: nothing has been heard of its end."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.announced, self.unfinished, self.used = False, False, False

    @property
    def usable(self):
        ended = self.reader.at_eof() or self.reader.exception() or self.writer.is_closing()
        return not (self.announced or self.unfinished or ended)

    async def ask(self, question):
        if not self.usable:
            # In HTTP/1, a server has no way to say that it will not take a first request.
            raise Ended if self.used else Broken("closed before the first request")
        self.used = True
        body, self.unfinished = question.body, True
        method = "POST" if body else "GET"
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {question.path} HTTP/1.1\r\nHost: localhost\r\nPRIVATE-TOKEN: {question.token}\r\n{length}\r\n"
        begun = False
        try:
            self.writer.write(head.encode())
            size = len(body) // UPLOAD_PIECES
            for at in range(0, len(body), max(size, 1)):
                self.writer.write(body[at : at + size])
                await self.writer.drain()
                await asyncio.sleep(BETWEEN_PIECES)
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            begun = True
            fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            if "close" in fields.get("connection", ""):
                self.announced = True
            if "content-length" not in fields:
                raise Broken(f"no length: {lines[0]}")
            answer = await self.reader.readexactly(int(fields["content-length"]))
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError) as error:
            got = "in the middle of the answer" if begun or getattr(error, "partial", b"") else "without an answer"
            raise Broken(f"{'reset' if isinstance(error, ConnectionError) else 'closed'} {got}") from error
        self.unfinished = False
        question.judge(int(lines[0].split(" ")[1]), fields.get("x-answers"), answer)

    def ending(self):
        return "after a failure" if self.unfinished else "announced" if self.announced else "while idle"

    def close(self):
        self.writer.close()


# ---- HTTP/2 ----

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIO = 1, 1, 4, 8, 32
REFUSED_STREAM = 7
OWN_WINDOW = 4 << 20


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


READING = set()  # the tasks that do, since nobody else may hold them


class Stream:
    def __init__(self, window):
        self.ended = asyncio.get_running_loop().create_future()
        self.fields, self.body, self.window = {}, bytearray(), window

    def over(self, error=None):
        if not self.ended.done():
            self.ended.set_exception(error) if error else self.ended.set_result(None)


class Http2:
    """A connection with many streams, and a task that reads it."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.streams, self.next_stream = {}, 1
        self.window, self.stream_window, self.room = 65535, 65535, asyncio.Event()
        self.last, self.gone = None, False  # the last stream of GOAWAY; the connection itself
        settings = struct.pack(">HIHI", 2, 0, 4, OWN_WINDOW)  # no push
        writer.write(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW, 0, 0, struct.pack(">I", 1 << 30)))
        self.received, self.used = 0, False
        task = asyncio.get_running_loop().create_task(self.read())
        READING.add(task)
        task.add_done_callback(READING.discard)

    @property
    def usable(self):
        return self.last is None and not self.gone

    async def ask(self, question):
        if not self.usable:
            raise Ended if self.used or self.last is not None else Broken("closed before the first request")
        self.used = True
        number, self.next_stream = self.next_stream, self.next_stream + 2
        stream = self.streams[number] = Stream(self.stream_window)
        body = question.body
        fields = [(":method", "POST" if body else "GET"), (":scheme", "https"), (":path", question.path)]
        fields += [(":authority", "localhost"), ("private-token", question.token)]
        fields += [("content-length", str(len(body)))] if body else []
        self.writer.write(frame(HEADERS, END_HEADERS | (0 if body else END_STREAM), number, self.encoder.encode(fields)))
        try:
            if body:
                await self.upload(number, stream, body)
            await stream.ended
        finally:
            del self.streams[number]
            if not stream.ended.done() and not self.gone:
                self.writer.write(frame(RST, 0, number, struct.pack(">I", 8)))
        question.judge(int(stream.fields.get(":status", 0)), stream.fields.get("x-answers"), bytes(stream.body))

    async def upload(self, number, stream, body):
        size = len(body) // UPLOAD_PIECES
        for start in range(0, len(body), size):
            at, end = start, start + size
            while at < end and not stream.ended.done():
                length = min(end - at, 16384, stream.window, self.window)
                if length <= 0:
                    self.room.clear()
                    waits = [stream.ended, asyncio.ensure_future(self.room.wait())]
                    try:
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        waits[1].cancel()
                    continue
                last = at + length == len(body)
                self.writer.write(frame(DATA, END_STREAM if last else 0, number, body[at : at + length]))
                at += length
                stream.window -= length
                self.window -= length
            await asyncio.sleep(BETWEEN_PIECES)

    async def read(self):
        why = "closed"
        try:
            while True:
                head = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
                await self.take(head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF, payload)
        except asyncio.IncompleteReadError as error:
            why = "closed in the middle of a frame" if error.partial else "closed"
        except (ConnectionError, ssl.SSLError):
            why = "reset"
        finally:
            self.gone = True
            told = "without GOAWAY" if self.last is None else "after GOAWAY, which includes the stream,"
            for stream in self.streams.values():
                state = "in the middle of the answer" if stream.fields else "without an answer"
                stream.over(Broken(f"{why} {told} {state}"))

    async def take(self, kind, flags, number, payload):
        stream = self.streams.get(number)
        if kind in (DATA, HEADERS) and flags & PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        if kind == HEADERS and flags & PRIO:
            payload = payload[5:]
        if kind == HEADERS:
            block, ended = payload, flags & END_STREAM
            while not flags & END_HEADERS:
                head = await self.reader.readexactly(9)
                block, flags = block + await self.reader.readexactly(int.from_bytes(head[:3], "big")), head[4]
            fields = self.decoder.decode(block)
            if stream:
                stream.fields.update(fields)
                if ended:
                    stream.over()
        elif kind == DATA:
            self.received += len(payload)
            if self.received > 16 << 20:
                self.writer.write(frame(WINDOW, 0, 0, struct.pack(">I", self.received)))
                self.received = 0
            if stream:
                stream.body += payload
                if flags & END_STREAM:
                    stream.over()
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                key, value = struct.unpack(">HI", payload[at : at + 6])
                if key == 4:
                    for one in self.streams.values():
                        one.window += value - self.stream_window
                    self.stream_window = value
            self.writer.write(frame(SETTINGS, ACK, 0))
            self.room.set()
        elif kind == PING and not flags & ACK:
            self.writer.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW:
            by = int.from_bytes(payload, "big")
            if number == 0:
                self.window += by
            elif stream:
                stream.window += by
            self.room.set()
        elif kind == RST and stream:
            code = int.from_bytes(payload, "big")
            stream.over(NotTaken() if code == REFUSED_STREAM else Broken(f"RST_STREAM {code}"))
        elif kind == GOAWAY:
            self.last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
            for other, one in self.streams.items():
                if other > self.last:
                    one.over(NotTaken())

    def ending(self):
        return "announced" if self.last is not None else "while idle"

    def close(self):
        if not self.gone and not self.streams:
            self.writer.close()


# ---- Clients ----


@functools.cache
def tls_context(alpn):
    # Who may be trusted is not what is tested here.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(list(alpn))
    return context


@dataclass(frozen=True)
class Target:
    """Where a client connects, and what it offers there."""

    port: int
    alpn: tuple = ()  # with TLS

    async def connect(self):
        context = tls_context(self.alpn) if self.alpn else None
        opening = asyncio.open_connection("127.0.0.1", self.port, ssl=context, limit=2 << 20)
        try:
            reader, writer = await asyncio.wait_for(opening, PATIENCE)
        except asyncio.TimeoutError as error:
            raise Broken("cannot connect: timeout") from error
        except (OSError, ssl.SSLError) as error:
            raise Broken(f"cannot connect: {type(error).__name__}") from error
        tls = writer.get_extra_info("ssl_object")
        return (Http2 if tls and tls.selected_alpn_protocol() == "h2" else Http1)(reader, writer)


HTTP1, HTTP2, EITHER = ("http/1.1",), ("h2",), ("h2", "http/1.1")


class Load:
    """Clients that go on until they are told to stop."""

    def __init__(self, token, pause):
        self.token, self.pause, self.ledger = token, pause, Ledger()
        self.stopping, self.tasks, self.stood_still = asyncio.Event(), [], 0.0
        self.add(self.watch())

    async def watch(self):
        """How long the clients themselves had to wait for the processor, at worst."""
        while not self.stopping.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.02)
            self.stood_still = max(self.stood_still, time.monotonic() - before - 0.02)

    def add(self, client):
        task = asyncio.get_running_loop().create_task(client)
        self.tasks.append(task)
        return task

    async def one(self, kind, what, connection):
        """Asks once. `connection` gives the connection, made or kept."""
        exchange = self.ledger.begin(kind)
        while True:
            made = None
            try:
                made = await connection()
                exchange.connected = time.monotonic()
                # Not wait_for(), which goes through the event loop before it begins.
                async with asyncio.timeout(PATIENCE):
                    await made.ask(Question.new(what, self.token))
                self.ledger.end(exchange, self.ledger.right)
            except Ended:
                continue
            except NotTaken:
                self.ledger.end(exchange, self.ledger.not_taken)
                exchange = self.ledger.begin(kind)
                continue
            except Broken as broken:
                self.ledger.end(exchange, self.ledger.failed, str(broken))
            except TimeoutError:
                self.ledger.end(exchange, self.ledger.failed, f"no answer within {PATIENCE} s")
            return made

    async def rest(self, pause):
        """A pause that ends when the load does."""
        try:
            await asyncio.wait_for(self.stopping.wait(), pause * random.uniform(0.5, 1.5))
        except asyncio.TimeoutError:
            pass

    async def kept(self, kind, what, target, width=1, pause=None, until=None):
        """`width` requests at a time on one connection, which is made again when it has ended. `until` ends it early."""
        current, making = None, asyncio.Lock()
        until = until or self.stopping

        async def connection():
            nonlocal current
            async with making:
                if current is not None and not current.usable:
                    self.ledger.ends[current.ending()] += 1
                    current.close()
                    current = None
                if current is None:
                    current = await target.connect()
                return current

        async def lane():
            while not (until.is_set() or self.stopping.is_set()):
                await self.one(kind, what, connection)
                await self.rest(self.pause if pause is None else pause)

        await asyncio.gather(*(lane() for _ in range(width)))
        if current is not None:
            current.close()

    async def fresh(self, kind, what, target, pause=None):
        """A connection for each request, closed by the client."""
        while not self.stopping.is_set():
            made = await self.one(kind, what, target.connect)
            if made is not None:
                made.close()
            await self.rest(self.pause if pause is None else pause)

    def usual(self, plain, secure):
        """The clients of every phase. `plain` and `secure` are ports."""
        p, s1, s2 = Target(plain), Target(secure, HTTP1), Target(secure, HTTP2)
        for _ in range(4):
            self.add(self.kept("HTTP/1 kept", "read", p))
            # Mostly idle: it is in the pauses that a server may end a connection too early.
            self.add(self.kept("HTTP/1 kept", "read", p, pause=0.4))
        for _ in range(2):
            self.add(self.kept("HTTP/1 kept", "read", s1))
        for _ in range(2):
            self.add(self.fresh("HTTP/1 new", "read", p))
        self.add(self.fresh("HTTP/1 new", "read", s1, 4 * self.pause))
        for _ in range(2):
            self.add(self.kept("HTTP/2", "read", s2, width=4))
        self.add(self.fresh("HTTP/2", "read", s2, 4 * self.pause))
        self.add(self.kept("300 ms", "slow", p, pause=0))
        self.add(self.kept("300 ms", "slow", s1, pause=0))
        self.add(self.kept("300 ms", "slow", s2, width=2, pause=0))
        for target in (p, s1, s2):
            self.add(self.kept("1 MiB", "upload", target, pause=0))
            self.add(self.kept("1 MiB", "download", target, pause=0))

    async def stop(self):
        self.stopping.set()
        done, late = await asyncio.wait(self.tasks, timeout=3 * PATIENCE)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()  # an error of ours
        self.ledger.close()
        return self.ledger
