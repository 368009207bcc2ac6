"""Question: what does the textbook gevent server reach, one greenlet per connection that reads a
frame and answers it? It is what this project's server would be without its serving callback.

Command: python benchmarks/peer_gevent.py [PORT]     (0, the default, takes a free port)

Invalid if: gevent falls back to another loop than libev (its own choice on Linux), or the server
shares a core with its load generator.
"""

from __future__ import annotations

import socket
import struct
import sys

from gevent.server import StreamServer
from gevent.socket import socket as GeventSocket  # noqa: N812 - it is a class
from xxhash import xxh64_intdigest

FRAME = struct.Struct(">QQ")
REPLY = struct.Struct(">Q")
TOTAL_MASK = 2**64 - 1
BACKLOG = 4096

total = 0


def receive_frame(sock: GeventSocket) -> bytes:
    """The next 16 bytes; fewer if the peer closes before."""
    frame = sock.recv(FRAME.size)
    while frame and len(frame) < FRAME.size:
        more = sock.recv(FRAME.size - len(frame))
        if not more:
            break
        frame += more
    return frame


def handle(sock: GeventSocket, address: tuple[str, int]) -> None:
    """Serves one connection until its peer closes it or sends a bad frame."""
    global total
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while len(frame := receive_frame(sock)) == FRAME.size:
        amount, checksum = FRAME.unpack(frame)
        if checksum != xxh64_intdigest(b"%d" % amount):
            return
        total = (total + amount) & TOTAL_MASK
        sock.sendall(REPLY.pack(total))


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    server = StreamServer(("127.0.0.1", port), handle, backlog=BACKLOG)
    server.start()
    print(f"Listening on 127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
