"""Loads from the pool into vLLM's KV tensors: of one request, one part for each group of layers, each on a thread of its own.

A part is consecutive blocks. A page that is bad, or a daemon that fails, cuts it: the blocks before it still come whole, the
others are reported to vLLM, which computes them. Nothing counts as loaded before its checksum was verified.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

from stratakv._native import Gate, make_gate
from stratakv.errors import StrataError
from stratakv.integrations.vllm.group_pages import GroupPages
from stratakv.integrations.vllm.orders import GroupLoad, LoadOrder, RankHit
from stratakv.integrations.vllm.windows import Window
from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from stratakv.pool.dmp_client import ConnectionCache, DmpConnection
from stratakv.pool.errors import PageError, TransferCancelled, TransportError
from stratakv.pool.pages import ReadPages
from stratakv.pool.transport import Cancellation
from stratakv.wire import Place

log = EventLogger("stratakv.vllm.loads")


@dataclass(slots=True)
class _Run:
    """Consecutive pages of a load that lie on one daemon."""

    first: int
    connection: DmpConnection
    pages: ReadPages


@dataclass(slots=True)
class BlockLoad:
    """A part that is running. `wait_layer` is for the thread of vLLM, the rest of the work is done by the executor's."""

    request_id: str
    order: GroupLoad
    hit: RankHit
    pages: GroupPages
    window: Window
    deadline: float
    on_bad_page: Callable[[GroupPages, BlockKey, Place], None]
    num_good: int = 0
    """Leading blocks that are whole, once the load is done."""
    began_at: float = 0.0
    ended_at: float = 0.0
    _layers_waited: int = 0
    _arrived: Gate = field(default_factory=make_gate)
    """Opens behind each layer that every block of the load has; closed when the load has ended."""
    _cancellation: Cancellation = field(default_factory=Cancellation)
    _future: Future[None] | None = None

    def start(self, executor: Executor, connections: ConnectionCache) -> None:
        """Begin on one of the executor's threads."""
        self.num_good = len(self.order.blocks)
        self._future = executor.submit(self._run, connections)

    @property
    def num_layers(self) -> int:
        return len(self.pages.layout.layers)

    @property
    def is_done(self) -> bool:
        return self._future is not None and self._future.done()

    @property
    def is_whole(self) -> bool:
        """Whether every block arrived, of a load that is done."""
        return self.num_good == len(self.order.blocks)

    @property
    def was_waited_for(self) -> bool:
        """Whether vLLM waited for every layer before it used it."""
        return self._layers_waited == self.num_layers

    @property
    def bad_blocks(self) -> Sequence[int]:
        return self.order.blocks[self.num_good :]

    def wait_layer(self, layer: int) -> bool:
        """Return when the layer of every block is there and verified, or will not be (False)."""
        self._layers_waited = max(self._layers_waited, layer + 1)
        if not self._arrived.wait(layer + 1, self.deadline):
            self.stop()
            return False
        self.window.wait_published(layer)
        return True

    def join(self) -> None:
        """Wait for the end of a load of which every layer is there."""
        if self._future is not None:
            self._future.result()

    def stop(self) -> None:
        """End a load that is no longer wanted or late; on return nothing writes into vLLM's memory any more."""
        self._cancellation.cancel()
        if self._future is not None:
            if self._future.cancel():
                self.num_good = 0
                self._arrived.close()
            else:
                self._future.result()

    def _cut(self, num_good: int, error: str) -> None:
        if num_good < self.num_good:
            log.info("load_cut", request=self.request_id, good=num_good, of=len(self.order.blocks), error=error)
            self.num_good = num_good

    def _run(self, connections: ConnectionCache) -> None:
        self.began_at = time.monotonic()
        try:
            runs = self._open_runs(connections)
            self._read_all(runs, connections)
        except TransferCancelled:
            self._cut(0, "it was stopped")
        except Exception as error:
            log.exception("load_failed", request=self.request_id)
            self._cut(0, str(error))
        finally:
            self.window.finish()
            self._arrived.close()
            self.ended_at = time.monotonic()

    def _open_runs(self, connections: ConnectionCache) -> list[_Run]:
        """Connect, and check all headers; the load is cut before the first page that has none."""
        segments = {segment.node: segment for segment in self.hit.segments}
        runs: list[_Run] = []
        for first, stop in _by_node(self.hit.places):
            places = self.hit.places[first:stop]
            try:
                connection = connections.get(segments[places[0].node], deadline=self.deadline)
                found = self.pages.reader.read_headers(
                    connection,
                    places,
                    self.order.keys[first:stop],
                    deadline=self.deadline,
                    cancellation=self._cancellation,
                )
            except TransferCancelled:
                raise
            except StrataError as error:
                self._cut(first, error.message)
                break
            bad = min(found.failures, default=None)
            if bad is None:
                runs.append(_Run(first, connection, found))
                continue
            self._bad_page(first + bad, str(found.failures[bad]))
            runs.append(_Run(first, connection, found.take(range(bad))))
            break
        return runs

    def _read_all(self, runs: Sequence[_Run], connections: ConnectionCache) -> None:
        layer = 0
        while layer < self.num_layers and self.num_good:
            if len(runs) == 1 and self.window.is_direct:
                # One transfer, which lets each layer through by itself; a cut load is read again without its bad end.
                done = self._arrived if self.is_whole else None
                if self._read(runs[0], range(layer, self.num_layers), done, connections):
                    return
            elif all(self._read(run, [layer], None, connections) for run in runs):
                self.window.publish(layer)
                self._let_through(layer)
                layer += 1

    def _let_through(self, layer: int) -> None:
        if self.is_whole:
            self._arrived.open(layer + 1)

    def _read(self, run: _Run, layers: Sequence[int], done: Gate | None, connections: ConnectionCache) -> bool:
        """Some layers of what is still good of a run; False if less is good now."""
        count = min(len(run.pages), self.num_good - run.first)
        if count <= 0:
            return True
        pages = run.pages if count == len(run.pages) else run.pages.take(range(count))
        memory = self.window.memory.part(run.first, run.first + count)
        try:
            pages.read_layers(layers, memory, deadline=self.deadline, done=done, cancellation=self._cancellation)
        except PageError as error:
            self._bad_page(run.first + error.index, str(error))
            return False
        except TransportError as error:
            connections.drop(run.connection, error.message)
            self._cut(run.first, error.message)
            return False
        return True

    def _bad_page(self, index: int, error: str) -> None:
        self._cut(index, error)
        self.on_bad_page(self.pages, self.order.keys[index], self.hit.places[index])


@dataclass(frozen=True, slots=True)
class RequestLoad:
    """All parts of one order."""

    order: LoadOrder
    parts: Sequence[BlockLoad]

    @property
    def is_done(self) -> bool:
        return all(part.is_done for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """Of a load that is done."""
        return all(part.is_whole for part in self.parts)

    @property
    def was_waited_for(self) -> bool:
        return all(part.was_waited_for for part in self.parts)

    @property
    def seconds(self) -> float:
        """From the begin of the first part to the end of the last."""
        if not self.parts:
            return 0.0
        return max(part.ended_at for part in self.parts) - min(part.began_at for part in self.parts)

    def stop(self) -> None:
        """End all parts; see there."""
        for part in self.parts:
            part.stop()


def _by_node(places: Sequence[Place]) -> list[tuple[int, int]]:
    """Index ranges of consecutive pages on the same daemon."""
    runs: list[tuple[int, int]] = []
    for index, place in enumerate(places):
        if runs and places[index - 1].node == place.node:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
