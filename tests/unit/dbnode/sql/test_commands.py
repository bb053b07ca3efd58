"""Commands of the private listener, and the exchange that binds a session."""

from __future__ import annotations

import base64
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.binding import BindingRegistry, SessionBinding, UnknownNonce
from dbnode.sql.commands import Ask, Bind, Infer, NotUtf8, Poll, SetEncoding, answer_reply, parse_command
from dbnode.sql.errors import ProtocolViolation
from dbnode.sql.messages import cstring, int32, message
from dbnode.sql.own_statements import Within, bind_exchange
from dbnode.sql.row_prompt import RowPrompt
from dbnode.sql.service import Login
from stratakv.errors import InvalidRequest, PermissionDenied, StrataError

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)


def _hex(text: str) -> bytes:
    return text.encode().hex().encode()


def _infer(role: str, model: str | None, options: object, prompt: bytes) -> bytes:
    words = [
        b"7",
        _hex(role),
        _hex("db"),
        b"-" if model is None else b"=" + _hex(model),
        b"-" if options is None else b"=" + _hex(json.dumps(options)),
        b"=" + base64.encodebytes(prompt),
    ]
    return b"infer " + b" ".join(words)


@given(texts, st.none() | texts, st.none() | st.dictionaries(texts, st.integers()), texts)
def test_call_is_read_as_it_was_written(
    role: str, model: str | None, options: dict[str, int] | None, prompt: str
) -> None:
    command = parse_command(_infer(role, model, options, prompt.encode()))
    assert command == Infer(7, role, "db", model, options or {}, prompt)


def _ask(role: str, payload: bytes, topic: bytes = b"usage") -> bytes:
    words = (b"7", _hex("r") + b":16384:" + _hex(role), _hex("db"), topic, b"=" + base64.encodebytes(payload))
    return b"ask " + b" ".join(words)


@given(texts, st.dictionaries(texts, texts))
def test_question_is_read_as_it_was_written(role: str, payload: dict[str, str]) -> None:
    command = parse_command(_ask(role, json.dumps(payload).encode()), "42")
    assert command == Ask(7, "usage", payload, "r", "db", Login(role, 16384, "42"))


def test_who_calls_is_told_by_its_oid_too() -> None:
    command = parse_command(b"ask 7 72:16384:6c:16385 6462 usage =e30=", "42")
    assert command == Ask(7, "usage", {}, "r", "db", Login("l", 16384, "42", 16385))


def test_functions_of_former_releases_are_told_what_to_do() -> None:
    with pytest.raises(PermissionDenied, match="do not say which role") as caught:
        parse_command(b"statements 1 =72")
    assert "stratakv install" in str(caught.value.hint)


@pytest.mark.parametrize(
    "command", [_ask("r", b"[]"), _ask("r", b"{"), _ask("r", b"{}", topic=b"a-b"), b"ask 7 72 6462 usage", b"ask"]
)
def test_malformed_question_is_refused(command: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse_command(command)


@given(texts, texts, st.dictionaries(texts, texts))
def test_row_is_read_with_its_fields_in_order(before: str, after: str, fields: dict[str, str]) -> None:
    prompt = json.dumps({"after": after, "before": before, "fields": fields}).encode()
    command = parse_command(_infer("r", None, {"@row": True, "seed": 1}, prompt))
    row = RowPrompt(before, after, tuple(fields.items()))
    lines = "\n".join(f"{name}: {value}" for name, value in fields.items())
    assert command == Infer(7, "r", "db", None, {"seed": 1}, before + lines + after, row)


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda data: b"infer " + data))
def test_any_text_is_a_command_or_an_error(data: bytes) -> None:
    with contextlib.suppress(StrataError):
        parse_command(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"poll", Poll()),
        (b"bind 6162 12", Bind("ab", 12)),
        (b"set client_encoding to 'LATIN1'", SetEncoding()),
    ],
)
def test_small_commands(text: bytes, expected: object) -> None:
    assert parse_command(text) == expected


@pytest.mark.parametrize("text", [b"", b"SELECT 1", b"poll now", b"bind zz 1", b"bind 61 -1", b"infer 1 2 3"])
def test_other_text_is_a_violation(text: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse_command(text)


def test_mistakes_of_the_caller_are_told_as_such() -> None:
    with pytest.raises(NotUtf8, match="at byte 1"):
        parse_command(_infer("a", None, None, b"x\xff"))
    with pytest.raises(InvalidRequest, match="JSON object"):
        parse_command(_infer("a", None, [1], b"x"))


def test_answer_is_ascii_and_nul_is_refused() -> None:
    assert base64.b64encode("漢字".encode()) in answer_reply("漢字")
    assert b"22021" in answer_reply("a\0b")


class _Caller:
    closed = False

    def interrupt(self) -> None: ...

    def statement_ended(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_nonce_works_once_and_for_its_backend_only() -> None:
    registry = BindingRegistry()
    session = SessionBinding("sql-1", 7)
    nonce = registry.issue(session)
    with pytest.raises(UnknownNonce):
        registry.redeem(nonce, 8, _Caller())
    with pytest.raises(UnknownNonce):
        registry.redeem(nonce, 7, _Caller())
    second = registry.issue(session)
    first_caller = _Caller()
    assert registry.redeem(second, 7, first_caller) is session
    third = registry.issue(session)
    registry.redeem(third, 7, _Caller())
    assert first_caller.closed
    revoked = registry.issue(session)
    registry.revoke(revoked)
    with pytest.raises(UnknownNonce):
        registry.redeem(revoked, 7, _Caller())


READY = message(b"Z", b"I")
NOTIFICATION = message(b"A", int32(1) + cstring("channel") + cstring("payload"))
SUCCESS = message(b"1") + message(b"2") + message(b"D", b"\0\1" + int32(1) + b"t") + message(b"C", cstring("SELECT 1"))
ERROR = message(b"E", b"SERROR\0C3F000\0Mno schema\0\0")


@given(st.sampled_from([SUCCESS, ERROR]), st.integers(0, 200))
def test_exchange_swallows_its_answers_and_hands_on_the_rest(outcome: bytes, cut: int) -> None:
    exchange = bind_exchange(Within.NOTHING, "nonce", "listener")
    first = NOTIFICATION + outcome + READY
    for_client = b""
    for chunk in (first[:cut], first[cut:], message(b"3") + NOTIFICATION, READY + b"rest"):
        assert not exchange.done
        for_client += exchange.feed(chunk)
    assert exchange.done
    assert exchange.last_error == (ERROR if outcome == ERROR else b"")
    assert for_client == NOTIFICATION * 2
    assert exchange.take_rest() == b"rest"


def test_bind_is_not_even_parsed_before_its_function_is_known_to_be_ours() -> None:
    request = bind_exchange(Within.NOTHING, "nonce", "listener").request
    first_sync = request.index(message(b"S"))
    assert request.index(b"prosecdef") < request.index(b"stratakv.bind($1") < first_sync


def test_call_from_within_another_function_says_so() -> None:
    command = parse_command(_infer("a", None, None, b"x").replace(b"infer ", b"infer_within ", 1))
    assert command == Infer(7, "a", "db", None, {}, "x", is_within=True)


def test_names_that_are_not_utf8_are_told_as_such() -> None:
    with pytest.raises(NotUtf8, match="role's name"):
        parse_command(_infer("a", None, None, b"x").replace(_hex("a"), b"ff", 1))
