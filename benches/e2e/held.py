"""Memory that connections hold: idle ones, requests that wait for their backend, clients that do not read a large answer, heads
that are never finished, bodies whose receiver is slow. The backend is here as well: it answers, hangs, sends 20 MB, or reads
slowly, as the path asks."""
import asyncio, contextlib, re, socket, threading, time

from lab import Problem, free_port, rss_mib

BIG = 20_000_000
SMALL = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]'


class Backend:
    def __enter__(self):
        self.port, self.loop, up = free_port(), asyncio.new_event_loop(), threading.Event()
        self.hanging = 0

        def run():
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", self.port, backlog=4096))
            up.set()
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        if not up.wait(10):
            raise Problem("the backend did not start")
        return self

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"/hang" in head[:200]:
                    self.hanging += 1
                    await asyncio.sleep(3600)
                elif slow := re.match(rb"POST /api/v3/slow/(\d+)[ ?]", head):
                    await read_slowly(reader, int(re.search(rb"(?i)content-length: (\d+)", head)[1]), int(slow[1]))
                    writer.write(SMALL)
                elif b"/big" in head[:200]:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % BIG)
                    for _ in range(BIG // 50_000):
                        writer.write(b"x" * 50_000)
                        await writer.drain()
                else:
                    writer.write(SMALL)
                    await writer.drain()

    def __exit__(self, *_):
        def end():
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_later(0.2, self.loop.stop)
        self.loop.call_soon_threadsafe(end)
        self.thread.join(5)


async def read_slowly(reader, size, seconds):
    """About 1 MiB a second for so long, and the rest as fast as it comes."""
    until = time.monotonic() + seconds
    while size:
        piece = await reader.read(65536)
        if not piece:
            raise Problem("the gateway broke off a request body")
        size -= len(piece)
        if time.monotonic() < until:
            await asyncio.sleep(len(piece) / (1 << 20))


def slow_answer(port, token, size, seconds):
    """Reads an answer in the same way; returns how many bytes of the body came."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        s.settimeout(60)
        s.connect(("127.0.0.1", port))
        s.sendall(f"GET /api/v3/bytes/{size} HTTP/1.1\r\nHost: h.test\r\nPRIVATE-TOKEN: {token}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += s.recv(65536)
        got, until = len(head.split(b"\r\n\r\n", 1)[1]), time.monotonic() + seconds
        while got < size and (piece := s.recv(65536)):
            got += len(piece)
            if time.monotonic() < until:
                time.sleep(len(piece) / (1 << 20))
    return got


def slow_upload(port, token, size, seconds):
    """Sends a body to the slow backend; returns how many bytes were sent when it answered, 0 if it did not."""
    block = b"x" * 65536
    with socket.create_connection(("127.0.0.1", port), 60) as s:
        s.sendall(f"POST /api/v3/slow/{seconds} HTTP/1.1\r\nHost: h.test\r\nPRIVATE-TOKEN: {token}\r\n"
                  f"Content-Type: application/octet-stream\r\nContent-Length: {size}\r\n\r\n".encode())
        for at in range(0, size, len(block)):
            s.sendall(block[:size - at])
        return size if s.recv(65536).startswith(b"HTTP/1.1 200") else 0


def per_connection(running, token, what, count):
    """KiB of resident memory that each of so many connections adds."""
    head = f"GET /api/v3/{'projects' if what in ('idle', 'unfinished') else what}?per_page=20 HTTP/1.1\r\nHost: h.test\r\nPRIVATE-TOKEN: {token}\r\n"
    before, held = rss_mib(running.pid), []
    try:
        for _ in range(count):
            s = socket.socket()
            if what == "big":
                s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.settimeout(20)
            s.connect(("127.0.0.1", running.port))
            if what == "unfinished":
                s.sendall(head.encode() + b"X-Filler: " + b"f" * (31_000 - len(head)))
            else:
                s.sendall(head.encode() + b"\r\n")
            if what == "idle" and not s.recv(65536).startswith(b"HTTP/1.1 200"):
                raise Problem(f"{running.name} refuses a known token")
            held.append(s)
        time.sleep(3)
        return (rss_mib(running.pid) - before) * 1024 / count
    finally:
        for s in held:
            s.close()
        time.sleep(1)
