"""Answers that a transaction has got or has asked for, so that it asks once: by prompt and all else that decides about them.

Each session has one memo, emptied when its transaction ends. The answers of a transaction that failed are kept for a while in
one place of the whole DB node: a retry finds them. Nothing is in either that is drawn by lot, or asks not to be shared.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from dbnode.sql.commands import Infer
from dbnode.sql.row_prompt import RowPrompt
from dbnode.sql.service import InferCall, Login

Key: TypeAlias = tuple[Login | None, str, str, str | None, str, str, RowPrompt | None]
"""Login, role, database, model, options, prompt, and the row it is made of."""


@dataclass(slots=True, eq=False)
class Hint:
    """One prompt, and its answer when there is one."""

    key: Key
    call: InferCall
    future: asyncio.Future[str]
    row: RowPrompt | None = None
    is_ahead: bool = True
    """A pass has found it, and no call of a statement yet."""
    is_started: bool = False
    is_consumed: bool = False

    def consume(self) -> None:
        """A statement has asked for it."""
        self.is_consumed = True
        if self.call.charge is not None:
            self.call.charge.decide(True)

    def is_wasted(self) -> bool:
        """Whether it was found in vain, now that its transaction has ended or forgotten it; it is not charged then."""
        if not self.is_ahead or self.is_consumed:
            return False
        if self.call.charge is not None:
            self.call.charge.decide(False)
        return True

    @property
    def answer(self) -> str | None:
        """None while there is none."""
        future = self.future
        return future.result() if future.done() and not future.cancelled() and future.exception() is None else None

    @property
    def size_bytes(self) -> int:
        *_, prompt, _ = self.key  # that of the call may still be put in another order
        return len(prompt.encode()) + len((self.answer or "").encode())


@dataclass(frozen=True, slots=True)
class MemoLimits:
    """Of one transaction's memo, and again of all that is kept of failed ones."""

    entries_max: int
    bytes_max: int
    """Prompts and answers."""
    ttl_s: float
    """How long the answers of a failed transaction are kept."""


def is_repeatable(command: Infer) -> bool:
    """Whether two equal calls may share one answer: not if it is drawn by lot."""
    options = command.options
    if options.get("dedupe") is False:
        return False
    return not options.get("temperature") or options.get("seed") is not None


def key_of(command: Infer) -> Key:
    options = json.dumps(command.options, sort_keys=True) if command.options else ""
    return command.login, command.role, command.database, command.model, options, command.prompt, command.row


class KeptAnswers:
    """What failed transactions have got, for their retries. The oldest make room."""

    def __init__(self, limits: MemoLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock = clock
        self._kept: dict[Key, tuple[Hint, float]] = {}
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Hint | None:
        found = self._kept.get(key)
        return found[0] if found is not None and found[1] > self._clock() else None

    def put(self, hint: Hint) -> None:
        """`hint` has its answer."""
        self._forget(hint.key)
        self._kept[hint.key] = hint, self._clock() + self.limits.ttl_s
        self._size_bytes += hint.size_bytes
        self.trim()

    def trim(self) -> None:
        """Forget what is too old or too much."""
        now_s, limits = self._clock(), self.limits
        while self._kept:
            oldest = next(iter(self._kept))
            is_over = len(self._kept) > limits.entries_max or self._size_bytes > limits.bytes_max
            if not is_over and self._kept[oldest][1] > now_s:
                return
            self._forget(oldest)

    def _forget(self, key: Key) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self._size_bytes -= found[0].size_bytes


class TransactionMemo:
    """What one transaction has got, or has asked for."""

    def __init__(self, kept: KeptAnswers) -> None:
        self._kept = kept
        self._hints: dict[Key, Hint] = {}
        self._size_bytes = 0

    def find(self, key: Key) -> Hint | None:
        hint = self._hints.get(key)
        return hint if hint is not None else self._kept.get(key)

    def put(self, hint: Hint) -> bool:
        """False if there is no room for it. What statements have used already makes room, the oldest first."""
        limits, size_bytes = self._kept.limits, hint.size_bytes
        while len(self._hints) >= limits.entries_max or self._size_bytes + size_bytes > limits.bytes_max:
            oldest = next(iter(self._hints), None)
            if oldest is None or not self._hints[oldest].is_consumed:
                return False
            self._drop(oldest)
        self._drop(hint.key)
        self._hints[hint.key] = hint
        self._size_bytes += size_bytes
        return True

    def answered(self, hint: Hint) -> None:
        """The size of a hint has grown by its answer."""
        if self._hints.get(hint.key) is hint:
            self._size_bytes += len((hint.answer or "").encode())

    def drop_unanswered(self, hints: Iterable[Hint]) -> int:
        """Forget those that failed or were stopped; how many of them were found in vain."""
        dropped = [hint for hint in hints if hint.answer is None and self._hints.get(hint.key) is hint]
        for hint in dropped:
            self._drop(hint.key)
        return sum(hint.is_wasted() for hint in dropped)

    def _drop(self, key: Key) -> None:
        hint = self._hints.pop(key, None)
        if hint is not None:
            self._size_bytes -= hint.size_bytes

    def end(self, *, failed: bool) -> int:
        """The transaction has ended; how many of its answers were found in vain."""
        hints, self._hints, self._size_bytes = self._hints, {}, 0
        wasted = sum(hint.is_wasted() for hint in hints.values())
        if failed and self._kept.limits.ttl_s > 0:
            for hint in hints.values():
                if hint.answer is not None:
                    hint.is_ahead = False  # it is counted
                    self._kept.put(hint)
        return wasted
