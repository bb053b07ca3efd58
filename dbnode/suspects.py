"""Requests that may be what kills workers, and prompts that were.

A worker that dies takes its whole batch with it, of which only one request need be the cause. So requests that saw a worker
die are retried one at a time on each worker, until their first token: the one that a second worker then dies of is the cause.
Its prompt is remembered for a while and refused at once. Owned by `dbnode.inference`, used by `dbnode.dispatch`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NewType

from dbnode.errors import PoisonPrompt
from dbnode.scheduler.planner import PromptKeys
from stratakv.errors import DeadlineExceeded
from stratakv.log import EventLogger

log = EventLogger("dbnode.suspects")

PROMPTS_MAX = 10_000
STRIKES_MAX = 2
"""Of prompts that had got a token when their second worker died: others may have been the cause."""

PromptId = NewType("PromptId", bytes)


def prompt_id(keys: PromptKeys) -> PromptId:
    """Equal for equal prompts with the same salt."""
    salt = b"" if keys.cache_salt is None else b"+" + keys.cache_salt.encode()
    digest = hashlib.sha256(len(salt).to_bytes(8, "big") + salt)
    digest.update(array("q", keys.token_ids).tobytes())
    return PromptId(digest.digest())


@dataclass(slots=True)
class _Ward:
    """The suspects on one worker."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one that has no token yet."""
    present: list[Trial] = field(default_factory=list)
    num_users: int = 0
    """Those who wait for their turn included."""


@dataclass(slots=True, eq=False)
class Trial:
    """One suspect on one worker."""

    ward: _Ward
    is_passed: bool = False
    is_cleared: bool = False
    """The worker died of another one."""

    def passed(self) -> None:
        """It has got a token, or has ended: the next one may come. Safe to repeat."""
        if not self.is_passed:
            self.is_passed = True
            self.ward.turn.release()


@dataclass(slots=True)
class _Known:
    strikes: int
    until_s: float


class Suspects:
    """Trials by worker, and the prompts that did not pass; used from one event loop.

    At most PROMPTS_MAX prompts are remembered, each for `remembered_s`; 0: none.
    """

    def __init__(self, remembered_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._remembered_s = remembered_s
        self._clock = clock
        self._wards: dict[str, _Ward] = {}
        self._known: OrderedDict[PromptId, _Known] = OrderedDict()
        """The one that is forgotten next comes first."""

    @property
    def num_remembered(self) -> int:
        """Prompts that are refused now."""
        self._forget()
        return sum(known.strikes >= STRIKES_MAX for known in self._known.values())

    def check(self, prompt: PromptId) -> None:
        """Raises PoisonPrompt."""
        self._forget()
        known = self._known.get(prompt)
        if known is not None and known.strikes >= STRIKES_MAX:
            raise PoisonPrompt(
                "workers died of this prompt",
                hint=f"It is taken again in {known.until_s - self._clock():.0f} s; the workers' logs say why they died.",
            )

    def is_cause(self, prompt: PromptId, trial: Trial | None) -> bool:
        """Whether a second worker has died of this prompt, which it had in hand, as far as can be told; it is remembered then."""
        if trial is not None and (trial.is_cleared or (trial.is_passed and trial.ward.turn.locked())):
            return False
        is_certain = trial is not None and not trial.is_passed
        for other in trial.ward.present if trial is not None and is_certain else ():
            other.is_cleared = other is not trial
        self._remember(prompt, STRIKES_MAX if is_certain else 1)
        return True

    @asynccontextmanager
    async def trial(self, url: str, deadline_s: float) -> AsyncIterator[Trial]:
        """Wait for a suspect's turn on a worker. Raises DeadlineExceeded."""
        ward = self._wards.setdefault(url, _Ward())
        ward.num_users += 1
        try:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await ward.turn.acquire()
            except TimeoutError:
                raise DeadlineExceeded("the request's deadline passed while others were tried") from None
            trial = Trial(ward)
            ward.present.append(trial)
            try:
                yield trial
            finally:
                trial.passed()
                ward.present.remove(trial)
        finally:
            ward.num_users -= 1
            if not ward.num_users:
                del self._wards[url]

    def _remember(self, prompt: PromptId, strikes: int) -> None:
        if not self._remembered_s:
            return
        known = self._known.pop(prompt, _Known(0, 0.0))
        known = self._known[prompt] = _Known(known.strikes + strikes, self._clock() + self._remembered_s)
        log.warning("prompt_killed_workers", prompt=prompt.hex()[:16], is_refused=known.strikes >= STRIKES_MAX)
        while len(self._known) > PROMPTS_MAX:
            self._known.popitem(last=False)

    def _forget(self) -> None:
        now_s = self._clock()
        while self._known and next(iter(self._known.values())).until_s <= now_s:
            self._known.popitem(last=False)
