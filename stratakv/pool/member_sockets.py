"""ZeroMQ sockets that only members of a pool can speak with: CURVE keys at both ends, and who asks for a client's key.

Used by the meta server and by workers, which listen, and by whoever connects to them.
"""

from __future__ import annotations

import hmac
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from stratakv.errors import SetupError
from stratakv.pool.auth import PoolCredentials
from stratakv.process import port_taken


class _OneKey:
    """ZeroMQ asks it about every client that connects."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        return hmac.compare_digest(key, self._public_key)


def gatekeeper(context: zmq.Context[zmq.Socket[bytes]], credentials: PoolCredentials) -> ThreadAuthenticator:
    """Lets only members connect to this context's sockets that `serve_members` was called for; `stop` it at the end."""
    keeper = ThreadAuthenticator(context)
    keeper.start()
    keeper.configure_curve_callback(credentials_provider=_OneKey(credentials.curve_keys("client").public))
    return keeper


def serve_members(socket: zmq.Socket[bytes], credentials: PoolCredentials) -> None:
    """Before it is bound."""
    keys = credentials.curve_keys("server")
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret


def as_member(socket: zmq.Socket[Any], credentials: PoolCredentials) -> None:
    """Before it is connected to a socket of `serve_members`."""
    keys = credentials.curve_keys("client")
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = credentials.curve_keys("server").public


def listen_on(socket: zmq.Socket[bytes], host: str, port: int, setting: str) -> int:
    """Bind; the port (a free one for 0). Raises SetupError that names the setting."""
    socket.setsockopt(zmq.IPV6, int(":" in host))
    where = f"[{host}]" if ":" in host else host
    try:
        socket.bind(f"tcp://{where}:{port or '*'}")
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise port_taken(host, port, setting) from None
        raise SetupError(f"{setting}: cannot listen on {host}:{port}: {error}") from None
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return int(endpoint.rstrip(b"\0").rpartition(b":")[2])
