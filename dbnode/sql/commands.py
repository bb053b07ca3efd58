"""The few commands that the SQL functions send to the private listener, and the answers. Free of I/O.

    infer PID ROLE DATABASE MODEL OPTIONS PROMPT    start a call; answered within the hold time
    poll                                            go on waiting for it
    bind NONCE PID                                  this connection belongs to a session of the gateway
    statements PID ROLE                             statistics of statements, of one role or of all; polled like a call
    set client_encoding to '…'                      what libpq sends for dblink; all our text is ASCII

ROLE, DATABASE and NONCE are hexadecimal UTF-8; MODEL and OPTIONS too, after `=`, or `-` for NULL, as is the ROLE of `statements`,
where NULL means all; PROMPT is base64 after `=`.
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
from dbnode.sql.service import InferCall, NullAnswer
from stratakv.errors import InvalidRequest, StrataError

_INFER_WORDS = 6
_BIND_WORDS = _STATEMENTS_WORDS = 2
_NULL = b"-"


class NotUtf8(InvalidRequest):
    """The prompt is not valid UTF-8, which only a database in SQL_ASCII can hold."""

    sqlstate = "22021"


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

    def call(self, session: str) -> InferCall:
        """What the model is asked, on behalf of this session."""
        return InferCall(
            prompt=self.prompt,
            model=self.model,
            options=self.options,
            role=self.role,
            database=self.database,
            session=session,
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
class Statements:
    """Read statistics."""

    pid: int
    role: str | None
    """None for all roles'."""


Command = Infer | Poll | Bind | SetEncoding | Statements


def parse_command(text: bytes) -> Command:
    """A simple query's text without its NUL. Raises ProtocolViolation, or InvalidRequest for what the caller wrote."""
    name, _, rest = text.partition(b" ")
    if name == b"infer":
        return _parse_infer(rest)
    if name == b"poll" and not rest:
        return Poll()
    if name == b"bind":
        words = rest.split(b" ")
        if len(words) == _BIND_WORDS:
            return Bind(_unhex(words[0]), _number(words[1]))
    if name == b"statements":
        words = rest.split(b" ")
        if len(words) == _STATEMENTS_WORDS:
            return Statements(_number(words[0]), _optional(words[1]))
    if name.lower() == b"set" and rest.lower().startswith(b"client_encoding to "):
        return SetEncoding()
    raise ProtocolViolation("unknown command")


def _parse_infer(rest: bytes) -> Infer:
    words = rest.split(b" ", _INFER_WORDS - 1)
    if len(words) != _INFER_WORDS or words[5][:1] != b"=":
        raise ProtocolViolation("malformed command")
    pid, role, database, model, options, prompt = words
    try:
        prompt_text = base64.b64decode(prompt[1:].replace(b"\n", b""), validate=True).decode()
    except binascii.Error:
        raise ProtocolViolation("malformed command") from None
    except UnicodeDecodeError as error:
        raise NotUtf8(f"the prompt is not valid UTF-8 at byte {error.start}") from None
    model_text, given = _optional(model), _parse_options(_optional(options))
    row = None
    if given.get(ROW) is True:
        row = parse_row(prompt_text)
        prompt_text = row.text()
        del given[ROW]
    return Infer(_number(pid), _unhex(role), _unhex(database), model_text, given, prompt_text, row)


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


def _optional(word: bytes) -> str | None:
    return None if word == _NULL else _unhex(word[1:])


def _unhex(word: bytes) -> str:
    try:
        return bytes.fromhex(word.decode("ascii")).decode()
    except ValueError:
        raise ProtocolViolation("malformed command") from None


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
