"""What the gateway learns of one statement's infer() calls before PostgreSQL makes them: collected, sent, answered.

While a pass runs, the private listener gives every call here and hands back what is known, or NULL. When the statement itself
runs it finds the answers. Only speed depends on it: what is not here is asked for as ever.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from dbnode.charge import Charge
from dbnode.sql.commands import Infer
from dbnode.sql.memo import Hint, Key, TransactionMemo, is_repeatable, key_of
from dbnode.sql.row_prompt import ordered_texts
from dbnode.sql.service import InferenceService
from dbnode.sql.statement_meter import StatementBook
from dbnode.sql.written_calls import SITE_OPTION, UNNUMBERED
from stratakv.errors import Cancelled, StrataError
from stratakv.log import EventLogger

log = EventLogger(__name__)

IN_FLIGHT_MAX = 64
"""Inferences of one statement at a time."""
ORDER_INLINE_FIELDS_MAX = 1000
"""More are put in order beside the event loop."""


class PassEnded(StrataError):
    """A collect pass has seen what it may; the gateway's own statement ends by it, never a client's."""

    sqlstate = "SKV01"


@dataclass(slots=True)
class HintStats:
    """Counters of all statements."""

    passes: int = 0
    distinct: int = 0
    """Inferences sent before their statement ran."""
    consumed: int = 0
    """Those that the statement asked for."""
    wasted: int = 0
    """Those that it did not."""


@dataclass(frozen=True, slots=True)
class PassLimits:
    """Where a pass ends."""

    window: int | None
    """New prompts; None for as many as there are."""
    bytes_max: int
    """Of all prompts of the statement."""
    deadline_s: float
    """On the event loop's clock."""


class StatementHints:
    """Of one statement. Its owner is `SessionHints`, which closes it when the statement has ended."""

    def __init__(
        self,
        service: InferenceService,
        session: str,
        stats: HintStats,
        tasks: set[asyncio.Task[str]],
        num_free: Callable[[], int],
        book: StatementBook,
        memo: TransactionMemo,
    ) -> None:
        self.is_collecting = False
        self.is_unnumbered = False
        """PostgreSQL does not take the SELECT whose calls carry numbers."""
        self.is_planning = False
        """The statement is only planned: no call of it is answered."""
        self.is_streaming = False
        """Rows go to the client while the model still works: what a pass finds is sent at once, in its order."""
        self.is_lasting = False
        """Later statements of the transaction ask on: FETCH, or the next part of a portal."""
        self.failure: StrataError | None = None
        """What every further call of the statement fails by, once the client has cancelled it."""
        self._service = service
        self._session = session
        self._stats = stats
        self._tasks = tasks
        self._num_free = num_free
        self._book = book
        self._own: set[asyncio.Task[str]] = set()
        self._memo = memo
        self.found: list[Hint] = []
        """What the passes have put into the memo."""
        self._new: dict[Key, Hint] = {}
        """Found by the pass that runs."""
        self._num_again = 0
        """Calls of the pass that runs whose prompts an earlier one found."""
        self._governors: Mapping[int, frozenset[int]] = {}
        self._first_seen: dict[int, int] = {}
        """When each call site was first asked for."""
        self._unknown: set[int] = set()
        """Call sites that the pass that runs has answered by NULL for want of an answer."""
        self._put_off: dict[Key, Hint] = {}
        """Found by the pass that runs, because of such a NULL."""
        self._pass_started_s = 0.0
        self._queue: deque[Hint] = deque()
        self._size_bytes = 0
        self._limits = PassLimits(None, 0, 0.0)

    # Passes

    def start_pass(self, limits: PassLimits, governors: Mapping[int, frozenset[int]] | None = None) -> None:
        """`governors` are told of a SELECT whose calls carry their numbers: the calls that decide about a call."""
        self._limits = limits
        self._governors = governors or {}
        self._new, self._put_off = {}, {}
        self._unknown = set()
        self._num_again = 0
        self._pass_started_s = asyncio.get_running_loop().time()
        self.is_collecting = True
        self._stats.passes += 1

    def collect(self, command: Infer) -> str | None:
        """The answer for a call of a pass, None while it has none. Raises PassEnded."""
        if self.failure is not None or asyncio.get_running_loop().time() > self._limits.deadline_s:
            raise PassEnded("the time for looking ahead is over")
        site, command = _numbered(command)
        self._first_seen.setdefault(site, len(self._first_seen))
        if not is_repeatable(command):
            return self._stand_in(command)
        key = key_of(command)
        if (hint := self._memo.find(key)) is not None:
            self._num_again += 1
            if not hint.future.done():
                self._unknown.add(site)
            return hint.answer if hint.answer is not None else self._stand_in(command)
        if key not in self._new:
            self._add(key, command, self._put_off if self._is_undecided(site) else self._new)
        if key in self._new:
            self._unknown.add(site)
        return self._stand_in(command)

    @staticmethod
    def _stand_in(command: Infer) -> None:
        """NULL, for the author of the statement. Other functions may decide by it who sees what. Raises PassEnded."""
        if command.is_within:
            raise PassEnded("a function waits for this answer")

    def _is_undecided(self, site: int) -> bool:
        """Whether a call may be made only because NULL stood for another's answer, which was asked for first."""
        if not self._unknown or site not in self._governors:
            return False
        mine = self._first_seen[site]
        return any(self._first_seen[other] < mine for other in self._governors[site] & self._unknown)

    def _add(self, key: Key, command: Infer, found: dict[Key, Hint]) -> None:
        """Raises PassEnded."""
        if key in found:
            return
        window = self._limits.window
        size_bytes = self._size_bytes + len(command.prompt.encode())
        if (window is not None and len(found) >= window) or size_bytes > self._limits.bytes_max:
            raise PassEnded("enough prompts have been seen")
        self._size_bytes = size_bytes
        call = replace(command.call(self._session), charge=Charge())
        hint = found[key] = Hint(key, call, self._future(), command.row)
        if self.is_streaming and self._memo.put(hint):
            self.found.append(hint)
            self._send([hint])

    async def end_pass(self, order_budget_s: float) -> int:
        """How many prompts it found that are new; they are sent now, those with common beginnings in a row.

        The fields of rows are put in order first, for so long at most; with no time for it all stands as it was found.
        """
        self.is_collecting = False
        if self.is_streaming:
            return len(self._new)  # they have been sent
        if self._put_off:
            self._decide_put_off()
        if self.found and not self._num_again:
            return 0  # the prompts are others each time: now() may be in them
        new = [hint for hint in self._new.values() if self._memo.put(hint)]
        self.found += new
        if order_budget_s:
            await self._order_fields(order_budget_s)
            new.sort(key=_place)
        if self.failure is not None or not await self._reserve(new):
            return 0
        self._send(new)
        return len(new)

    async def _reserve(self, new: list[Hint]) -> bool:
        """Room for all of them in the quota of their tenant; else none is sent.

        Then the statement fails before anything is charged, unless it may stop before it needs them all: it goes on call by call.
        """
        if not new:
            return True
        try:
            calls = await self._service.reserve([hint.call for hint in new])
        except StrataError as error:
            self._memo.drop_unanswered(new)
            self.found = [hint for hint in self.found if hint not in new]
            if self._limits.window is None:
                self.abort(error)
            return False
        for hint, call in zip(new, calls, strict=True):
            hint.call = call
        return True

    def _send(self, new: list[Hint]) -> None:
        self._stats.distinct += len(new)
        self._book.found(self._session, len(new))
        self._queue.extend(new)
        free = min(IN_FLIGHT_MAX - len(self._own), self._num_free(), len(self._queue))
        for _ in range(free):
            task = asyncio.get_running_loop().create_task(self._work())
            for tasks in (self._own, self._tasks):
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    async def _order_fields(self, budget_s: float) -> None:
        """Let the rows among the new prompts begin alike."""
        hints = [(hint, hint.row) for hint in self._new.values() if hint.row is not None]
        rows = [row for _, row in hints]
        if sum(len(row.fields) for row in rows) > ORDER_INLINE_FIELDS_MAX:
            texts = await asyncio.to_thread(ordered_texts, rows, budget_s)
        else:
            texts = ordered_texts(rows, budget_s)
        for (hint, _), text in zip(hints, texts, strict=True):
            hint.call = replace(hint.call, prompt=text)

    def _decide_put_off(self) -> None:
        """The next pass finds them again, if they are needed. Without time for one, some too many are sent."""
        now_s = asyncio.get_running_loop().time()
        if now_s + (now_s - self._pass_started_s) < self._limits.deadline_s:
            self._size_bytes -= sum(len(hint.call.prompt.encode()) for hint in self._put_off.values())
        else:
            self._new |= self._put_off
        self._put_off = {}

    async def settle(self, timeout_s: float | None) -> bool:
        """Wait for what has been sent; False if that takes longer, or the DB node is full."""
        if self._own:
            with self._book.waiting(self._session):
                await asyncio.wait(set(self._own), timeout=timeout_s)
        return not self._own and not self._queue

    async def _work(self) -> str:
        """One of the tasks that answer what is queued."""
        while self._queue:
            hint = self._queue.popleft()
            if not hint.is_started:
                await self._run(hint)
        return ""

    async def _run(self, hint: Hint) -> None:
        hint.is_started = True
        try:
            hint.future.set_result(await self._service.infer_text(hint.call))
            self._memo.answered(hint)
        except asyncio.CancelledError:
            hint.future.cancel()
            raise
        except Exception as error:
            if not isinstance(error, StrataError):
                log.exception("hint_failed", session=self._session)
            hint.future.set_exception(error)
            hint.future.exception()  # it may never be asked for

    # The statement itself

    def find(self, command: Infer) -> Hint | None:
        """What is known or under way for a call, or is now; None if it is not to be shared.

        Raises the error of a cancelled statement.
        """
        if self.failure is not None:
            raise self.failure
        if not is_repeatable(command):
            return None
        key = key_of(command)
        hint = self._memo.find(key)
        if hint is None or hint.future.cancelled():
            hint = Hint(key, command.call(self._session), self._future(), command.row, is_ahead=False)
            if not self._memo.put(hint):
                return None
        if not hint.is_consumed:
            hint.consume()
            self._stats.consumed += hint.is_ahead
        return hint

    @staticmethod
    def _future() -> asyncio.Future[str]:
        return asyncio.get_running_loop().create_future()

    async def answer(self, hint: Hint) -> str:
        """What the statement gets for a hint. What failed for want of room or of a worker is tried again alone."""
        is_ours = not hint.is_started
        try:
            if is_ours:
                await self._run(hint)  # the statement waits for this one: it does not queue behind the others
            return await asyncio.shield(hint.future)
        except asyncio.CancelledError:
            if is_ours or not hint.future.cancelled():
                raise  # it is the call that is cancelled
            raise self.failure or Cancelled("the inference was cancelled") from None
        except StrataError as error:
            if is_ours or not error.retryable:
                raise
        finally:
            if not hint.is_ahead:
                self._memo.drop_unanswered([hint])
        return await self._service.infer_text(hint.call)

    def abort(self, failure: StrataError) -> None:
        """The client has cancelled the statement, or its time is over: every further call fails."""
        self.failure = failure
        self._stop()

    def close(self) -> None:
        """The statement has ended."""
        self._stop()
        self._stats.wasted += self._memo.drop_unanswered(self.found)

    def _stop(self) -> None:
        self._queue.clear()
        for task in tuple(self._own):
            task.cancel()


def _numbered(command: Infer) -> tuple[int, Infer]:
    """The number that a call of a pass carries, and the call without it."""
    site = command.options.get(SITE_OPTION)
    if type(site) is not int:
        return UNNUMBERED, command
    return site, replace(command, options={k: v for k, v in command.options.items() if k != SITE_OPTION})


def _place(hint: Hint) -> tuple[int, str, str, str]:
    """Sorts hints: what is urgent first, then what begins alike together."""
    call = hint.call
    priority, system = call.options.get("priority"), call.options.get("system")
    return priority if isinstance(priority, int) else 0, call.model or "", str(system or ""), call.prompt
