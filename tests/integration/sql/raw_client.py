"""Bytes on a socket, for what no client library sends."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

from dbnode.sql.messages import cstring, int32

TIMEOUT_S = 20.0
PROTOCOL_3_0 = 3 << 16
TLS_REQUEST = int32(8) + int32((1234 << 16) | 5679)
GSS_REQUEST = int32(8) + int32((1234 << 16) | 5680)


def startup(database: str, user: str = "postgres", protocol: int = PROTOCOL_3_0, **parameters: str) -> bytes:
    """A StartupMessage."""
    pairs = {"user": user, "database": database, **parameters}
    payload = b"".join(cstring(name) + cstring(value) for name, value in pairs.items()) + b"\0"
    return int32(8 + len(payload)) + int32(protocol) + payload


class RawClient:
    """A TCP connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_until(self, ending: bytes) -> bytes:
        """Everything up to `ending`, which must come."""
        received = b""
        while not received.endswith(ending):
            data = self.socket.recv(65536)
            assert data, received
            received += data
        return received

    def read_ready(self) -> bytes:
        """Everything up to ReadyForQuery, in whatever transaction."""
        received = b""
        while received[-6:-1] != b"Z\0\0\0\5":
            data = self.socket.recv(65536)
            assert data, received
            received += data
        return received

    def read_all(self) -> bytes:
        """Everything until the other side closes."""
        received = b""
        while True:
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                return received
            if not data:
                return received
            received += data

    def log_in(self, database: str, user: str = "postgres") -> bytes:
        self.send(startup(database, user))
        return self.read_until(b"Z\0\0\0\5I")
