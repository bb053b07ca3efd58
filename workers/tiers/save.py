"""Writing new blocks down to the pool, layer by layer, behind the engine's back."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from stratakv._native import Gate, make_gate
from stratakv.errors import StrataError
from stratakv.keys import BlockKey, Namespace, pack_keys
from stratakv.layout import KVLayout
from stratakv.log import EventLogger
from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.errors import TransferCancelled
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.open_put import open_put
from stratakv.pool.pages import PageWriter, WritePages
from stratakv.wire import PUT_ID_BYTES, Done, Extent, PutEnd, PutGrant, PutRevoke, PutStart, Segment
from workers.tiers.window import OpenWindow, Window

log = EventLogger("workers.tiers.save")

PUT_TIMEOUT_S = 60.0
"""Room is granted for so long; also the longest a save waits for the engine's layers."""
END_S_MAX = 10.0
"""A put whose bytes are written is ended within so long, while another meta server takes over."""

ReplyT = TypeVar("ReplyT")


@dataclass(frozen=True, slots=True)
class Written:
    """Pages that can be found now."""

    segment: Segment
    keys: Sequence[BlockKey]
    extents: Sequence[Extent]


class SaveListener(Protocol):
    """Follows one save from where its bytes have places; called from the saver's thread, and must return at once."""

    def placed(self, segment: Segment, keys: Sequence[BlockKey], extents: Sequence[Extent]) -> None:
        """Pages of these keys are going to be written there."""

    def written(self, layers: Sequence[int], checksums: bytes) -> None:
        """These layers of every page lie there now; `checksums` [layer][page] of 8 bytes."""


@dataclass(slots=True)
class BlockSave:
    """The write-down of the blocks that one step fills (a SaveJob)."""

    keys: Sequence[BlockKey]
    open_window: OpenWindow
    """Of some of the keys' blocks, by index."""
    on_released: Callable[[], None]
    """L1's blocks are not needed any more."""
    listener: SaveListener | None = None
    owner: int = 0
    """Whose the blocks are."""
    published: Future[None] = field(default_factory=Future)
    """Done when the blocks can be found, or never will be by this save."""
    ready: Gate = field(default_factory=make_gate)
    """Opens behind each layer that is final in L1; closed if the step failed."""
    _released: bool = False

    def release_l1(self) -> None:
        """Say once that L1's blocks are not needed any more."""
        if not self._released:
            self._released = True
            self.on_released()

    def layer_done(self, layer: int) -> None:
        self.ready.open(layer + 1)

    def abort(self) -> None:
        self.ready.close()


class Saver:
    """Runs saves one after another on a thread of its own. At most `saves_max` wait; more are not taken."""

    def __init__(
        self,
        layout: KVLayout,
        namespace: Namespace,
        meta: MetaClient,
        connections: ConnectionCache,
        loop: asyncio.AbstractEventLoop,
        *,
        worker: str,
        prefer_node: str | None,
        saves_max: int,
        page_cost_s: Callable[[], float],
        on_written: Callable[[Written], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._layout = layout
        self._namespace = namespace
        self._writer = PageWriter(layout, namespace)
        self._meta = meta
        self._connections = connections
        self._loop = loop
        self._worker = worker
        self._page_cost_s = page_cost_s
        self._prefer_node = prefer_node
        self._room = threading.BoundedSemaphore(saves_max)
        self._on_written = on_written
        self._on_failed = on_failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-save")

    def take(self, save: BlockSave) -> bool:
        """Queue a save; False if too many wait already."""
        if not self._room.acquire(blocking=False):
            self._on_failed("queue_full")
            return False
        self._thread.submit(self._run, save)
        return True

    def close(self) -> None:
        """Finish what is queued."""
        self._thread.shutdown()

    def _run(self, save: BlockSave) -> None:
        try:
            self._save(save)
        except TransferCancelled:
            log.debug("save_aborted", blocks=len(save.keys))
        except StrataError as error:
            log.info("save_failed", blocks=len(save.keys), error=error.message)
            self._on_failed(error.code)
        except Exception:
            log.exception("save_failed", blocks=len(save.keys))
            self._on_failed("bug")
        finally:
            save.release_l1()
            save.published.set_result(None)
            self._room.release()

    def _save(self, save: BlockSave) -> None:
        deadline = time.monotonic() + PUT_TIMEOUT_S
        put_id = os.urandom(PUT_ID_BYTES)
        request = PutStart(
            put_id=put_id,
            namespace=self._namespace,
            keys=pack_keys(save.keys),
            page_bytes=self._layout.page_bytes,
            block_size=self._layout.page_tokens,
            prefer_node=self._prefer_node,
            worker=self._worker,
            timeout_s=PUT_TIMEOUT_S,
            cost_us=round(self._page_cost_s() * 1e6),
            owner=save.owner,
        )
        grant = self._wait(self._meta.call(request, PutGrant))
        if grant.segment is None or not grant.wanted:
            return
        try:
            written = self._write(save, put_id, grant.segment, grant, deadline)
            save.release_l1()
            end = PutEnd(put_id, grant.segment.epoch, list(written.extents))
            self._wait(self._meta.insist(end, Done, for_s=END_S_MAX))
        except Exception:
            self._revoke(put_id)
            raise
        self._on_written(written)

    def _write(self, save: BlockSave, put_id: bytes, segment: Segment, grant: PutGrant, deadline: float) -> Written:
        keys = [save.keys[index] for index in grant.wanted]
        window = save.open_window(grant.wanted)
        with open_put(self._connections, segment, put_id, deadline=deadline) as connection:
            page_bytes = self._layout.page_bytes
            extents = connection.allocate(
                put_id, len(keys), page_bytes, PUT_TIMEOUT_S, deadline=deadline, term=grant.term
            )
            pages = self._writer.begin(connection, put_id, extents, keys)
            if save.listener is not None:
                save.listener.placed(segment, keys, extents)
            _write_pages(pages, window, len(self._layout.layers), save, deadline)
        return Written(segment, keys, extents)

    def _revoke(self, put_id: bytes) -> None:
        try:
            self._wait(self._meta.call(PutRevoke(put_id), Done))
        except StrataError as error:
            log.debug("revoke_failed", error=error.message)

    def _wait(self, call: Coroutine[Any, Any, ReplyT]) -> ReplyT:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(PUT_TIMEOUT_S)


def _write_pages(pages: WritePages, window: Window, num_layers: int, save: BlockSave, deadline: float) -> None:
    """Raises TransferCancelled if the step fails, TransportError, PutRefused."""
    if window.is_l1 and save.listener is None:
        pages.write(window.memory, ready=save.ready, deadline=deadline)
        return
    layer = 0
    while layer < num_layers:
        if not save.ready.wait(layer + 1, deadline):
            raise TransferCancelled("the step that was to fill these blocks failed")
        layers = range(layer, min(save.ready.open_layers, num_layers))
        for number in layers:
            window.fetch(number)
        pages.write_layers(layers, window.memory, deadline=deadline)
        if save.listener is not None:
            save.listener.written(layers, pages.checksums(layers))
        layer = layers.stop
    pages.write_headers(deadline=deadline)
