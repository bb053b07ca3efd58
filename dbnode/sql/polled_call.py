"""A call that PostgreSQL polls for, over one connection of the private listener.

Every poll is answered within HOLD_S, so that PostgreSQL can look for a cancel or a timeout in between. A call that is not polled
again is nobody's any more and is stopped. Owned by `ListenerConnection`; at most one call runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from dbnode.sql.commands import Status, answer_reply, reply
from stratakv.errors import Cancelled, StrataError

HOLD_S = 0.15
"""Longest wait before `wait` is answered."""
ABANDON_S = 0.2
"""A call that is not polled for so long is stopped …"""
ABANDON_SURE_S = 0.05
"""… after another look so much later: the poll may lie unread in a busy process."""


class PolledCall:
    """Runs one call after the other and answers the polls for it."""

    def __init__(self, write: Callable[[bytes], None], tasks: set[asyncio.Task[str]]) -> None:
        self._write = write
        self._tasks = tasks
        """Of all connections: what runs, also when nobody waits for it any more."""
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[str] | None = None
        self._pid: int | None = None
        self._is_asked = False
        """PostgreSQL waits for our answer now."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """Backend whose call runs."""
        return self._pid if self._task is not None else None

    def start(self, work: Coroutine[None, None, str], pid: int) -> None:
        """The command is the first poll."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._on_done)
        self._task, self._pid = task, pid
        self.poll()

    def poll(self) -> None:
        """Answer now, or as soon as there is something to say."""
        if self._task is None:
            self._write(reply(Status.GONE))
        elif self._task.done():
            self._answer(self._task)
        else:
            self._is_asked = True
            self._set_timer(HOLD_S, self.answer_wait)

    def answer_wait(self, status: Status = Status.WAIT) -> None:
        """Nothing yet: PostgreSQL is to ask again."""
        self._is_asked = False
        self._write(reply(status))
        self._set_timer(ABANDON_S, self._suspect)

    def answer_error(self, error: StrataError) -> None:
        self._is_asked = False
        self._set_timer(None)
        self._write(reply(Status.ERROR, error=error))

    def interrupt(self) -> None:
        """Stop the call, and let PostgreSQL look for its cancel at once."""
        if self._task is not None:
            self._task.cancel()
            if self._is_asked:
                self.answer_wait()

    def end(self) -> None:
        """Nobody waits for the call any more."""
        if self._task is not None:
            if self._is_asked:
                self._write(reply(Status.GONE))
            self.drop()

    def drop(self) -> None:
        """Stop the call; its poll, if there is one, is answered by something else."""
        self._set_timer(None)
        self._is_asked = False
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    def _on_done(self, task: asyncio.Task[str]) -> None:
        if task is self._task and self._is_asked:
            self._answer(task)
        elif task is not self._task and not task.cancelled():
            task.exception()  # nobody waits for it any more

    def _answer(self, task: asyncio.Task[str]) -> None:
        self._task = None
        if task.cancelled():
            self.answer_error(Cancelled("the inference was cancelled"))
        elif (error := task.exception()) is not None:
            self.answer_error(error if isinstance(error, StrataError) else StrataError("internal error"))
        else:
            self._is_asked = False
            self._set_timer(None)
            self._write(answer_reply(task.result()))

    def _suspect(self) -> None:
        self._set_timer(ABANDON_SURE_S, self.drop)

    def _set_timer(self, delay_s: float | None, action: Callable[[], None] | None = None) -> None:
        """At most one timer runs."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if delay_s is None or action is None else self._loop.call_later(delay_s, action)
