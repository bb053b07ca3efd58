"""Takes the notices by which infer() makes PostgreSQL send its rows out of what goes to a client. Free of I/O.

PostgreSQL keeps a result back until it has 8 kB of it; a notice makes it send what it has. Used while a statement streams.
"""

from __future__ import annotations

from dbnode.sql.messages import HEADER_BYTES, Kind

SQLSTATE = "SKV02"
"""Of these notices."""
NOTICE_BYTES_MAX = 1024
"""Longer ones are not ours."""
_CODE = b"\0C" + SQLSTATE.encode() + b"\0"


class NoticeFilter:
    """Follows the messages of one session from a message boundary on."""

    def __init__(self) -> None:
        self._held = b""
        self._left = 0
        """Bytes of a message that are still to come, and to be handed on."""

    def feed(self, data: bytes) -> bytes:
        """What the client gets of it."""
        data = self._held + data
        passed: list[bytes] = []
        start, position = 0, min(self._left, len(data))
        self._left -= position
        while position + HEADER_BYTES <= len(data):
            size_bytes = 1 + int.from_bytes(data[position + 1 : position + HEADER_BYTES], "big")
            end = position + size_bytes
            if data[position] == Kind.NOTICE_RESPONSE and size_bytes <= NOTICE_BYTES_MAX:
                if end > len(data):
                    break
                if _CODE in data[position:end]:
                    passed.append(data[start:position])
                    start = end
            if end > len(data):
                self._left = end - len(data)
                end = len(data)
            position = end
        passed.append(data[start:position])
        self._held = data[position:]
        return b"".join(passed)
