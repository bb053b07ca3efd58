"""Calls of tools in an answer's text, found while it grows. Protocol code: text in, pieces out.

Two ways in which models write a call by themselves are known: `<tool_call>{"name": …, "arguments": …}</tool_call>`, anywhere, and
the bare object in the place of an answer (with `arguments` or `parameters`). Required calls come as a list of such objects, a
named one as its arguments alone. What turns out to be no call is text.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dbnode.rest.tools import ToolMode, ToolUse
from stratakv.chat_messages import CALL_BEGIN, CALL_END


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of a call. The first of each has the function's name; a call that the model decided on comes whole."""

    index: int
    """Which of the answer's calls."""
    name: str | None
    arguments: str


_BETWEEN_OBJECTS = " \t\r\n;,"

Piece = str | CallPiece
"""Text to show, or a part of a call."""


class CallReader:
    """Reads one answer. All pieces of all `push`es and `finish` together are the answer."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._reader: _Auto | _Required | None = None
        if use.mode is ToolMode.AUTO:
            self._reader = _Auto(frozenset(function["name"] for function in use.functions))
        elif use.mode is ToolMode.REQUIRED:
            self._reader = _Required()
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """The answer's next text; what can be told by now."""
        if self._reader is None:
            return [self._named(text)] if text else []
        return list(self._numbered(self._reader.push(text)))

    def finish(self) -> list[Piece]:
        """There is no more."""
        return [] if self._reader is None else list(self._numbered(self._reader.finish()))

    def _named(self, text: str) -> CallPiece:
        name = None if self.num_calls else self._use.functions[0]["name"]
        self.num_calls = 1
        return CallPiece(0, name, text)

    def _numbered(self, found: Iterator[str | _Call]) -> Iterator[Piece]:
        for piece in found:
            if isinstance(piece, str):
                if piece:
                    yield piece
            elif self._use.is_parallel or not self.num_calls:
                yield CallPiece(self.num_calls, piece.name, piece.arguments)
                self.num_calls += 1


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: str


def _call_of(text: str) -> _Call | None:
    """The call that a JSON object says, if it does."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return _Call(value["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return _Call(value["name"], json.dumps(arguments, ensure_ascii=False))


class _Objects:
    """Finds the JSON objects that stand side by side in a growing text."""

    def __init__(self) -> None:
        self._held: list[str] = []
        """The object that has begun."""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def is_inside(self) -> bool:
        """An object has begun and not ended."""
        return self._depth > 0

    def push(self, text: str) -> tuple[str | None, str]:
        """The next object if it ends in `text`, and what of `text` comes after it. What stands between objects is dropped."""
        begin = 0
        for index, character in enumerate(text):
            if self._in_string:
                self._step_in_string(character)
            elif character == '"':
                self._in_string = self._depth > 0
            elif character == "{":
                if not self._depth:
                    begin = index
                self._depth += 1
            elif character == "}" and self._depth:
                self._depth -= 1
                if not self._depth:
                    whole = "".join([*self._held, text[begin : index + 1]])
                    self._held.clear()
                    return whole, text[index + 1 :]
        if self._depth:
            self._held.append(text[begin:])
        return None, ""

    def _step_in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False

    def unfinished(self) -> str:
        return "".join(self._held)


class _Required:
    """A list of calls, which the answer was held to."""

    def __init__(self) -> None:
        self._objects = _Objects()

    def push(self, text: str) -> Iterator[str | _Call]:
        while text:
            whole, text = self._objects.push(text)
            if whole is not None and (call := _call_of(whole)) is not None:
                yield call

    def finish(self) -> Iterator[str | _Call]:
        """A call that was cut off is shown as text, since its arguments are nothing to act on."""
        if text := self._objects.unfinished():
            yield text


class _At(enum.Enum):
    """Where in an answer the reader is."""

    BEGIN = enum.auto()
    """Nothing but white space so far."""
    TEXT = enum.auto()
    TAGGED = enum.auto()
    """After the tag that begins a call."""
    BARE = enum.auto()
    """In an object that the answer began with, or between two of them."""


class _Auto:
    """An answer in which the model may call, or not."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._at = _At.BEGIN
        self._held = ""
        self._lead = ""
        """White space before an object that the answer began with."""
        self._objects = _Objects()
        self._after_call = False

    def push(self, text: str) -> Iterator[str | _Call]:
        self._held += text
        before = None
        while before != (self._at, len(self._held)):
            before = (self._at, len(self._held))
            yield from self._step()

    def finish(self) -> Iterator[str | _Call]:
        held, self._held = self._held, ""
        if self._at is _At.TAGGED:
            yield self._tagged(held, "")
        elif self._at is _At.BARE:
            yield self._take_lead() + self._objects.unfinished() + held
        elif not self._after_call or held.strip():
            yield held

    def _step(self) -> Iterator[str | _Call]:
        match self._at:
            case _At.BEGIN:
                begun = self._held.lstrip()
                if begun.startswith("{"):
                    self._lead, self._held = self._held[: -len(begun)], begun
                    self._at = _At.BARE
                elif begun:
                    self._at = _At.TEXT
            case _At.TEXT:
                yield from self._text()
            case _At.TAGGED:
                inner, end, rest = self._held.partition(CALL_END)
                if end:
                    self._held, self._at, self._after_call = rest, _At.TEXT, True
                    yield self._tagged(inner, end)
            case _At.BARE:
                yield from self._bare()

    def _text(self) -> Iterator[str | _Call]:
        shown, begin, rest = self._held.partition(CALL_BEGIN)
        if begin:
            self._held, self._at = rest, _At.TAGGED
            if shown.strip() or not self._after_call:
                yield shown
            self._after_call = False
            return
        size = _overlap(self._held, CALL_BEGIN)
        shown = self._held[: len(self._held) - size]
        if self._after_call and not shown.strip():
            return  # white space between calls is no answer
        self._held = self._held[len(shown) :]
        self._after_call = False
        if shown:
            yield shown

    def _bare(self) -> Iterator[str | _Call]:
        held, self._held = self._held, ""
        if self._after_call and not self._objects.is_inside:
            held = held.lstrip(_BETWEEN_OBJECTS)
            if held and not held.startswith("{"):
                self._held, self._at = held, _At.TEXT
                return
        whole, self._held = self._objects.push(held)
        if whole is None:
            return
        call = _call_of(whole)
        if call is None or call.name not in self._names:
            self._held, self._at = self._take_lead() + whole + self._held, _At.TEXT
            return
        self._after_call, self._lead = True, ""
        yield call

    def _take_lead(self) -> str:
        lead, self._lead = self._lead, ""
        return lead

    def _tagged(self, inner: str, end: str) -> str | _Call:
        return _call_of(inner) or f"{CALL_BEGIN}{inner}{end}"


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)
