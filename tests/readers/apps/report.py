"""What the Python readers have in common: the report of one request, described in report.rb, and the server."""

import json
import os
import sys

NAMES = ["private_token", "sudo", "access_token", "bearer_token", "job_token", "_method", "page", "per_page"]
OTHERS = ["AUTHORIZATION", "SUDO", "JOB_TOKEN", "DEPLOY_TOKEN", "X_HTTP_METHOD_OVERRIDE", "COOKIE"]
LOG = os.open(os.environ["READER_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def value(it):
    return it[:100] if isinstance(it, str) else {"odd": repr(it)[:100]}


def pick(source, params, every=None):
    """The watched names of a dictionary; `every` gives all the values of a name."""
    seen = []
    for name in NAMES:
        if name in params:
            values = every(name) if every else [params[name]]
            seen += [[source, name, value(it)] for it in values if it is not None]
    return seen


def pick_json(texts):
    """Every way to take the body for JSON; those that fail are none."""
    seen, fields = [], 0
    for read in texts:
        try:
            it = read()
        except Exception:
            continue
        if isinstance(it, dict):
            seen += [found for found in pick("json", it) if found not in seen]
            fields = max(fields, len(it))
    return seen, fields


def make(environ, method, seen, fields, error):
    others = [[name, value(environ["HTTP_" + name])] for name in OTHERS if "HTTP_" + name in environ]
    report = {"m": method, "h": environ.get("HTTP_PRIVATE_TOKEN"), "x": others, "s": seen, "n": fields, "e": error}
    if seen:
        line = json.dumps({"id": environ.get("HTTP_X_REQUEST_ID"), "r": report}) + "\n"
        os.write(LOG, line.encode())
    return json.dumps(report)


def path(text):
    """Visible ASCII as it is, other bytes as %XX."""
    return "".join(chr(b) if 0x21 <= b <= 0x7E else f"%{b:02X}" for b in text.encode("utf-8", "surrogateescape"))


def serve(application):
    import logging
    import waitress

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    waitress.serve(application, host="127.0.0.1", port=int(sys.argv[1]), threads=4, channel_timeout=600)
