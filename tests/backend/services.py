"""What clients of HTTP Basic talk to: git's own `git http-backend`, an index for pip, and a registry for npm.

Usage: services.py PORT FOLDER USER TOKEN

Everything needs one credential, and says so like GitLab: Basic with exactly USER and TOKEN, or TOKEN in PRIVATE-TOKEN.
FOLDER has the repositories, and gets `seen.jsonl`: a line for each request with all of its fields.
"""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, FOLDER, USER, TOKEN = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
BASIC = "Basic " + base64.b64encode(f"{USER}:{TOKEN}".encode()).decode()
WHEEL = "thing-1.0-py3-none-any.whl"


def wheel():
    out = io.BytesIO()
    info = "thing-1.0.dist-info"
    files = {
        "thing.py": "VALUE = 7\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            # The same bytes each time.
            archive.writestr(zipfile.ZipInfo(name), text)
    return out.getvalue()


def package():
    out = io.BytesIO()
    text = json.dumps({"name": "@group/thing", "version": "1.0.0"}).encode()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/package.json")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return out.getvalue()


PACKAGE = package()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, body, *fields):
        self.send_response(status)
        for name, value in fields:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        body = self.body()
        with open(f"{FOLDER}/seen.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"method": self.command, "path": self.path, "fields": self.headers.items()}) + "\n")
        fields = [value for name, value in self.headers.items() if name.lower() in ("authorization", "private-token")]
        if fields not in ([BASIC], [TOKEN]):
            return self.answer(401, b"services.py: not authenticated\n", ("WWW-Authenticate", 'Basic realm="services"'))
        path, _, query = self.path.partition("?")
        base = f"http://{self.headers['Host']}"
        if path.startswith("/group/"):
            return self.git(path, query, body)
        if path == "/api/v4/packages/pypi/simple/thing/":
            return self.answer(200, f'<a href="../../files/{WHEEL}">{WHEEL}</a>'.encode(), ("Content-Type", "text/html"))
        if path == "/api/v4/packages/pypi" and self.command == "POST":
            return self.answer(201 if wheel() in body else 400, b"")
        if path == f"/api/v4/packages/pypi/files/{WHEEL}":
            return self.answer(200, wheel(), ("Content-Type", "application/zip"))
        if path.lower() == "/api/v4/packages/npm/@group%2fthing":
            dist = {
                "tarball": f"{base}/api/v4/packages/npm/@group/thing/-/thing-1.0.0.tgz",
                "shasum": hashlib.sha1(PACKAGE).hexdigest(),
            }
            about = {"name": "@group/thing", "dist-tags": {"latest": "1.0.0"},
                     "versions": {"1.0.0": {"name": "@group/thing", "version": "1.0.0", "dist": dist}}}
            return self.answer(200, json.dumps(about).encode(), ("Content-Type", "application/json"))
        if path.endswith("/thing-1.0.0.tgz"):
            return self.answer(200, PACKAGE, ("Content-Type", "application/octet-stream"))
        return self.answer(404, b"services.py: no such thing\n")

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def git(self, path, query, body):
        environment = {
            "PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": FOLDER, "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path,
            "QUERY_STRING": query, "REQUEST_METHOD": self.command, "REMOTE_USER": USER,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""), "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        ran = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=False)
        head, _, rest = ran.stdout.partition(b"\r\n\r\n")
        fields = [tuple(line.split(": ", 1)) for line in head.decode().split("\r\n") if ": " in line]
        status = next((int(value.split()[0]) for name, value in fields if name == "Status"), 200)
        self.answer(status, rest, *[field for field in fields if field[0] != "Status"])


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
