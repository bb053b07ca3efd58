"""The few commands that the SQL functions send to the private listener, and the answers. Free of I/O.

    infer PID ROLE DATABASE MODEL OPTIONS PROMPT    start a call; answered within the hold time
    infer_within …                                  the same, from within a function that is not ours
    poll                                            go on waiting for it
    bind NONCE PID                                  this connection belongs to a session of the gateway
    explain PID ROLE DATABASE NAMES QUERY           look at what the query's calls would ask; answered with the query to run
    probe PID ROLE DATABASE MODEL OPTIONS PROMPT    a call of that query
    explained PID TOKEN ROWS                        it has ended: what it would cost; polled like a call
    ask PID ROLE DATABASE TOPIC PAYLOAD             what else the DB node can be asked, by topic; polled like a call
    set client_encoding to '…'                      what libpq sends for dblink; all our text is ASCII

ROLE, DATABASE and NONCE are hexadecimal UTF-8; behind the ROLE of `infer` and `probe` come, each after a colon, the OID and the
name of the role that has logged in, and the OID of ROLE, which functions of former releases leave out. The cluster is told by
the connection's application_name; MODEL and OPTIONS too, after `=`, or `-` for NULL. PROMPT is base64 after `=`, or `-` for NULL
in `probe`; QUERY is base64 after `=`, and NAMES are separated by commas. The PAYLOAD of `ask` is a JSON object in base64 after `=`;
its ROLE is as that of `infer`.
"""

from __future__ import annotations

import base64
import binascii
import enum
import json
from dataclasses import dataclass, field
from typing import Any

from dbnode.sql.errors import ProtocolViolation
from dbnode.sql.messages import text_row
from dbnode.sql.row_prompt import ROW, RowPrompt, parse_row
from dbnode.sql.service import InferCall, Login, NullAnswer
from stratakv.errors import InvalidRequest, PermissionDenied, StrataError

_INFER_WORDS = 6
_BIND_WORDS = 2
_ASK_WORDS = 5
_EXPLAINING = {b"explain": 5, b"probe": _INFER_WORDS, b"explained": 3}
"""Words of each command."""
_NULL = b"-"


class NotUtf8(InvalidRequest):
    """A text is not valid UTF-8, which only a database in SQL_ASCII can hold."""

    sqlstate = "22021"


class FormerFunctions(PermissionDenied):
    """They are of a release that asked in another way."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="Run `stratakv install` again, with this release.")


class NulInAnswer(InvalidRequest):
    """PostgreSQL's text cannot hold the answer."""

    sqlstate = "22021"


@dataclass(frozen=True, slots=True)
class Infer:
    """A call, not yet tied to a session."""

    pid: int
    role: str
    database: str
    model: str | None
    options: dict[str, Any]
    prompt: str = field(repr=False)
    row: RowPrompt | None = None
    """What the prompt was made of, if its fields may stand in another order."""
    is_within: bool = False
    """Called by another function, not by the statement itself."""
    login: Login | None = None
    """None if the functions do not tell it."""

    def call(self, session: str) -> InferCall:
        """What the model is asked, on behalf of this session."""
        return InferCall(
            prompt=self.prompt,
            model=self.model,
            options=self.options,
            role=self.role,
            database=self.database,
            session=session,
            login=self.login,
        )


@dataclass(frozen=True, slots=True)
class Poll:
    """Go on waiting."""


@dataclass(frozen=True, slots=True)
class Bind:
    """Tie the connection to a session of the gateway."""

    nonce: str = field(repr=False)
    pid: int


@dataclass(frozen=True, slots=True)
class SetEncoding:
    """Makes no difference."""


@dataclass(frozen=True, slots=True)
class Explain:
    """Look at what a query would ask."""

    pid: int
    role: str
    database: str
    names: frozenset[str]
    """Functions of ours that need no schema in this session."""
    query: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Probe:
    """A call of a query that is explained."""

    pid: int
    call: Infer | None
    """None without a prompt."""


@dataclass(frozen=True, slots=True)
class Explained:
    """The query has ended."""

    pid: int
    token: str = field(repr=False)
    num_rows: int


@dataclass(frozen=True, slots=True)
class Ask:
    """A question or an order that is no infer()."""

    pid: int
    topic: str
    payload: dict[str, Any] = field(repr=False)
    role: str
    database: str
    login: Login | None


Command = Ask | Infer | Poll | Bind | SetEncoding | Explain | Probe | Explained


def cluster_of(application_name: str) -> str:
    """System identifier of the cluster whose functions have opened a connection; empty if they do not tell."""
    mark, _, cluster = application_name.partition(":")
    return cluster if mark == "stratakv" and cluster.isascii() and cluster.isdigit() else ""


def parse_command(text: bytes, cluster: str = "") -> Command:
    """A simple query's text without its NUL, from a connection of this cluster.

    Raises ProtocolViolation, or InvalidRequest for what the caller wrote.
    """
    name, _, rest = text.partition(b" ")
    if name in (b"infer", b"infer_within"):
        return _parse_infer(rest, cluster, is_within=name != b"infer")
    if name == b"poll" and not rest:
        return Poll()
    if name == b"bind":
        words = rest.split(b" ")
        if len(words) == _BIND_WORDS:
            return Bind(_unhex(words[0], "the nonce"), _number(words[1]))
    if name == b"statements":
        raise FormerFunctions("the functions in this database do not say which role asks for its statistics")
    if name == b"ask":
        return _parse_ask(rest, cluster)
    if name in _EXPLAINING:
        return _parse_explaining(name, rest, cluster)
    if name.lower() == b"set" and rest.lower().startswith(b"client_encoding to "):
        return SetEncoding()
    raise ProtocolViolation("unknown command")


def _parse_infer(rest: bytes, cluster: str, *, is_within: bool) -> Infer:
    words = rest.split(b" ", _INFER_WORDS - 1)
    if len(words) != _INFER_WORDS:
        raise ProtocolViolation("malformed command")
    pid, role, database, model, options, prompt = words
    role_word, _, login = role.partition(b":")
    prompt_text = _base64(prompt, "the prompt")
    given = _parse_options(_optional(options, "infer() options"))
    row = None
    if given.get(ROW) is True:
        row = parse_row(prompt_text)
        prompt_text = row.text()
        del given[ROW]
    return Infer(
        pid=_number(pid),
        role=_unhex(role_word, "the role's name"),
        database=_unhex(database, "the database's name"),
        model=_optional(model, "the model's name"),
        options=given,
        prompt=prompt_text,
        row=row,
        is_within=is_within,
        login=_parse_login(login, cluster),
    )


def _parse_ask(rest: bytes, cluster: str) -> Ask:
    words = rest.split(b" ", _ASK_WORDS - 1)
    if len(words) != _ASK_WORDS or not words[3].isalpha():
        raise ProtocolViolation("malformed command")
    pid, role, database, topic, payload = words
    role_word, _, login = role.partition(b":")
    try:
        asked = json.loads(_base64(payload, "what is asked"))
    except (ValueError, RecursionError):
        raise ProtocolViolation("malformed command") from None
    if not isinstance(asked, dict):
        raise ProtocolViolation("malformed command")
    return Ask(
        pid=_number(pid),
        topic=topic.decode("ascii"),
        payload=asked,
        role=_unhex(role_word, "the role's name"),
        database=_unhex(database, "the database's name"),
        login=_parse_login(login, cluster),
    )


def _parse_login(word: bytes, cluster: str) -> Login | None:
    """OID and name, and the OID of the caller."""
    if not word:
        return None
    oid, _, rest = word.partition(b":")
    role, _, caller_oid = rest.partition(b":")
    name = _unhex(role, "the name of the login role")
    return Login(name, _number(oid), cluster, _number(caller_oid) if caller_oid else None)


def _parse_explaining(name: bytes, rest: bytes, cluster: str) -> Explain | Probe | Explained:
    words = rest.split(b" ", _EXPLAINING[name] - 1)
    if len(words) != _EXPLAINING[name]:
        raise ProtocolViolation("malformed command")
    pid = _number(words[0])
    if name == b"explain":
        names = frozenset(_unhex(words[3], "the names").split(","))
        query = _base64(words[4], "the query")
        return Explain(pid, _unhex(words[1], "the role's name"), _unhex(words[2], "the database's name"), names, query)
    if name == b"probe":
        return Probe(pid, None if words[5] == _NULL else _parse_infer(rest, cluster, is_within=False))
    return Explained(pid, _unhex(words[1], "the token"), _number(words[2]))


def _base64(word: bytes, name: str) -> str:
    if word[:1] != b"=":
        raise ProtocolViolation("malformed command")
    try:
        return base64.b64decode(word[1:].replace(b"\n", b""), validate=True).decode()
    except binascii.Error:
        raise ProtocolViolation("malformed command") from None
    except UnicodeDecodeError as error:
        raise NotUtf8(f"{name} is not valid UTF-8 at byte {error.start}") from None


def _parse_options(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("infer() options are not readable", param="options") from error
    if not isinstance(options, dict):
        raise InvalidRequest("infer() options must be a JSON object", hint="""'{"max_tokens": 20}'""", param="options")
    return options


def _optional(word: bytes, name: str) -> str | None:
    return None if word == _NULL else _unhex(word[1:], name)


def _unhex(word: bytes, name: str) -> str:
    try:
        text = bytes.fromhex(word.decode("ascii"))
    except ValueError:
        raise ProtocolViolation("malformed command") from None
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise NotUtf8(f"{name} is not valid UTF-8") from None


def _number(word: bytes) -> int:
    if not word.isdigit() or len(word) > 10:
        raise ProtocolViolation("malformed command")
    return int(word)


class Status(enum.StrEnum):
    """First column of an answer."""

    OK = "ok"
    WAIT = "wait"
    FLUSH = "flush"
    """The same, and the client shall have the rows that are ready."""
    ERROR = "error"
    GONE = "gone"
    """There is no such call any more; ask again from the start."""


def reply(status: Status, answer: str | None = None, error: StrataError | None = None) -> bytes:
    """One row, all of it ASCII: PostgreSQL decodes the answer itself, so that any database encoding works."""
    if isinstance(error, NullAnswer):
        status, error = Status.OK, None
    encoded = None if answer is None else base64.b64encode(answer.encode()).decode()
    return text_row(
        [
            ("status", status.value),
            ("answer", encoded),
            ("sqlstate", error.sqlstate if error else None),
            ("message", _ascii(error.message) if error else None),
            ("hint", _ascii(error.hint) if error and error.hint else None),
        ]
    )


def answer_reply(answer: str) -> bytes:
    """The answer of a call, unless PostgreSQL could not hold it."""
    if "\0" in answer:
        return reply(Status.ERROR, error=NulInAnswer("the model's answer contains a NUL character"))
    return reply(Status.OK, answer)


def _ascii(text: str) -> str:
    return text.encode("ascii", errors="backslashreplace").decode().replace("\0", "")
