"""Startup packets and logins, whole and broken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.errors import DirectTls, PasswordlessLogin, ProtocolViolation
from dbnode.sql.login import Login
from dbnode.sql.messages import int32, message
from dbnode.sql.startup import CancelKey, StartupKind, StartupPacket, StartupReader, cancel_request

names = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=20)


def _startup(parameters: dict[str, str]) -> bytes:
    payload = b"".join(f"{name}\0{value}\0".encode() for name, value in parameters.items()) + b"\0"
    return int32(8 + len(payload)) + int32(3 << 16) + payload


def _outcome(chunks: list[bytes]) -> tuple[list[StartupPacket], str, bytes]:
    """Packets until a session or an error, and what is left."""
    reader = StartupReader()
    packets: list[StartupPacket] = []
    for position, chunk in enumerate(chunks):
        reader.feed(chunk)
        try:
            while (packet := reader.next_packet()) is not None:
                packets.append(packet)
                if packet.kind in (StartupKind.SESSION, StartupKind.CANCEL):
                    return packets, "", reader.take_rest() + b"".join(chunks[position + 1 :])
        except ProtocolViolation as error:
            return packets, type(error).__name__, b""
    return packets, "", reader.take_rest()


@given(st.dictionaries(names, names, max_size=8), st.integers(0, 300))
def test_parameters_are_read_and_bytes_kept_wherever_the_packet_is_cut(parameters: dict[str, str], cut: int) -> None:
    raw = _startup(parameters)
    packets, error, rest = _outcome([raw[:cut], raw[cut:], b"more"])
    assert (error, rest) == ("", b"more")
    assert dict(packets[0].parameters) == parameters
    assert packets[0].raw == raw


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_give_the_same_outcome_in_any_cutting(data: bytes, cut: int) -> None:
    assert _outcome([data]) == _outcome([data[:cut], data[cut:]])


@given(st.integers(-(2**31), 2**31 - 1), st.binary(min_size=4, max_size=256))
def test_cancel_request_of_any_key_length_is_understood(pid: int, secret: bytes) -> None:
    packets, error, _ = _outcome([cancel_request(CancelKey(pid, secret))])
    assert error == ""
    assert packets[0].cancel_key == CancelKey(pid, secret)


@pytest.mark.parametrize("secret", [b"", b"123", bytes(257)])
def test_cancel_key_of_another_length_is_a_violation(secret: bytes) -> None:
    assert _outcome([cancel_request(CancelKey(1, secret))])[1] == ProtocolViolation.__name__


def test_direct_tls_is_recognised_by_its_first_byte() -> None:
    reader = StartupReader()
    reader.feed(b"\x16")
    with pytest.raises(DirectTls):
        reader.next_packet()


@pytest.mark.parametrize(
    ("value", "expected"), [("database", True), ("true", True), ("1", True), ("off", False), ("0", False)]
)
def test_replication_is_recognised(value: str, expected: bool) -> None:
    assert _outcome([_startup({"user": "a", "replication": value})])[0][0].is_replication is expected


OK = message(b"R", int32(0))
SASL = message(b"R", int32(10) + b"SCRAM-SHA-256\0\0")
END = message(b"K", int32(7) + b"secret-key") + message(b"Z", b"I")


@given(st.integers(0, 60))
def test_login_is_read_through_to_its_end_wherever_it_is_cut(cut: int) -> None:
    data = SASL + OK + END + b"later"
    reader = Login(trusted=False)
    parts = [reader.feed(data[:cut])]
    if not reader.done:
        parts.append(reader.feed(data[cut:]))
    forwarded = b"".join(forward for forward, _, _ in parts)
    assert forwarded == SASL + OK + END
    assert reader.cancel_key == CancelKey(7, b"secret-key")
    assert b"later".startswith(parts[-1][2])


def test_login_without_credentials_is_refused_before_the_client_hears_of_it() -> None:
    with pytest.raises(PasswordlessLogin):
        Login(trusted=False).feed(OK + END)
    assert Login(trusted=True).feed(OK + END) == (OK + END, b"", b"")


@given(st.binary(max_size=200))
def test_backend_that_speaks_something_else_is_a_violation_at_most(data: bytes) -> None:
    reader = Login(trusted=False)
    try:
        forward, _, rest = reader.feed(data)
    except (ProtocolViolation, PasswordlessLogin):
        return
    assert data.startswith(forward)
    assert reader.done or rest == b""
