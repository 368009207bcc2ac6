"""Question: what does the same protocol reach on asyncio with uvloop, its fastest loop?

Command: python benchmarks/peer_uvloop.py [PORT]     (0, the default, takes a free port)

Invalid if: uvloop is not installed (it then ends with the ImportError), or the server shares a core
with its load generator.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import cast

import uvloop
from xxhash import xxh64_intdigest

FRAME = struct.Struct(">QQ")
REPLY = struct.Struct(">Q")
TOTAL_MASK = 2**64 - 1
BACKLOG = 4096

total = 0


class Connection(asyncio.Protocol):
    """One peer: all whole frames that have arrived are answered with one write."""

    def __init__(self) -> None:
        self.rest = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        global total
        assert self.transport is not None
        if self.rest:
            data = self.rest + data
        whole = len(data) - len(data) % FRAME.size
        self.rest = data[whole:]
        replies = []
        for amount, checksum in FRAME.iter_unpack(data[:whole]):
            if checksum != xxh64_intdigest(b"%d" % amount):
                self.transport.close()
                break
            total = (total + amount) & TOTAL_MASK
            replies.append(REPLY.pack(total))
        self.transport.write(b"".join(replies))

    def pause_writing(self) -> None:
        """A peer that does not read its replies is not read from."""
        assert self.transport is not None
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        assert self.transport is not None
        self.transport.resume_reading()


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", port, backlog=BACKLOG)
    port = server.sockets[0].getsockname()[1]
    print(f"Listening on 127.0.0.1:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
