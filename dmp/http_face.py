"""The daemon's answer to a monitoring system that asks at its TCP port: `GET /metrics`, once per connection.

Frames of the pool's protocol begin with another letter than HTTP's GET. Metrics tell nothing of prompts or keys, so nobody has
to prove anything for them. Called by `dmp.connection`, in the connection's thread.
"""

from __future__ import annotations

import socket
import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from stratakv.pool.errors import TransportError
from stratakv.pool.framing import receive_exactly, send_all

FIRST_BYTE = b"G"
REQUEST_BYTES_MAX = 8192
REQUEST_TIMEOUT_S = 5.0


def answer(sock: socket.socket, registry: CollectorRegistry) -> None:
    """Read one request and answer it; the caller closes. Raises TransportError."""
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    request = bytearray()
    while not request.endswith(b"\r\n\r\n"):
        if len(request) >= REQUEST_BYTES_MAX:
            raise TransportError(f"an HTTP request has {REQUEST_BYTES_MAX} bytes at most")
        request += receive_exactly(sock, 1, deadline)
    words = bytes(request).split(b"\r\n", 1)[0].split(b" ")
    if words[0] == b"GET" and len(words) == 3 and words[1].split(b"?")[0] == b"/metrics":
        body, head = generate_latest(registry), f"HTTP/1.1 200 OK\r\nContent-Type: {CONTENT_TYPE_LATEST}"
    else:
        body, head = b"only /metrics is here\n", "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain"
    head += f"\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    send_all(sock, [head.encode() + body], deadline)
