"""One request in the engine, seen from the event loop: events in order, ended by exactly one `Finished` or an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from stratakv.errors import Cancelled, DeadlineExceeded, StrataError
from stratakv.keys import BlockKey
from stratakv.text import Detokenizer
from workers.engine.requests import EngineEvent, FinishedEvent, FinishReason, RequestUsage, TokenEvent
from workers.handover.outgoing import Outgoing


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens, and the text that may be shown by now."""

    text: str
    token_ids: list[int]
    scored: tuple[TokenEvent, ...] = ()
    """The same tokens with their log-probabilities, if the request asks for them."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: OpenAI's finish reason (`stop`, `length`) and what the request took."""

    reason: str
    usage: RequestUsage


class Generation:
    """Turns engine events into text, in order.

    What is queued is bounded by max_tokens. `cancel` may be called at any time and more than once.
    """

    def __init__(
        self,
        prompt_keys: Sequence[BlockKey],
        detokenizer: Detokenizer,
        cancel: Callable[[], None],
        followed: Outgoing | None = None,
    ) -> None:
        self.prompt_keys = prompt_keys
        self.followed = followed
        """Another worker is told of what becomes of it."""
        self.token_ids: list[int] = []
        """Told till now."""
        self._detokenizer = detokenizer
        self._cancel = cancel
        self._queue: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._ended = False

    def take(self, event: EngineEvent) -> None:
        """The engine's next event, on the event loop."""
        self._queue.put_nowait(event)

    def cancel(self) -> None:
        """Stop the request unless it has ended."""
        if not self._ended:
            self._ended = True
            self._cancel()

    async def events(self) -> AsyncIterator[Delta | Finished]:
        """Deltas, then one Finished. Raises the engine's error instead, Cancelled or DeadlineExceeded."""
        stopped = False
        while True:
            event = await self._queue.get()
            if isinstance(event, TokenEvent):
                if stopped:
                    continue
                text = self._detokenizer.push([event.token_id])
                stopped = self._detokenizer.stopped
                if stopped:
                    self._cancel()
                self.token_ids.append(event.token_id)
                yield Delta(text, [event.token_id], () if event.logprob is None else (event,))
                continue
            self._ended = True
            if not stopped:
                _raise_failure(event)
                rest = self._detokenizer.finish()
                if rest:
                    yield Delta(rest, [])
            yield Finished("stop" if stopped else event.reason.value, event.usage)
            return


def _raise_failure(event: FinishedEvent) -> None:
    if event.reason is FinishReason.ERROR:
        raise event.error or StrataError("the engine failed without saying why")
    if event.reason is FinishReason.CANCELLED:
        raise Cancelled("the request was cancelled")
    if event.reason is FinishReason.DEADLINE:
        raise DeadlineExceeded("the request's deadline passed")
