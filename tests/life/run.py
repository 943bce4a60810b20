#!/usr/bin/env python3
"""The life of a gateway under load: not one request may fail.

    reloads        the configuration file changes, listeners and upstreams with it, and `tollgate reload` applies it
    certificates   the files are replaced by new ones; one of four pairs is broken, and the old one stays in use
    upgrades       `tollgate upgrade` puts a new process in the place of the old one
    roll-backs     it cannot: the binary or the configuration is broken, and nothing changes
    stops          SIGTERM to one of two gateways behind HAProxy, which is then started again

Clients and what counts as a failure are described in load.py. Needs the hpack package (tests/install.sh) and haproxy."""
import argparse, asyncio, contextlib, ctypes, hashlib, itertools, os, platform, re, shutil, signal, socket, ssl, subprocess, sys, tempfile, time
from pathlib import Path

sys.dont_write_bytecode = True
from load import EITHER, HTTP1, Load, Target

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/life.md"
BEGIN, END = "<!-- life -->", "<!-- end of life -->"
TOKEN = "life-0123456789abcdef"
PATIENCE = 20  # seconds for whatever is waited for
TAKES_EFFECT = 3  # seconds for changed certificate files


class Failure(Exception):
    """What must not happen did, or what must did not."""


# ---- Processes ----


async def eventually(what, condition, within=PATIENCE, every=0.02):
    """Waits for a condition: a function, or a coroutine function."""
    deadline = time.monotonic() + within
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        if time.monotonic() > deadline:
            raise Failure(f"not within {within} s: {what}")
        await asyncio.sleep(every)


async def command(*arguments, within=60):
    """The exit code and all that it prints."""
    process = await asyncio.create_subprocess_exec(
        *map(str, arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), within)
    except asyncio.TimeoutError:
        process.kill()
        raise Failure(f"{' '.join(map(str, arguments[1:]))}: no end within {within} s") from None
    return process.returncode, output.decode()


def adopt():
    """Processes whose parent ends become ours: an upgraded gateway is the child of the one before it."""
    ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)


class Process:
    """A process that is ours, or a descendant of one."""

    all = []

    def __init__(self, pid):
        self.pid, self.code = pid, None
        self.all.append(self)

    @classmethod
    def start(cls, *arguments, log):
        with open(log, "ab") as output:
            started = subprocess.Popen(list(map(str, arguments)), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        started.returncode = 0  # this class waits for it, not that one
        return cls(started.pid)

    def is_over(self):
        """`code` is how it ended; 0 if only its parent knows, another gateway, which logs an error if it is not."""
        if self.code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.code = os.waitstatus_to_exitcode(status)
            except ChildProcessError:
                if not Path(f"/proc/{self.pid}").exists():
                    self.code = 0
        return self.code is not None

    def send(self, number):
        if not self.is_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def end(self, number=signal.SIGTERM, within=PATIENCE):
        self.send(number)
        await eventually(f"the end of process {self.pid}", self.is_over, within)
        return self.code

    @classmethod
    def kill_all(cls):
        for process in cls.all:
            process.send(signal.SIGKILL)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def connects(port):
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


# ---- The gateway ----


class Gateway:
    """One gateway with its files. What a phase changes are the attributes that `text` is made from."""

    def __init__(self, folder, binary, backends):
        self.folder, self.binary = folder, folder / "tollgate"
        folder.mkdir()
        shutil.copy(binary, self.binary)
        self.plain, self.secure, self.second, self.extra, self.admin = free_ports(5)
        self.config, self.log = folder / "tollgate.toml", folder / "process.log"
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        (folder / "tokens.toml").write_text(f'[[token]]\nsha256 = "{digest}"\nuser = "life"\n')
        self.servers = [backends[0]]
        self.header_bytes, self.body_bytes, self.drain_delay = "32KiB", "none", "0s"
        self.has_extra, self.extra_http2 = False, True
        self.tls, self.second_http2, self.hsts = "intermediate", True, "none"
        self.process, self.read_lines = None, 0

    def text(self):
        servers = ", ".join(f'"127.0.0.1:{port}"' for port in self.servers)
        pair = '[{ chain = "localhost.pem", key = "localhost.key" }]'
        extra = f'[[listener]]\naddress = "127.0.0.1:{self.extra}"\nhttp2 = {str(self.extra_http2).lower()}\n'
        return f"""[server]
listen = ["127.0.0.1:{self.plain}"]
drain_delay = "{self.drain_delay}"
[[listener]]
address = "127.0.0.1:{self.secure}"
certificates = {pair}
tls = "{self.tls}"
[[listener]]
address = "127.0.0.1:{self.second}"
certificates = {pair}
http2 = {str(self.second_http2).lower()}
hsts = "{self.hsts}"
{extra if self.has_extra else ""}[admin]
listen = "127.0.0.1:{self.admin}"
[limits]
header_bytes = "{self.header_bytes}"
body_bytes = "{self.body_bytes}"
[log]
access = "access.log"
[[upstream]]
name = "api"
servers = [{servers}]
[[store]]
kind = "file"
path = "tokens.toml"
"""

    def write(self):
        replace(self.config, self.text())

    async def start(self):
        if not (self.folder / "localhost.pem").exists():
            await self.new_pair(self.folder)
        self.write()
        self.process = Process.start(self.binary, "run", "--config", self.config, log=self.log)
        await self.is_ready()

    async def is_ready(self):
        def asked():
            if self.process.is_over():
                raise Failure(f"the gateway has ended with {self.process.code}:\n{self.log.read_text()[-2000:]}")
            return asyncio.to_thread(self.ready)

        await eventually("the gateway is ready", asked)

    def ready(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.admin), timeout=2) as one:
            one.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return one.recv(64).startswith(b"HTTP/1.1 200")
        return False

    async def new_pair(self, folder):
        code, output = await command(self.binary, "cert", "self-signed", "--name", "localhost", "--out", folder)
        if code:
            raise Failure(f"cert self-signed: {output}")

    async def served(self, port):
        """The certificate that a new connection gets, in DER."""

        def get():
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain:
                with context.wrap_socket(plain) as encrypted:
                    return encrypted.getpeercert(binary_form=True)

        return await asyncio.to_thread(get)

    def complaints(self, expected):
        """Lines of the log since the last call that must not be there."""
        lines = self.log.read_text(errors="replace").splitlines()
        new, self.read_lines = lines[self.read_lines :], len(lines)
        return [line for line in new if "panicked" in line or (" ERROR " in line and not (expected and expected in line))]


def replace(path, text):
    """As a careful program does it: a reader sees the old or the new, never a part."""
    new = path.with_name(path.name + ".new")
    new.write_text(text) if isinstance(text, str) else new.write_bytes(text)
    os.replace(new, path)


# ---- Phases ----


class Run:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.backends = free_ports(2)
        self.rows, self.findings = [], []

    async def backend(self, port):
        Process.start(sys.executable, Path(__file__).with_name("backend.py"), port, log=self.folder / "backend.log")
        await eventually("the backend listens", lambda: connects(port))

    def gateway(self, name):
        return Gateway(self.folder / name, self.args.tollgate, self.backends)

    def finding(self, phase, text):
        tell(f"{phase}: FAILED: {text}")
        self.findings.append(f"{phase}: {text}")

    async def phase(self, name, count, gateways, ports, event, prepare=None, more=None, keeps=False, errors=None):
        """`count` events under load. With `keeps`, none of them may end a connection; `errors` may be in the log."""
        if count == 0:
            return
        if prepare:
            await prepare()
        load = Load(TOKEN, self.args.pause)
        load.usual(*ports)
        if more:
            more(load)
        tell(f"{name}: {count} events")
        done = 0
        try:
            # So that each client has a connection, and each transfer is at work.
            await asyncio.sleep(1)
            for number in range(count):
                await self.transfers(load)
                await event(number, load)
                done += 1
            await asyncio.sleep(1)
        except Failure as failure:
            self.finding(name, f"event {done + 1}: {failure}")
        ledger = await load.stop()
        for (kind, why), times in sorted(ledger.failed.items()):
            at, event_number, took = ledger.first[kind, why]
            self.finding(name, f"{times} x {kind}: {why} (first at {at}, after event {event_number}, took {took} s)")
        if keeps and ledger.ends:
            self.finding(name, f"connections were ended: {dict(ledger.ends)}")
        for gateway in gateways:
            for line in gateway.complaints(errors):
                self.finding(name, line)
        tell(f"{name}: kept connections that were ended: {dict(ledger.ends) or 'none'}; repeated: {sum(ledger.not_taken.values())}")
        still = f"the clients themselves stood still for up to {load.stood_still:.3f} s"
        tell(f"{name}: the slowest: {ledger.slowest}; {still}")
        self.rows.append(row(name, done, ledger))

    async def transfers(self, load):
        """An upload and a download are on their way, and have been for a moment."""

        def at_work():
            now = time.monotonic()
            return sum(one.kind == "1 MiB" and now - one.began > 0.05 for one in load.ledger.open.values()) >= 2

        await eventually("transfers are at work", at_work)

    # ---- Reloads ----

    async def reloads(self, count):
        gateway = self.gateway("reloads")
        gateway.servers = self.backends[:1]
        extra = {}

        def use_extra(load):
            """Clients of the listener that comes and goes."""
            extra["new"], extra["all"] = asyncio.Event(), asyncio.Event()
            target = Target(gateway.extra)
            extra["kept"] = [
                load.add(load.kept("HTTP/1 kept", "read", target, until=extra["all"])),
                load.add(load.kept("300 ms", "slow", target, pause=0, until=extra["all"])),
            ]

        def more(load):
            second = Target(gateway.second, EITHER)
            load.add(load.fresh("HTTP/2", "read", second, 2 * load.pause))
            load.add(load.kept("HTTP/1 kept", "read", Target(gateway.second, HTTP1)))
            extra["load"] = load

        def change(**attributes):
            def apply():
                for name, value in attributes.items():
                    assert getattr(gateway, name) != value
                    setattr(gateway, name, value)

            return apply

        both, one = list(self.backends), self.backends[:1]
        # What is changed, and the key that the reload has to name.
        steps = [
            (change(has_extra=True), "listener"),
            (change(extra_http2=False), "listener"),
            (change(tls="modern"), "listener"),
            (change(second_http2=False), "listener"),
            (change(header_bytes="16KiB"), "limits.header_bytes"),
            (change(servers=both), "upstream"),
            (change(second_http2=True, hsts="1d"), "listener"),
            (change(servers=one), "upstream"),
            (change(tls="intermediate", extra_http2=True, hsts="none"), "listener"),
            (change(has_extra=False, header_bytes="32KiB"), "listener"),
        ]

        async def event(number, load):
            apply, key = steps[number % len(steps)]
            had = gateway.has_extra
            apply()
            gateway.write()
            load.ledger.happens()
            code, output = await command(gateway.binary, "reload", "--config", gateway.config)
            if code or not output.startswith("reloaded; changed and in force: ") or key not in output:
                raise Failure(f"reload, which changes {key}: exit {code}: {output.strip()}")
            if gateway.has_extra and not had:
                if not connects(gateway.extra):
                    raise Failure("the reload is over, and the new listener does not listen")
                use_extra(load)
            if had and not gateway.has_extra:
                await eventually("the removed listener refuses", lambda: not connects(gateway.extra), within=2)
                # Its connections go on.
                await asyncio.sleep(0.4)
                extra["all"].set()
                await asyncio.wait_for(asyncio.gather(*extra["kept"]), PATIENCE)
            await asyncio.sleep(0.1)

        await self.phase("reloads", count, [gateway], (gateway.plain, gateway.secure), event, gateway.start, more, keeps=True)
        await self.over("reloads", gateway)

    # ---- Certificates ----

    async def certificates(self, count):
        gateway = self.gateway("certificates")

        async def event(number, load):
            broken = number % 4 == 2
            fresh = Path(tempfile.mkdtemp(dir=self.folder))
            await gateway.new_pair(fresh)
            old = await gateway.served(gateway.secure)
            new = ssl.PEM_cert_to_DER_cert((fresh / "localhost.pem").read_text())
            refused = gateway.log.read_text().count("certificates not reloaded")
            load.ledger.happens()
            if broken:
                # By turns: a key of another certificate, a file that is cut off, an empty one.
                pem = (fresh / "localhost.pem").read_bytes()
                replace(gateway.folder / "localhost.pem", [pem, pem[: len(pem) // 2], b""][number // 4 % 3])
                refusals = lambda: gateway.log.read_text().count("certificates not reloaded") - refused
                # Two listeners use it.
                await eventually("the broken pair is reported", lambda: refusals() >= 2, within=TAKES_EFFECT)
                for port in (gateway.secure, gateway.second):
                    if await gateway.served(port) != old:
                        raise Failure("a broken pair has changed the certificate that is served")
                return
            for name in ("localhost.key", "localhost.pem"):
                os.replace(fresh / name, gateway.folder / name)
            for port in (gateway.secure, gateway.second):

                async def is_served():
                    return await gateway.served(port) == new

                await eventually("the new certificate is served", is_served, within=TAKES_EFFECT)

        await self.phase("certificates", count, [gateway], (gateway.plain, gateway.secure), event, gateway.start, keeps=True, errors="certificates not reloaded")
        await self.over("certificates", gateway)

    async def over(self, phase, gateway):
        """Ends a gateway, which has to do that in good order."""
        if gateway.process is None:
            return
        try:
            code = await gateway.process.end(within=40)
            if code:
                self.finding(phase, f"the gateway has ended with {code}")
        except Failure as failure:
            self.finding(phase, str(failure))

    # ---- Upgrades ----

    async def upgrades(self, count):
        code, _ = await command(self.args.tollgate, "upgrade", "--help")
        if count and code:
            tell("upgrades, roll-backs: NOT RUN: this tollgate has no `upgrade`")
            return
        gateway = self.gateway("upgrades")
        ports = (gateway.plain, gateway.secure)
        good = gateway.binary.read_bytes() if count else b""

        async def upgrade(load):
            load.ledger.happens()
            # With the address: the file may be one that cannot be read.
            where = ("--config", gateway.config, "--admin", f"127.0.0.1:{gateway.admin}")
            return await command(self.args.tollgate, "upgrade", *where, within=90)

        leaving = []

        async def forward(number, load):
            old = gateway.process
            # A new file each time, as a package manager leaves it.
            await asyncio.to_thread(replace_binary, gateway.binary, good)
            if number % 3 == 1:
                # The new process is the one that opens or closes a listener.
                gateway.has_extra = not gateway.has_extra
                gateway.write()
            code, output = await upgrade(load)
            told = re.search(r"process (\d+) accepts connections, process (\d+) ", output)
            if code or not told or int(told[2]) != old.pid:
                raise Failure(f"upgrade of process {old.pid}: exit {code}: {output.strip()}")
            gateway.process = Process(int(told[1]))
            leaving.append(old)
            if not await asyncio.to_thread(gateway.ready):
                raise Failure("the upgrade is over, and the gateway is not ready")
            if gateway.has_extra and not connects(gateway.extra):
                raise Failure("the upgrade is over, and the new listener does not listen")
            if not gateway.has_extra:
                await eventually("the removed listener refuses", lambda: not connects(gateway.extra), within=2)
            code, output = await command(gateway.binary, "reload", "--config", gateway.config)
            if code:
                raise Failure(f"reload after the upgrade: exit {code}: {output.strip()}")
            # Two of three begin while the process before is still on its way to the end.
            if number % 3 == 2:
                await they_end()

        async def they_end():
            while leaving:
                old = leaving.pop(0)
                await eventually(f"the end of the old process {old.pid}", old.is_over, within=40)
                if old.code:
                    raise Failure(f"the old process has ended with {old.code}")

        def changed(old, new):
            return lambda: replace(gateway.config, gateway.text().replace(old, new))

        breaks = [
            ("a configuration that is no TOML", changed("[server]", "[server")),
            ("a program that fails", lambda: replace_binary(gateway.binary, Path("/bin/false").read_bytes())),
            ("a key that does not exist", changed("drain_delay", "drain_dela")),
            ("a binary that is cut off", lambda: replace_binary(gateway.binary, good[: 1 << 20])),
            ("a token file that is missing", changed("tokens.toml", "none.toml")),
            ("a program that ends without a word", lambda: replace_binary(gateway.binary, b"#!/bin/sh\nexit 0\n")),
        ]
        hangs = ("a program that does nothing", lambda: replace_binary(gateway.binary, b"#!/bin/sh\nexec sleep 600\n"))

        async def back(number, load):
            # It takes 45 seconds until it is given up: once, and not in the short form.
            what, apply = hangs if number == 19 else breaks[number % len(breaks)]
            pid = gateway.process.pid
            await asyncio.to_thread(apply)
            try:
                code, output = await upgrade(load)
            finally:
                gateway.write()
                await asyncio.to_thread(replace_binary, gateway.binary, good)
            if code != 1 or "nothing changed" not in output:
                raise Failure(f"upgrade with {what}: exit {code}: {output.strip()}")
            if gateway.process.is_over() or not await asyncio.to_thread(gateway.ready):
                raise Failure(f"upgrade with {what}: process {pid} does not serve any more")
            left = [one for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]
            if left:
                raise Failure(f"upgrade with {what}: process {pid} still has the children {left}")
            await asyncio.sleep(0.1)

        await self.phase("upgrades", count, [gateway], ports, forward, gateway.start)
        try:
            await they_end()
        except Failure as failure:
            self.finding("upgrades", str(failure))
        await self.phase("roll-backs", count, [gateway], ports, back, keeps=True, errors="not upgraded, this process goes on")
        await self.over("upgrades", gateway)

    # ---- Stops ----

    async def stops(self, count):
        if count == 0:
            return
        gateways = [self.gateway("one"), self.gateway("two")]
        plain, secure = free_ports(2)
        stats = self.folder / "haproxy.sock"

        async def prepare():
            for gateway in gateways:
                gateway.drain_delay = "1500ms"
                await gateway.start()
            one = gateways[0].folder
            (self.folder / "haproxy.pem").write_text((one / "localhost.pem").read_text() + (one / "localhost.key").read_text())
            servers = "".join(
                f"  server {gateway.folder.name} 127.0.0.1:{gateway.plain} check addr 127.0.0.1 port {gateway.admin}\n"
                for gateway in gateways
            )
            config = self.folder / "haproxy.cfg"
            # No retries: they would hide what is looked for.
            config.write_text(
                f"""global
  maxconn 1000
  stats socket {stats} mode 600
defaults
  mode http
  retries 0
  option redispatch
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend clients
  bind 127.0.0.1:{plain}
  bind 127.0.0.1:{secure} ssl crt {self.folder}/haproxy.pem alpn h2,http/1.1
  default_backend gateways
backend gateways
  option httpchk GET /readyz
  default-server inter 200ms fall 2 rise 2
{servers}"""
            )
            Process.start("haproxy", "-db", "-f", config, log=self.folder / "haproxy.log")
            for gateway in gateways:
                await is_seen(gateway, "UP", "L7OK")

        async def is_seen(gateway, state, check):
            async def asked():
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_unix_connection(str(stats))
                    writer.write(b"show stat\n")
                    lines = (await reader.read()).decode().splitlines()
                    writer.close()
                    for line in lines:
                        cells = line.split(",")
                        if cells[:2] == ["gateways", gateway.folder.name]:
                            return cells[17] == state and cells[36] == check
                return False

            await eventually(f"HAProxy has {gateway.folder.name} as {state}", asked)

        async def event(number, load):
            gateway = gateways[number % 2]
            load.ledger.happens()
            gateway.process.send(signal.SIGTERM)
            await is_seen(gateway, "DOWN", "L7STS")
            await eventually(f"the end of {gateway.folder.name}", gateway.process.is_over, within=40)
            code = gateway.process.code
            if code:
                raise Failure(f"the gateway has ended with {code}")
            await gateway.start()
            await is_seen(gateway, "UP", "L7OK")

        await self.phase("stops", count, gateways, (plain, secure), event, prepare)
        for gateway in gateways:
            await self.over("stops", gateway)


def replace_binary(path, content):
    """By rename: a running program's file cannot be written to."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.chmod(0o755)
    os.replace(new, path)


# ---- The result ----

COLUMNS = ("HTTP/1 kept", "HTTP/1 new", "HTTP/2", "300 ms", "1 MiB")
HEAD = f"| phase | events | {' | '.join(COLUMNS)} | in flight at an event | failed | p99 | slowest |\n" + "|---" * (len(COLUMNS) + 6) + "|"


def row(name, events, ledger):
    times = sorted(ledger.times) or [0]
    p99, slowest = times[int(len(times) * 0.99) - 1 if len(times) > 1 else 0], times[-1]
    counts = " | ".join(f"{ledger.right[kind]:,}" for kind in COLUMNS)
    failed = sum(ledger.failed.values())
    return f"| {name} | {events} | {counts} | {ledger.across:,} | {failed} | {p99 * 1000:.0f} ms | {slowest * 1000:.0f} ms |"


def tell(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def into_page(table, binary):
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, load {os.getloadavg()[1]:.0f}"
    said = f"Measured {time.strftime('%Y-%m-%d')} by `make life` ({binary} build, {machine}):"
    PAGE.write_text(f"{before}{BEGIN}\n{said}\n\n{table}\n{END}{after}")


async def main(args):
    adopt()
    work = Path(tempfile.mkdtemp(prefix="tollgate-life-"))
    run = Run(args, work)
    try:
        for port in run.backends:
            await run.backend(port)
        for phase, count in (
            (run.reloads, args.reloads),
            (run.certificates, args.certificates),
            (run.upgrades, args.upgrades),
            (run.stops, args.stops),
        ):
            if count:
                await phase(count)
    except Failure as failure:
        run.finding("start", str(failure))
    finally:
        Process.kill_all()
    table = "\n".join([HEAD, *run.rows])
    print(table)
    if run.findings:
        tell(f"{len(run.findings)} findings; logs are in {work}")
        for finding in run.findings:
            print(finding)
        return 1
    shutil.rmtree(work)
    if args.page:
        into_page(table, "release" if "debug" not in args.tollgate.parts else "debug")
    return 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tollgate", type=Path, default=ROOT / "target/debug/tollgate", help="the binary (default: %(default)s)")
    for name, count in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"(default: {count})")
    parser.add_argument("--quick", action="store_true", help="as CI does it: " + ", ".join(f"{n} {k}" for k, n in QUICK.items()))
    parser.add_argument("--pause", type=float, default=0.02, help="mean pause of a client between two requests, s (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)} if nothing failed")
    args = parser.parse_args()
    for name, count in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, count)
    return args


DEFAULTS = {"reloads": 100, "certificates": 20, "upgrades": 20, "stops": 20}
QUICK = {"reloads": 10, "certificates": 3, "upgrades": 3, "stops": 3}

if __name__ == "__main__":
    sys.exit(asyncio.run(main(arguments())))
