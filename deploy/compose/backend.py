"""A backend to try tollgate on: a list of projects, page by page, for the user that the gateway names. Trusts X-Tollgate-User, which
is right only because nothing but the gateway can reach it."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PROJECTS = [{"id": number, "name": f"project {number}"} for number in range(1, 251)]


class Backend(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        target = urlsplit(self.path)
        if target.path.endswith("/user"):
            return self.answer({"username": self.headers.get("X-Tollgate-User", "nobody")})
        query = parse_qs(target.query)
        size, page = (int(query.get(name, [default])[0]) for name, default in (("per_page", 20), ("page", 1)))
        self.answer(PROJECTS[size * (page - 1) : size * page])

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("", 3000), Backend).serve_forever()
