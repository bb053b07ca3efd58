"""The tiers below L1, as one worker sees them: L2, then the pool. The engine's KVConnector.

`lookup`, `wait_saved` and `drop_l2` run on the event loop; `find` and `save` come from the engine's thread. Loads and saves have
threads of their own. Nothing here fails a request: what cannot be found, loaded or saved is computed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from stratakv._native import is_built
from stratakv.errors import StrataError
from stratakv.keys import BlockKey, Namespace, pack_keys
from stratakv.layout import KVLayout
from stratakv.log import EventLogger
from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.pages import PageReader
from stratakv.settings import WorkerSettings
from stratakv.wire import (
    Done,
    Extent,
    Match,
    MatchPrefix,
    Place,
    ReleaseLease,
    ReportCorrupt,
    Segment,
    WorkerInfo,
)
from workers.engine.connector import OnFound, SaveJob, Tier
from workers.engine.kv_cache import KVCache
from workers.engine.reservations import Reservations
from workers.metrics import WorkerMetrics
from workers.rates import Rates, Stretch
from workers.tiers.announced import AnnouncedLoad
from workers.tiers.bandwidth import BandwidthProbe
from workers.tiers.l2 import L2Table
from workers.tiers.load import FoundPage, LayerLoad, LoadOutcome
from workers.tiers.save import BlockSave, SaveListener, Saver, Written
from workers.tiers.window import windows_of

log = EventLogger("workers.tiers")

L2_ENTRIES_MAX = 1_000_000
SAVES_WAITING_MAX = 128
LOAD_THREADS = 2
LEASE_S = 30.0
LOOKUP_S_MAX = 0.5
"""A lookup that takes longer counts as a miss."""

Listen = Callable[[Sequence[BlockKey]], SaveListener | None]
"""Who follows the save of these blocks; called from the engine's thread."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Whether blocks can be found in the pool."""

    is_whole: bool
    lease_id: int = 0


@dataclass(slots=True)
class PoolHit:
    """A prefix that L2 and the pool hold (an ExternalHit)."""

    start_block: int
    pages: Sequence[FoundPage]
    start_load: Callable[[Sequence[FoundPage], Sequence[int], Executor], LayerLoad]
    threads: Executor
    ahead_thread: Executor
    give_back: Callable[[], None]

    @property
    def tiers(self) -> Sequence[Tier]:
        return [page.tier for page in self.pages]

    def load(self, first_block: int, l1_blocks: Sequence[int]) -> LayerLoad:
        return self._load(first_block, l1_blocks, self.threads)

    def load_ahead(self, first_block: int, l1_blocks: Sequence[int]) -> LayerLoad:
        return self._load(first_block, l1_blocks, self.ahead_thread)

    def _load(self, first_block: int, l1_blocks: Sequence[int], threads: Executor) -> LayerLoad:
        first = first_block - self.start_block
        return self.start_load(self.pages[first : first + len(l1_blocks)], l1_blocks, threads)

    def release(self) -> None:
        self.give_back()


class Tiers:
    """L2 and the pool for one worker."""

    def __init__(
        self,
        info: WorkerInfo,
        layout: KVLayout,
        settings: WorkerSettings,
        meta: MetaClient,
        connections: ConnectionCache,
        l1: KVCache,
        rates: Rates,
        metrics: WorkerMetrics,
        loop: asyncio.AbstractEventLoop,
        listen: Listen,
    ) -> None:
        self._layout = layout
        self._listen = listen
        self._namespace = Namespace(info.namespace)
        self._worker = info.worker
        self._node = info.node
        self._load_timeout_s = settings.load_timeout_s
        self._meta = meta
        self._open_window = windows_of(l1.k, l1.v)
        self._rates = rates
        self._metrics = metrics
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = False
        if not is_built():
            log.info("native_module_missing", effect="pages are moved by Python, slower")
        self._l2 = L2Table(L2_ENTRIES_MAX)
        self._connections = connections
        self._reader = PageReader(layout, self._namespace)
        self._load_threads = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="kv-load")
        self._ahead_thread = ThreadPoolExecutor(1, thread_name_prefix="kv-load-ahead")
        self._in_flight: dict[BlockKey, Future[None]] = {}
        self._saver = Saver(
            layout,
            self._namespace,
            meta,
            self._connections,
            loop,
            worker=self._worker,
            prefer_node=info.node,
            saves_max=SAVES_WAITING_MAX,
            page_cost_s=lambda: rates.prefill_s(layout.page_tokens),
            on_written=lambda written: self._on_loop(self._remember, written),
            on_failed=metrics.pool_error,
        )

    def open(self) -> None:
        """Begin to save; the warm-up's blocks are not worth keeping."""
        self._is_open = True

    async def close(self) -> None:
        """Finish queued saves and let go of all segments."""
        await asyncio.to_thread(self._saver.close)
        await asyncio.to_thread(self._load_threads.shutdown)
        await asyncio.to_thread(self._ahead_thread.shutdown)
        self._connections.close()

    async def lookup(self, keys: Sequence[BlockKey], l1_blocks: int) -> PoolHit | None:
        """What lies below L1 of this prefix, beyond its first `l1_blocks` blocks; None if nothing is worth loading."""
        beyond = keys[l1_blocks:]
        segment, local = self._l2.match(beyond)
        pages = [FoundPage(key, place, segment, Tier.L2) for key, place in zip(beyond, local, strict=False) if segment]
        pooled, lease_id = await self._match_pool(beyond[len(pages) :])
        pages += pooled
        released = False

        def give_back() -> None:
            nonlocal released
            if not released and lease_id:
                released = True
                self._on_loop(self._spawn_release, lease_id)

        wanted = self._worth_loading(pages, l1_blocks, len(keys))
        if not wanted:
            give_back()
            return None
        return PoolHit(l1_blocks, wanted, self._start_load, self._load_threads, self._ahead_thread, give_back)

    def find(self, keys: Sequence[BlockKey], num_l1_blocks: int, on_found: OnFound) -> None:
        """`lookup` for the engine's thread."""
        self._on_loop(self._spawn_find, keys, num_l1_blocks, on_found)

    def _spawn_find(self, keys: Sequence[BlockKey], num_l1_blocks: int, on_found: OnFound) -> None:
        self._keep(self._find(keys, num_l1_blocks, on_found))

    async def _find(self, keys: Sequence[BlockKey], num_l1_blocks: int, on_found: OnFound) -> None:
        hit: PoolHit | None = None
        try:
            hit = await self.lookup(keys, num_l1_blocks)
        except Exception:
            log.exception("lookup_failed")  # a bug; the request is waiting for an answer all the same
        finally:
            on_found(hit)

    async def _match_pool(self, keys: Sequence[BlockKey]) -> tuple[list[FoundPage], int]:
        match = await self._match(keys, LEASE_S, self._node or "")
        if match is None:
            return [], 0
        segments = {segment.node: segment for segment in match.segments}
        pages = [
            FoundPage(key, place, segments[place.node], Tier.DISK if segments[place.node].is_disk else Tier.POOL)
            for key, place in zip(keys, match.places(), strict=False)
        ]
        return pages, match.lease_id

    async def _match(self, keys: Sequence[BlockKey], lease_s: float, node: str = "") -> Match | None:
        """What the pool has of this prefix; None if there is nothing to ask or nobody who answers."""
        if not keys or not self._meta.available:
            return None
        try:
            request = MatchPrefix(self._namespace, pack_keys(keys), lease_s, node)
            return await self._meta.call(request, Match, timeout_s=LOOKUP_S_MAX)
        except StrataError as error:
            log.debug("lookup_failed", error=error.message)
            self._metrics.pool_error(error.code)
            return None

    def _worth_loading(self, pages: Sequence[FoundPage], first: int, num_blocks: int) -> Sequence[FoundPage]:
        """The leading pages that are to be loaded; the others, and the rest of the prompt, are computed."""
        stretches = [Stretch(tier, sum(1 for _ in run)) for tier, run in itertools.groupby(pages, lambda p: p.tier)]
        layout = self._layout
        count = self._rates.pages_worth_loading(stretches, layout.page_bytes, layout.page_tokens, first, num_blocks)
        tiers = [page.tier for page in pages]
        self._metrics.load_decided(tiers[:count], tiers[count:])
        return pages[:count]

    def _start_load(self, pages: Sequence[FoundPage], l1_blocks: Sequence[int], threads: Executor) -> LayerLoad:
        load = LayerLoad(
            pages=pages,
            window=self._open_window(l1_blocks),
            num_layers=len(self._layout.layers),
            timeout_s=self._load_timeout_s,
            on_finished=lambda outcome: self._on_loop(self._load_finished, pages, outcome),
        )
        load.start(threads, self._reader, self._connections)
        return load

    def _load_finished(self, pages: Sequence[FoundPage], outcome: LoadOutcome) -> None:
        good = pages[: outcome.num_good_blocks]
        for tier, seconds in outcome.seconds_by_tier.items():
            num_pages = sum(page.tier is tier for page in good)
            size_bytes = num_pages * self._layout.data_bytes
            if len(good) == len(pages):
                self._rates.observe_load(tier, size_bytes, seconds)
            self._metrics.loaded(tier, num_pages, size_bytes, seconds)
        local = [(page.key, page.place) for page in good if page.segment.node == self._node]
        if local:
            self._l2.add(next(page.segment for page in good if page.segment.node == self._node), local)
        if outcome.bad_page is not None:
            self._metrics.pool_error("bad_page")
            log.warning("bad_page", node=outcome.bad_page.place.node, offset=outcome.bad_page.place.offset)
            self._l2.forget(outcome.bad_page.key)
            self._spawn(ReportCorrupt(self._namespace, outcome.bad_page.key, outcome.bad_page.place))

    def save(
        self, keys: Sequence[BlockKey], l1_blocks: Sequence[int], owner: int, on_finished: Callable[[], None]
    ) -> SaveJob | None:
        """Begin to write down blocks that the coming step will fill; None while the pool is away or too far behind."""
        if not keys or not self._is_open or not self._meta.available:
            return None
        save = BlockSave(
            keys,
            lambda wanted: self._open_window([l1_blocks[index] for index in wanted]),
            on_finished,
            self._listen(keys),
            owner,
        )
        for key in keys:
            self._in_flight[key] = save.published
        save.published.add_done_callback(lambda published: self._on_loop(self._landed, keys, published))
        if not self._saver.take(save):
            save.published.set_result(None)
            return None
        return save

    def _landed(self, keys: Sequence[BlockKey], published: Future[None]) -> None:
        for key in keys:
            if self._in_flight.get(key) is published:
                del self._in_flight[key]

    def _remember(self, written: Written) -> None:
        self._metrics.written(len(written.keys), len(written.keys) * self._layout.data_bytes)
        if written.segment.node == self._node:
            places = (Place(written.segment.node, e.offset, e.generation) for e in written.extents)
            self._l2.add(written.segment, zip(written.keys, places, strict=True))

    async def wait_saved(self, keys: Sequence[BlockKey], timeout_s: float, lease_s: float = 0.0) -> Saved:
        """Whether all these blocks can be found in the pool, once the saves under way have ended; leased for `lease_s`."""
        under_way = {id(f): asyncio.wrap_future(f) for key in keys if (f := self._in_flight.get(key)) is not None}
        if under_way:
            await asyncio.wait(under_way.values(), timeout=timeout_s)
        match = await self._match(keys, lease_s)
        if match is None:
            return Saved(is_whole=not keys)
        return Saved(match.num_blocks == len(keys), match.lease_id)

    def release_lease(self, lease_id: int) -> None:
        """Give a lease back, if it is one."""
        if lease_id:
            self._spawn_release(lease_id)

    @property
    def num_layers(self) -> int:
        return len(self._layout.layers)

    def announced(self, segment: Segment, extents: Sequence[Extent], l1_blocks: Sequence[int]) -> AnnouncedLoad:
        """Load pages of this namespace that are still being written, as their writer tells of them."""
        window = self._open_window(l1_blocks)
        return AnnouncedLoad(segment, extents, window, self._reader, self._connections, self._load_timeout_s)

    def handed_over(self, num_pages: int, seconds: float) -> None:
        """So many announced pages are whole in L1."""
        self._metrics.loaded(Tier.POOL, num_pages, num_pages * self._layout.data_bytes, seconds)

    def bandwidth_probe(self, reservations: Reservations, num_l1_blocks: int) -> BandwidthProbe:
        """Tries the way to the daemons."""
        return BandwidthProbe(
            self._layout,
            self._namespace,
            self._worker,
            self._node,
            self._meta,
            self._connections,
            self._open_window,
            reservations,
            num_l1_blocks,
        )

    @property
    def num_l2_pages(self) -> int:
        """Pages of the local daemon that this worker knows."""
        return len(self._l2)

    def drop_l2(self) -> int:
        """Forget the table; how many pages it knew."""
        return self._l2.clear()

    def _spawn_release(self, lease_id: int) -> None:
        self._spawn(ReleaseLease(lease_id))

    def _spawn(self, request: ReleaseLease | ReportCorrupt) -> None:
        self._keep(self._tell(request))

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        """Run it; the loop itself does not hold on to its tasks."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, request: ReleaseLease | ReportCorrupt) -> None:
        try:
            await self._meta.call(request, Done)
        except StrataError as error:
            log.debug("not_told", request=type(request).__name__, error=error.message)

    def _on_loop(self, call: Callable[..., None], *args: object) -> None:
        """Run on the event loop, from any thread; nothing is left to do once the loop has closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)
