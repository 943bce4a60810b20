"""A gateway with something to see: servers of which one is dead, tokens good and bad, limits, certificates, reloads, and callers
that use it. Everything on loopback, and gone at the end."""
import asyncio, contextlib, hashlib, http.client, json, math, pathlib, random, shutil, signal, socket, subprocess, tempfile, threading, time
import urllib.request

USERS = ["alice", "bob", "carol", "deploy-bot", "nightly-export"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Backend(threading.Thread):
    """Answers in about `middle` seconds, sometimes late, sometimes with an error."""

    def __init__(self, middle, failing=0.002):
        super().__init__(daemon=True)
        self.port, self.middle, self.failing = free_port(), middle, failing
        self.start()

    def run(self):
        asyncio.run(self.serve())

    async def serve(self):
        server = await asyncio.start_server(self.one, "127.0.0.1", self.port)
        async with server:
            await server.serve_forever()

    async def one(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ")[1]
                late = random.random() < 0.012 or b"export" in path
                await asyncio.sleep(self.middle * math.exp(random.gauss(0, 0.5)) + (random.uniform(0.25, 0.9) if late else 0))
                status = b"500 Internal Server Error" if random.random() < self.failing else b"404 Not Found" if b"missing" in path else b"200 OK"
                body = json.dumps([{"id": n, "name": "project-%d" % n} for n in range(random.randint(1, 40))]).encode()
                writer.write(b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)
                await writer.drain()
        writer.close()


CONFIG = """\
[server]
listen = ["127.0.0.1:{api}"]
threads = 1

[[listener]]
address = "127.0.0.1:{tls}"
certificates = [{{ chain = "api.example.com.pem", key = "api.example.com.key" }}]

[admin]
listen = "127.0.0.1:{admin}"
metrics_listen = "127.0.0.1:{metrics}"
audit = "audit.log"

[[upstream]]
name = "gitlab"
servers = ["127.0.0.1:{one}", "127.0.0.1:{two}", {{ address = "127.0.0.1:{dead}", weight = 2 }}]
balance = "least_requests"
check = "tcp"
max_requests = "adaptive"

[[upstream]]
name = "exports"
servers = ["127.0.0.1:{slow}", {{ address = "127.0.0.1:{one}", backup = true }}]
queue_timeout = "2s"

[[store]]
name = "tokens"
kind = "sqlite"
path = "tokens.db"

[[store]]
name = "robots"
kind = "file"
path = "robots.toml"

[[limit]]
name = "per-token"
key = ["token"]
rate = "{rate}/min"
burst = 40

[[limit]]
name = "per-address-trial"
key = ["address"]
rate = "1200/min"
dry_run = true

[guessing]
failures = 30

[[route]]
path = "/api/v3/exports/*"
upstream = "exports"
read_timeout = "5s"

[route.request_headers.set]
X-Export-Key = "not-for-the-page"

[[route]]
path = "/api/v3/version"
auth = "none"
reason = "monitoring asks for it"

[log]
access = "access.log"
level = "warn"
"""


class Site:
    """The gateway, its backends and its callers."""

    def __init__(self, tollgate):
        self.tollgate = tollgate
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="tollgate-page-"))
        self.over, self.threads, self.process = threading.Event(), [], None

    def run(self, *arguments):
        return subprocess.run([self.tollgate, *arguments], cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def __enter__(self):
        try:
            self.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def begin(self):
        backends = [Backend(0.006), Backend(0.009), Backend(0.02, failing=0.01)]
        self.places = dict(zip(("one", "two", "slow"), (backend.port for backend in backends)))
        self.places |= {name: free_port() for name in ("api", "tls", "admin", "metrics", "dead")}
        self.config = self.folder / "tollgate.toml"
        self.configure(rate=900)
        self.run("cert", "self-signed", "--name", "api.example.com", "--out", str(self.folder))
        (self.folder / "robots.toml").write_text("token = []\n")
        self.tokens = [self.run("token", "create", "--config", str(self.config), "--user", user).split()[0] for user in USERS]
        self.process = subprocess.Popen([self.tollgate, "run", "--config", self.config.name], cwd=self.folder, stderr=open(self.folder / "process.log", "w"))
        self.url = "http://127.0.0.1:%d/" % self.places["admin"]
        until = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(self.url + "readyz").read()
                break
            except OSError:
                assert self.process.poll() is None and time.monotonic() < until, (self.folder / "process.log").read_text()
                time.sleep(0.1)
        for number, work in enumerate([self.reader] * 4 + [self.exporter, self.guesser, self.careless, self.revoker]):
            self.threads.append(threading.Thread(target=work, args=(number,), daemon=True))
            self.threads[-1].start()

    def configure(self, rate):
        self.config.write_text(CONFIG.format(rate=rate, **self.places))

    def reload(self, text=None):
        if text:
            self.config.write_text(text)
        return subprocess.run([self.tollgate, "reload", "--config", str(self.config)], capture_output=True, text=True)

    def ask(self, connection, path, token=None):
        try:
            connection.request("GET", path, headers={"PRIVATE-TOKEN": token} if token else {})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (OSError, http.client.HTTPException):
            connection.close()

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.places["api"], timeout=10)

    def reader(self, number):
        """Comes in waves, like people do."""
        connection, token = self.connection(), self.tokens[number % len(self.tokens)]
        while not self.over.is_set():
            path = random.choice(["/api/v3/projects?per_page=50", "/api/v3/projects/7/issues", "/api/v3/user", "/api/v3/version", "/api/v3/projects/missing"] if random.random() < 0.3 else ["/api/v3/projects", "/api/v3/projects/12/merge_requests"])
            self.ask(connection, path, token)
            wave = 1.4 + math.sin(time.time() / 95 + number) + 0.4 * math.sin(time.time() / 17)
            time.sleep(random.expovariate(1) * 0.14 / max(0.15, wave))

    def exporter(self, _):
        connection = self.connection()
        while not self.over.is_set():
            self.ask(connection, "/api/v3/exports/42", self.tokens[4])
            time.sleep(random.uniform(1, 4))

    def guesser(self, _):
        """Somebody tries tokens, for a while."""
        connection = self.connection()
        while not self.over.is_set():
            for _ in range(random.randint(40, 120)):
                self.ask(connection, "/api/v3/user", "guess-%030x" % random.getrandbits(100))
                if self.over.wait(0.05):
                    return
            self.over.wait(random.uniform(10, 60))

    def careless(self, _):
        """Forgets its token, sends two, asks for what is not there, and hurries now and then."""
        connection = self.connection()
        while not self.over.is_set():
            path, token = random.choice([("/api/v3/projects", None), ("/api/v3/projects?private_token=other-token-than-that", self.tokens[0]), ("/elsewhere", self.tokens[1]), ("/api/v3/../admin", self.tokens[1])])
            self.ask(connection, path, token)
            if random.random() < 0.03:
                for _ in range(90):
                    self.ask(connection, "/api/v3/projects", self.tokens[3])
            self.over.wait(random.expovariate(1) * 0.8)

    def revoker(self, _):
        """Makes a token, uses it, and revokes it."""
        connection = self.connection()
        while not self.over.wait(random.uniform(4, 12)):
            token = self.run("token", "create", "--config", self.config.name, "--user", "visitor").split()[0]
            self.ask(connection, "/api/v3/user", token)
            self.run("token", "revoke", "--config", self.config.name, hashlib.sha256(token.encode()).hexdigest()[:12])
            self.ask(connection, "/api/v3/user", token)

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join(timeout=12)
        if self.process:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
