#!/usr/bin/env python3
"""The backend of tests/life: backend.py PORT. Every answer names the request that it belongs to.

    read/ID      at once
    slow/ID      after 300 ms
    upload/ID    when the body is whole: its length and digest
    download/ID  1 MiB in pieces, over about half a second

It never closes a connection, so whatever ends is the gateway's doing. It must not know the gateway."""
import asyncio, hashlib, json, sys

PIECES, PIECE = 16, 64 * 1024
DOWNLOAD = bytes(range(256)) * (PIECES * PIECE // 256)
SLOW, BETWEEN_PIECES = 0.3, 0.03


async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            kind, name = head[0].split(" ")[1].split("?")[0].split("/")[-2:]
            digest, length = hashlib.sha256(), 0
            async for piece in body(reader, fields):
                digest.update(piece)
                length += len(piece)
            if kind == "download":
                writer.write(answer_head(len(DOWNLOAD), name))
                for at in range(0, len(DOWNLOAD), PIECE):
                    writer.write(DOWNLOAD[at : at + PIECE])
                    await writer.drain()
                    await asyncio.sleep(BETWEEN_PIECES)
                continue
            if kind == "slow":
                await asyncio.sleep(SLOW)
            text = json.dumps({"id": name, "length": length, "sha256": digest.hexdigest()}).encode()
            writer.write(answer_head(len(text), name) + text)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # The gateway closed it.
    finally:
        writer.close()


async def body(reader, fields):
    if "transfer-encoding" in fields:
        while size := int(await reader.readline(), 16):
            yield await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return
    left = int(fields.get("content-length", 0))
    while left:
        piece = await reader.read(min(left, PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


def answer_head(length, name):
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nX-Answers: {name}\r\n\r\n".encode()


async def main(port):
    async with await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
