#!/usr/bin/env python3
"""Measures import, lookups and memory by the number of tokens, from 10^4 to 10^7, in SQLite and PostgreSQL.

Needs the binary of the dist profile and Debian's postgresql. Prints a table, and removes everything it starts and writes.
Usage: benches/scale.py [--counts 10000,100000] [--stores sqlite,postgres] [--cached 100000]
"""
import argparse, glob, json, os, random, re, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOLLGATE = Path(os.environ.get("TOLLGATE", Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "dist/tollgate"))
COLD = 2000


def token(number):
    return f"scale-{number:08d}"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Postgres:
    """A server with Debian's defaults except for its memory."""

    def __init__(self, folder):
        self.port, self.data = free_port(), folder / "pg"
        bins = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
        if not bins:
            sys.exit("PostgreSQL is missing: apt-get install postgresql")
        self.user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        self.data.mkdir()
        if self.user:
            shutil.chown(folder, "postgres"), shutil.chown(self.data, "postgres")
        subprocess.run([*self.user, f"{bins[-1]}/initdb", "-D", self.data, "-A", "trust", "-U", "postgres"], check=True, stdout=subprocess.DEVNULL)
        settings = ["-c", f"unix_socket_directories={self.data}", "-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=512MB", "-c", "max_wal_size=4GB"]
        self.process = subprocess.Popen([*self.user, f"{bins[-1]}/postgres", "-D", self.data, "-p", str(self.port), *settings], stderr=open(folder / "pg.log", "w"))
        for _ in range(200):
            if subprocess.run([f"{bins[-1]}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode == 0:
                return
            time.sleep(0.1)
        sys.exit("PostgreSQL does not start")

    def stop(self):
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)


class Gateway:
    def __init__(self, config, port, admin):
        self.port, self.admin = port, admin
        self.process = subprocess.Popen([TOLLGATE, "run", "--config", config], stderr=open(config.with_suffix(".log"), "w"))
        for _ in range(200):
            try:
                self.read("/readyz")
                break
            except OSError:
                time.sleep(0.05)
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def read(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}") as answer:
            return answer.read().decode()

    def metric(self, series):
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.read("/metrics"), re.M)
        return float(found[1]) if found else 0.0

    def ask(self, tokens):
        """Pipelined. The tokens have no scope, so the gateway responds itself, after validating them: 403."""
        self.socket.sendall(b"".join(f"GET /api/v3/user HTTP/1.1\r\nHost: h\r\nPRIVATE-TOKEN: {t}\r\n\r\n".encode() for t in tokens))
        for t in tokens:
            status = self.file.readline()
            assert b" 403 " in status, (t, status)
            length = 0
            while (line := self.file.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.file.read(length)

    def times(self, tokens):
        out = []
        for t in tokens:
            begin = time.perf_counter()
            self.ask([t])
            out.append((time.perf_counter() - begin) * 1e6)
        out.sort()
        return out[len(out) // 2], out[len(out) * 99 // 100]

    def rss(self):
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) * 1024

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def measure(kind, count, cached):
    folder = Path(tempfile.mkdtemp(prefix="tollgate-scale-"))
    folder.chmod(0o755)
    server = Postgres(folder) if kind == "postgres" else None
    try:
        port, admin = free_port(), free_port()
        store = f'url = "postgres://postgres@127.0.0.1:{server.port}/postgres"' if server else 'path = "tokens.db"'
        config = folder / "tollgate.toml"
        config.write_text(f'''[server]\nlisten = ["127.0.0.1:{port}"]\nthreads = 1\n[admin]\nlisten = "127.0.0.1:{admin}"\n[api]\nscopes = "gitlab"
[store]\nkind = "{kind}"\n{store}\n[cache]\npositive_ttl = "1h"\npositive_capacity = 1000000\n[log]\naccess = "off"\n[[upstream]]\nname = "api"\nservers = ["127.0.0.1:1"]\n''')
        if server:
            subprocess.run([TOLLGATE, "store", "migrate", "--config", config], check=True, stdout=subprocess.DEVNULL)
        run = subprocess.Popen([TOLLGATE, "token", "import", "--config", config, "--json", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for begin in range(0, count, 10000):
            lines = (f'{{"token":"{token(n)}","user":"user-{n % 1000}"}}\n' for n in range(begin, min(begin + 10000, count)))
            run.stdin.write("".join(lines).encode())
        run.stdin.close()
        imported = json.loads(run.stdout.read())
        assert run.wait() == 0 and imported["imported"] == count, imported
        size = (folder / "tokens.db").stat().st_size if not server else None
        gateway = Gateway(config, port, admin)
        try:
            random.seed(count)
            numbers = random.sample(range(count), min(COLD, count))
            cold = gateway.times([token(n) for n in numbers])
            name = f'tollgate_store_lookup_duration_seconds_%s{{store="{kind}"}}'
            lookup = gateway.metric(name % "sum") / gateway.metric(name % "count") * 1e6
            hot = gateway.times([token(n) for n in numbers])
            many = random.sample(range(count), min(cached, count))
            # Warm up the allocator and the cache before measuring.
            gateway.ask([token(n) for n in many[:64]])
            before, known = gateway.rss(), gateway.metric('tollgate_store_lookups_total{result="found",store="%s"}' % kind)
            for begin in range(0, len(many), 64):
                gateway.ask([token(n) for n in many[begin:begin + 64]])
            new = gateway.metric('tollgate_store_lookups_total{result="found",store="%s"}' % kind) - known
            memory = (gateway.rss() - before) / max(new, 1)
        finally:
            gateway.stop()
        disk = f"{size / count:.0f} B" if size else "-"
        print(f"| {kind} | {count:,} | {imported['seconds']:.1f} s ({count / imported['seconds']:,.0f}/s) | {disk} | {lookup:.0f} µs | {cold[0]:.0f} / {cold[1]:.0f} µs | {hot[0]:.0f} / {hot[1]:.0f} µs | {memory:.0f} B ({new:,.0f}) |", flush=True)
    finally:
        if server:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10000,100000,1000000,10000000")
    parser.add_argument("--stores", default="sqlite,postgres")
    parser.add_argument("--cached", type=int, default=100000, help="tokens to fill the cache with")
    options = parser.parse_args()
    print("| store | tokens | import | disk per token | lookup, mean | uncached request p50 / p99 | cached request p50 / p99 | memory per cached token (cached tokens) |")
    print("|---|---|---|---|---|---|---|---|")
    for store in options.stores.split(","):
        for count in options.counts.split(","):
            measure(store, int(count), options.cached)


main()
