"""Drives python-gitlab 4.13, which waits by itself when it gets 429, against a gateway with a limit.

Usage: PYTHONPATH=target/py-clients/python-gitlab-4 target/py-clients/bin/python python_gitlab_limits.py BASE_URL TOKEN REQUESTS
"""

import sys
import time

import gitlab

base_url, token, requests = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = gitlab.Gitlab(base_url, private_token=token, timeout=30)
begun = time.monotonic()
for number in range(requests):
    assert client.http_get("/user") == {"username": "alice"}
    print(f"ok {number} after {time.monotonic() - begun:.1f}s", flush=True)
