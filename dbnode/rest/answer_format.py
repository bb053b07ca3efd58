"""One answer on its way out: text, calls of tools and log-probabilities, as events or gathered into a choice. Protocol code."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from dbnode.generate import Chunk, FinishReason
from dbnode.rest.bodies import EventWriter
from dbnode.rest.form import Form
from dbnode.rest.logprobs import LogprobsWriter
from dbnode.rest.tool_calls import CallPiece, CallReader, Piece
from dbnode.rest.tools import ToolMode, ToolUse
from stratakv.token_text import TokenTexts

TOOL_CALLS = "tool_calls"
"""The reason for the end of an answer that calls tools by its own choice."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What the answers to one request are made of."""

    form: Form
    tools: ToolUse | None = None
    num_top_logprobs: int | None = None
    texts: TokenTexts | None = None
    """Needed with `num_top_logprobs`."""

    def logprobs(self) -> LogprobsWriter | None:
        if self.num_top_logprobs is None:
            return None
        assert self.texts is not None
        return LogprobsWriter(self.form, self.texts, self.num_top_logprobs)

    def reader(self) -> CallReader | None:
        return None if self.tools is None else CallReader(self.tools)

    def finish_reason(self, reason: FinishReason, num_calls: int) -> str:
        """As OpenAI has it: a call of a function that the client named is an ordinary end."""
        is_call = reason is FinishReason.STOP and num_calls > 0
        return TOOL_CALLS if is_call and self.tools and self.tools.mode is not ToolMode.NAMED else reason.value


class AnswerEvents:
    """Streams one answer."""

    def __init__(self, answer: AnswerFormat, writer: EventWriter, echo: str = "") -> None:
        """`echo` is what it begins with."""
        self._format = answer
        self._writer = writer
        self._calls = answer.reader()
        self._logprobs = answer.logprobs()
        self._is_plain = self._calls is None and self._logprobs is None
        self._echo = echo
        self._begun = False

    def events(self, chunk: Chunk) -> bytes:
        """What a chunk becomes; nothing if none of its text may be shown yet."""
        begin = b"" if self._begun else self._first()
        self._begun = True
        middle = self._plain(chunk) if self._is_plain else self._special(chunk)
        if chunk.finish_reason is None:
            return begin + middle
        num_calls = self._calls.num_calls if self._calls is not None else 0
        return begin + middle + self._writer.last(self._format.finish_reason(chunk.finish_reason, num_calls))

    def _first(self) -> bytes:
        return self._writer.first() + (self._writer.text(self._echo) if self._echo else b"")

    def _plain(self, chunk: Chunk) -> bytes:
        return self._writer.text(chunk.text) if chunk.text else b""

    def _special(self, chunk: Chunk) -> bytes:
        pieces = _pieces(self._calls, chunk)
        calls = [piece for piece in pieces if isinstance(piece, CallPiece)]
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        events = b""
        if self._logprobs is not None and chunk.scores:
            events = self._writer.scored(text, self._logprobs.write(chunk.token_ids, chunk.scores))
        elif text:
            events = self._writer.text(text)
        return events + b"".join(self._writer.call(_call_delta(call)) for call in calls)


@dataclass(slots=True)
class WholeAnswer:
    """Gathers one answer."""

    answer: AnswerFormat
    index: int
    echo: str = ""
    """What it begins with."""
    _text: list[str] = field(default_factory=list)
    _calls: list[dict[str, Any]] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _scores: list[Any] = field(default_factory=list)
    _reader: CallReader | None = None
    _reason: FinishReason = FinishReason.STOP

    def __post_init__(self) -> None:
        self._reader = self.answer.reader()
        self._text.append(self.echo)

    def add(self, chunk: Chunk) -> None:
        for piece in _pieces(self._reader, chunk):
            if isinstance(piece, str):
                self._text.append(piece)
            else:
                self._add_call(piece)
        if chunk.scores:
            self._token_ids += chunk.token_ids
            self._scores += chunk.scores
        self._reason = chunk.finish_reason or self._reason

    def choice(self) -> dict[str, Any]:
        """The finished answer."""
        writer = self.answer.logprobs()
        text = "".join(self._text)
        content: dict[str, Any] = {"text": text}
        if self.answer.form is Form.CHAT:
            shown = text if text.strip() or not self._calls else None
            message: dict[str, Any] = {"role": "assistant", "content": shown, "refusal": None}
            content = {"message": message | ({"tool_calls": self._calls} if self._calls else {})}
        return {
            "index": self.index,
            **content,
            "logprobs": None if writer is None else writer.write(self._token_ids, self._scores),
            "finish_reason": self.answer.finish_reason(self._reason, len(self._calls)),
        }

    def _add_call(self, piece: CallPiece) -> None:
        if piece.name is None:
            self._calls[-1]["function"]["arguments"] += piece.arguments
        else:
            call = _call_delta(piece)
            del call["index"]
            self._calls.append(call)


def _pieces(reader: CallReader | None, chunk: Chunk) -> list[Piece]:
    if reader is None:
        return [chunk.text]
    pieces = reader.push(chunk.text)
    return pieces if chunk.finish_reason is None else pieces + reader.finish()


def _call_delta(piece: CallPiece) -> dict[str, Any]:
    """A part of a call, in OpenAI's form; the first part of each has its id and name."""
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
