"""What a client sends before ordinary messages: encryption requests, CancelRequest, StartupMessage. Free of I/O."""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from dbnode.sql.errors import DirectTls, ProtocolViolation, UnsupportedProtocol

PACKET_BYTES_MAX = 10_000
"""Longest startup packet, as in PostgreSQL itself."""
_PACKET_BYTES_MIN = 8
_CANCEL_KEY_BYTES = range(4, 257)
_TLS_HANDSHAKE = 0x16
_LENGTH_BYTES = 4
_LENGTH_AND_CODE = struct.Struct("!ii")
_CANCEL_CODE = (1234 << 16) | 5678
_TLS_CODE = (1234 << 16) | 5679
_GSS_CODE = (1234 << 16) | 5680
_PROTOCOL_MAJOR = 3
TLS_REQUEST = _LENGTH_AND_CODE.pack(_LENGTH_AND_CODE.size, _TLS_CODE)
"""SSLRequest, and the two answers to it."""
TLS_GIVEN, TLS_DECLINED = b"S", b"N"


class StartupKind(enum.Enum):
    """What a startup packet asks for."""

    SESSION = enum.auto()
    TLS = enum.auto()
    GSS_ENCRYPTION = enum.auto()
    CANCEL = enum.auto()


@dataclass(frozen=True, slots=True)
class CancelKey:
    """What a session is cancelled by."""

    pid: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class StartupPacket:
    """One packet, with its bytes as they came."""

    kind: StartupKind
    raw: bytes = field(repr=False)
    parameters: Mapping[str, str] = field(default_factory=dict)
    cancel_key: CancelKey | None = None

    @property
    def user(self) -> str:
        return self.parameters.get("user", "")

    @property
    def database(self) -> str:
        """The user's name stands for one that is not named."""
        return self.parameters.get("database") or self.user

    @property
    def is_replication(self) -> bool:
        """Whether a walsender is asked for, which speaks another dialect after login."""
        return self.parameters.get("replication", "false").lower() not in ("", "0", "false", "off", "no")


class StartupReader:
    """Cuts the first bytes of a connection into startup packets."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_packet(self) -> StartupPacket | None:
        """The next packet, or None until more is fed. Raises ProtocolViolation."""
        if self._buffer and self._buffer[0] == _TLS_HANDSHAKE:
            raise DirectTls("direct TLS is not supported")
        if len(self._buffer) < _LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
        if not _PACKET_BYTES_MIN <= length <= PACKET_BYTES_MAX:
            raise ProtocolViolation("invalid length of startup packet")
        if len(self._buffer) < length:
            return None
        raw = bytes(self._buffer[:length])
        del self._buffer[:length]
        return _parse(raw)

    def take_rest(self) -> bytes:
        """What came after the last packet; the reader is empty then."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


def _parse(raw: bytes) -> StartupPacket:
    _, code = _LENGTH_AND_CODE.unpack_from(raw)
    if code == _TLS_CODE:
        return StartupPacket(StartupKind.TLS, raw)
    if code == _GSS_CODE:
        return StartupPacket(StartupKind.GSS_ENCRYPTION, raw)
    if code == _CANCEL_CODE:
        return StartupPacket(StartupKind.CANCEL, raw, cancel_key=parse_cancel_key(raw[_LENGTH_AND_CODE.size :]))
    if code >> 16 != _PROTOCOL_MAJOR:
        # PostgreSQL would refuse it in the words of that old protocol, which nothing here understands.
        raise UnsupportedProtocol(f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}")
    return StartupPacket(StartupKind.SESSION, raw, _parse_parameters(raw[_LENGTH_AND_CODE.size :]))


def parse_cancel_key(payload: bytes) -> CancelKey:
    """Of BackendKeyData or CancelRequest. Raises ProtocolViolation."""
    if len(payload) - 4 not in _CANCEL_KEY_BYTES:
        raise ProtocolViolation("invalid length of cancel key")
    return CancelKey(int.from_bytes(payload[:4], "big", signed=True), payload[4:])


def _parse_parameters(payload: bytes) -> dict[str, str]:
    words = payload.split(b"\0")
    # name, value, …, "" and what follows the last NUL
    if len(words) < 2 or len(words) % 2 or words[-1] or words[-2]:
        raise ProtocolViolation("invalid startup packet layout: expected terminator as last byte")
    texts = [word.decode(errors="replace") for word in words[:-2]]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def cancel_request(key: CancelKey) -> bytes:
    """The packet that cancels what a session is doing."""
    length = _LENGTH_AND_CODE.size + 4 + len(key.secret)
    return _LENGTH_AND_CODE.pack(length, _CANCEL_CODE) + key.pid.to_bytes(4, "big", signed=True) + key.secret
