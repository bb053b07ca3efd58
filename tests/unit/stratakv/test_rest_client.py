"""The small REST client against a real HTTP server."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from stratakv.rest_client import RestClient


class _ClosesSilently(BaseHTTPRequestHandler):
    """Promises a connection that stays open, and closes it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_a_connection_that_the_server_has_closed_is_replaced() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _ClosesSilently)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        client = RestClient(f"http://127.0.0.1:{server.server_port}")
        assert client.get("/first") == {}
        socket = client._connection.sock
        assert socket is not None
        assert socket.recv(1) == b""  # the server's end has come
        assert client.get("/second") == {}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
