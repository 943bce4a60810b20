"""Drives httpx over HTTP/2 and TLS: http2_httpx.py BASE_URL GOOD_TOKEN BAD_TOKEN CA_FILE (tests/http2_clients.rs)"""

import asyncio
import ssl
import sys

import httpx

base_url, good_token, bad_token, ca_file = sys.argv[1:]
passed = 0


def ok(name, wanted, response):
    global passed
    got = (response.http_version, response.status_code, response.text)
    if got != ("HTTP/2", *wanted):
        sys.exit(f"not ok {name}: {got[:2]} {got[2][:100]}, wanted {wanted}")
    passed += 1


async def main():
    trust = ssl.create_default_context(cafile=ca_file)
    async with httpx.AsyncClient(http1=False, http2=True, verify=trust, base_url=base_url, timeout=30,
                                 headers={"PRIVATE-TOKEN": good_token}) as client:
        ok("good token", (200, "ok"), await client.get("/api/v3/x"))
        refused = await client.get("/api/v3/x", headers={"PRIVATE-TOKEN": bad_token})
        ok("bad token", (401, '{"message":"401 Unauthorized"}'), refused)
        typed = {"Content-Type": "application/octet-stream"}
        ok("post", (200, str(1 << 20)), await client.post("/api/v3/size", content=bytes(1 << 20), headers=typed))
        for answer in await asyncio.gather(*(client.get(f"/api/v3/x?n={n}") for n in range(100))):
            ok("parallel", (200, "ok"), answer)
        ok("ready", (200, "ok"), await client.get("/api/v3/ready"))
        # Meanwhile the gateway ends, and another one takes its place.
        await asyncio.to_thread(sys.stdin.read)
        try:
            again = await client.get("/api/v3/x")
        except httpx.LocalProtocolError:
            # h2 4.4.1 takes a connection for closed after any GOAWAY, and the PING that follows it for an error.
            again = await client.get("/api/v3/x")
        ok("goes on", (200, "ok"), again)


asyncio.run(main())
print(f"{passed} passed")
