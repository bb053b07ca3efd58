"""What every TCP connection to or from a PostgreSQL peer is set to."""

from __future__ import annotations

import asyncio
import socket

KEEPALIVE_IDLE_S = 60
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 6
"""A peer that is silently gone is noticed after about two minutes."""


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Have the kernel notice that the other side is gone."""
    peer = transport.get_extra_info("socket")
    if peer.family == socket.AF_UNIX:
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
