"""What the DB node asks of a worker, whoever made it. Two makers: `dbnode.worker_client` (ours), `dbnode.vllm.client` (vLLM).

Failures are sorted by what may be done about them: `WorkerUnreachable` (not seen by the worker), `WorkerRefused` (seen, not
done), `WorkerLost` (the worker went away with the request in hand); anything else is the answer that the client gets.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from dbnode.worker_messages import EndedRequest, WorkerChunk, WorkerFacts, WorkerRequest
from stratakv.wire import WorkerLoad


class WorkerStream(Protocol):
    """A running completion; closing it, at any time, cancels it in the worker."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None: ...

    def chunks(self) -> AsyncGenerator[WorkerChunk, None]:
        """Events until the worker says that it is done. Raises WorkerLost, or the error the worker reports."""
        ...


class WorkerDoor(Protocol):
    """Connections to workers, which are known by their URLs. Used from one event loop."""

    async def close(self) -> None: ...

    async def stream(self, url: str, request: WorkerRequest, deadline_s: float) -> WorkerStream:
        """Start a completion. Raises what the module's docstring says; the caller limits how long that may take."""
        ...

    async def info(self, url: str, timeout_s: float) -> WorkerFacts:
        """Who the worker is. Raises WorkerUnreachable."""
        ...

    async def check_ready(self, url: str, timeout_s: float) -> None:
        """Return if the worker takes requests. Raises WorkerUnreachable while it is warming up or cannot be reached."""
        ...

    async def load(self, url: str, timeout_s: float) -> WorkerLoad:
        """How busy the worker is. Raises WorkerUnreachable."""
        ...

    async def ended_requests(self, url: str, request_ids: Sequence[str], timeout_s: float) -> list[EndedRequest]:
        """What the worker has written down of these requests. Raises WorkerUnreachable or what the worker says."""
        ...

    async def drop_cache(self, url: str, body: bytes, timeout_s: float) -> dict[str, Any]:
        """Make a worker forget tiers. Raises WorkerUnreachable or what the worker says."""
        ...
