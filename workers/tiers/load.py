"""Loading a prefix from L2 and the pool into L1, layer by layer, while the engine computes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from stratakv._native import Gate, make_gate
from stratakv.errors import StrataError
from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from stratakv.pool.dmp_client import ConnectionCache, DmpConnection
from stratakv.pool.errors import PageError, TransferCancelled, TransportError
from stratakv.pool.pages import PageReader, ReadPages
from stratakv.pool.transport import Cancellation
from stratakv.wire import Place, Segment
from workers.engine.connector import KVLoadError, Tier
from workers.tiers.window import Window

log = EventLogger("workers.tiers.load")


RUNS_AT_ONCE_MAX = 8
"""Transfers of one load that go on at the same time; a prefix in more pieces is read piece by piece, layer by layer."""


@dataclass(frozen=True, slots=True)
class FoundPage:
    """One block's page, as a lookup found it."""

    key: BlockKey
    place: Place
    segment: Segment
    tier: Tier


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What a finished load has to tell."""

    num_good_blocks: int
    bad_page: FoundPage | None
    """The page that was not what the index says."""
    seconds_by_tier: Mapping[Tier, float]
    """Spent on the pages of each tier."""


@dataclass(slots=True)
class _Run:
    """Consecutive pages of a load that lie on one daemon."""

    first: int
    connection: DmpConnection
    pages: ReadPages
    seconds: float
    """Spent on it till now."""


@dataclass(slots=True)
class LayerLoad:
    """A running load of consecutive blocks (a LoadJob). `num_layers` of every page, in order of layers.

    A page that is bad, or a daemon that fails, cuts the load short: no further layer is let through; the blocks before it are
    still loaded whole, and then `wait_layer` says how many they are.
    """

    pages: Sequence[FoundPage]
    window: Window
    num_layers: int
    timeout_s: float
    on_finished: Callable[[LoadOutcome], None]
    deadline: float = field(init=False)
    """So long after it began, or, as long as it waits for a thread, after `start`."""
    _arrived: Gate = field(default_factory=make_gate)
    """Opens behind each layer that every block of the load has; closed when the load has ended."""
    _num_good: int = 0
    _error: str = ""
    _bad_page: FoundPage | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Of what is good, and the error."""
    _cancellation: Cancellation = field(default_factory=Cancellation)
    _future: Future[None] | None = None

    def start(self, executor: Executor, reader: PageReader, connections: ConnectionCache) -> None:
        """Begin on one of the executor's threads."""
        self._num_good = len(self.pages)
        self.deadline = time.monotonic() + self.timeout_s
        self._future = executor.submit(self._run, reader, connections)

    def wait_layer(self, layer: int) -> None:
        """Return when the layer of every block is in L1 and verified. Raises KVLoadError."""
        if self._arrived.wait(layer + 1, self.deadline):
            return
        if not self._arrived.is_closed:
            self.cancel()
            raise KVLoadError("the pool did not deliver in time", 0)
        raise KVLoadError(self._error, self._num_good)

    def cancel(self) -> None:
        """Stop; on return nothing writes into L1 any more."""
        self._cancellation.cancel()
        if self._future is not None and not self._future.cancel():
            self._future.result()

    def _cut(self, num_good: int, error: str, bad_page: FoundPage | None = None) -> None:
        with self._lock:
            if num_good < self._num_good:
                self._bad_page = bad_page or self._bad_page
            self._num_good = min(self._num_good, num_good)
            self._error = self._error or error

    def _run(self, reader: PageReader, connections: ConnectionCache) -> None:
        runs: list[_Run] = []
        self.deadline = time.monotonic() + self.timeout_s
        try:
            pieces = _by_segment(self.pages)
            if self.window.is_l1 and len(pieces) <= RUNS_AT_ONCE_MAX:
                runs = self._read_at_once(pieces, reader, connections)
            if not runs and self._num_good:
                runs = self._open_runs(reader, connections)
            layer = self._arrived.open_layers
            while layer < self.num_layers and self._num_good:
                if all(self._read_run(run, layer, connections) for run in runs):
                    self._publish(layer)
                    layer += 1
        except TransferCancelled:
            self._cut(0, "the load was cancelled")
        except Exception as error:
            log.exception("load_failed")
            self._cut(0, f"the load failed: {error}")
        finally:
            self._arrived.close()
            self.on_finished(LoadOutcome(self._num_good, self._bad_page, self._seconds_by_tier(runs)))

    def _open_runs(self, reader: PageReader, connections: ConnectionCache) -> list[_Run]:
        """Connect, and read and check all headers; the load ends before the first page that has none."""
        runs: list[_Run] = []
        for first, stop in _by_segment(self.pages):
            pages = self.pages[first:stop]
            started = time.monotonic()
            try:
                connection = connections.get(pages[0].segment, deadline=self.deadline)
                found = reader.read_headers(
                    connection,
                    [page.place for page in pages],
                    [page.key for page in pages],
                    deadline=self.deadline,
                    cancellation=self._cancellation,
                )
            except TransferCancelled:
                raise
            except StrataError as error:
                self._cut(first, error.message)
                return runs
            if found.failures:
                bad = min(found.failures)
                self._cut(first + bad, str(found.failures[bad]), pages[bad])
                runs.append(_Run(first, connection, found.take(range(bad)), time.monotonic() - started))
                return runs
            runs.append(_Run(first, connection, found, time.monotonic() - started))
        return runs

    def _read_at_once(
        self, pieces: Sequence[tuple[int, int]], reader: PageReader, connections: ConnectionCache
    ) -> list[_Run]:
        """Each piece in one transfer, all at the same time; a layer is through when every piece has it.

        Empty if that did not end well.
        """
        if len(pieces) == 1:
            run = self._read_piece(*pieces[0], self._arrived, reader, connections)
            return [run] if run is not None else []
        gates = [make_gate() for _ in pieces]
        with ThreadPoolExecutor(len(pieces), thread_name_prefix="kv-load-piece") as threads:
            reading = [
                threads.submit(self._read_piece, first, stop, gate, reader, connections)
                for (first, stop), gate in zip(pieces, gates, strict=True)
            ]
            for layer in range(self.num_layers):
                if not all(gate.wait(layer + 1, self.deadline) for gate in gates):
                    break
                self._publish(layer)
        runs = [run for piece in reading if (run := piece.result()) is not None]
        return runs if len(runs) == len(pieces) else []

    def _read_piece(
        self, first: int, stop: int, arrived: Gate, reader: PageReader, connections: ConnectionCache
    ) -> _Run | None:
        """Headers and all layers of consecutive pages of one daemon; `arrived` opens behind each layer. None if it failed."""
        pages = self.pages[first:stop]
        started = time.monotonic()
        connection: DmpConnection | None = None
        try:
            connection = connections.get(pages[0].segment, deadline=self.deadline)
            read = reader.read(
                connection,
                [page.place for page in pages],
                [page.key for page in pages],
                self.window.memory.part(first, stop),
                deadline=self.deadline,
                done=arrived,
                cancellation=self._cancellation,
            )
        except PageError as error:
            # What comes before that page is read again, by itself.
            self._cut(first + error.index, str(error), pages[error.index])
        except TransferCancelled:
            raise
        except StrataError as error:
            if connection is not None and isinstance(error, TransportError):
                connections.drop(connection, error.message)
            self._cut(first, error.message)
        else:
            return _Run(first, connection, read, time.monotonic() - started)
        finally:
            if arrived is not self._arrived:
                arrived.close()
        return None

    def _read_run(self, run: _Run, layer: int, connections: ConnectionCache) -> bool:
        """One layer of what is still good of a run; False if less is good now."""
        count = min(len(run.pages), self._num_good - run.first)
        if count <= 0:
            return True
        pages = run.pages if count == len(run.pages) else run.pages.take(range(count))
        return self._read(run, pages, layer, connections)

    def _read(self, run: _Run, pages: ReadPages, layer: int, connections: ConnectionCache) -> bool:
        memory = self.window.memory.part(run.first, run.first + len(pages))
        started = time.monotonic()
        try:
            pages.read_layers([layer], memory, deadline=self.deadline, cancellation=self._cancellation)
        except PageError as error:
            bad = run.first + error.index
            self._cut(bad, str(error), self.pages[bad])
            return False
        except TransportError as error:
            connections.drop(run.connection, error.message)
            self._cut(run.first, error.message)
            return False
        finally:
            run.seconds += time.monotonic() - started
        return True

    def _seconds_by_tier(self, runs: Sequence[_Run]) -> dict[Tier, float]:
        """A daemon's pages of several tiers (its memory as L2, and as pool) share its time by their number."""
        seconds: dict[Tier, float] = {}
        for run in runs:
            tiers = Counter(page.tier for page in self.pages[run.first : run.first + len(run.pages)])
            for tier, count in tiers.items():
                seconds[tier] = seconds.get(tier, 0.0) + run.seconds * count / len(run.pages)
        return seconds

    def _publish(self, layer: int) -> None:
        self.window.publish(layer)
        if not self._error:
            self._arrived.open(layer + 1)


def _by_segment(pages: Sequence[FoundPage]) -> list[tuple[int, int]]:
    """Index ranges of consecutive pages on the same segment."""
    runs: list[tuple[int, int]] = []
    for index, page in enumerate(pages):
        if runs and pages[index - 1].segment == page.segment:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
