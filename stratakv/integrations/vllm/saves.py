"""Writes blocks of vLLM to the pool, behind its back: one save after another, on a thread of its own.

A save holds the blocks of one request that one step fills. Its layers are written as that step finishes them. Until all of
them are, a save can be made void (the step failed, or vLLM took the blocks away): whatever was written is then given up and
never found.
"""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from stratakv._native import Gate, make_gate
from stratakv.errors import StrataError
from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.group_pages import GroupPages
from stratakv.integrations.vllm.orders import SaveOrder
from stratakv.integrations.vllm.windows import Stamps
from stratakv.keys import pack_keys
from stratakv.log import EventLogger
from stratakv.pool.errors import TransferCancelled
from stratakv.pool.open_put import open_put
from stratakv.wire import PUT_ID_BYTES, Done, Extent, PutEnd, PutGrant, PutRevoke, PutStart, Segment

log = EventLogger("stratakv.vllm.saves")

PUT_TIMEOUT_S = 60.0
"""Room is granted for so long; also the longest a save waits for the layers of its step."""
CALL_S_MAX = 5.0


class _State(enum.Enum):
    READING = enum.auto()
    """vLLM's blocks may still be read."""
    READ = enum.auto()
    VOID = enum.auto()


@dataclass(slots=True)
class BlockSave:
    """Blocks of one group of one request on their way."""

    order: SaveOrder
    pages: GroupPages
    stamps: Stamps | None
    ready: Gate = field(default_factory=make_gate)
    """Opens behind each layer that is final."""
    is_done: bool = False
    _state: _State = _State.READING
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_void(self) -> bool:
        return self._state is _State.VOID

    def void(self) -> None:
        """vLLM's blocks are not what the keys say any more; no effect once they were read."""
        with self._lock:
            if self._state is _State.READING:
                self._state = _State.VOID
        self.ready.close()

    def was_read(self) -> bool:
        """Say that the blocks were read; whether they were good until then."""
        with self._lock:
            if self._state is _State.READING:
                self._state = _State.READ
            return self._state is _State.READ


class Saver:
    """Runs saves. At most `saves_max` wait."""

    def __init__(
        self,
        link: PoolLink,
        *,
        name: str,
        node: str | None,
        saves_max: int,
        prepare_thread: Callable[[], None],
        on_saved: Callable[[int], None],
    ) -> None:
        self._link = link
        self._name = name
        self._node = node
        self._room = threading.BoundedSemaphore(saves_max)
        self._on_saved = on_saved
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stratakv-save", initializer=prepare_thread)

    def take(self, save: BlockSave) -> bool:
        """Queue a save; False if too many wait or the pool is away."""
        if not self._link.is_available or not self._room.acquire(blocking=False):
            return False
        self._thread.submit(self._run, save)
        return True

    def close(self) -> None:
        """Finish what is queued: the layers of all of it are final or void."""
        self._thread.shutdown()

    def _run(self, save: BlockSave) -> None:
        try:
            if not save.is_void:
                self._save(save)
        except TransferCancelled:
            log.debug("save_void", request=save.order.request_id, blocks=len(save.order.blocks))
        except StrataError as error:
            log.info("save_failed", blocks=len(save.order.blocks), error=error.message)
        except Exception:
            log.exception("save_failed", blocks=len(save.order.blocks))
        finally:
            save.is_done = True
            self._room.release()

    def _save(self, save: BlockSave) -> None:
        deadline = time.monotonic() + PUT_TIMEOUT_S
        put_id = os.urandom(PUT_ID_BYTES)
        layout = save.pages.layout
        request = PutStart(
            put_id=put_id,
            namespace=save.pages.namespace,
            keys=pack_keys(save.order.keys),
            page_bytes=layout.page_bytes,
            block_size=layout.page_tokens,
            prefer_node=self._node,
            worker=self._name,
            timeout_s=PUT_TIMEOUT_S,
        )
        grant = self._link.call(request, PutGrant).result(CALL_S_MAX)
        if grant.segment is None or not grant.wanted:
            return
        try:
            extents = self._write(save, put_id, grant.segment, grant, deadline)
            self._link.call(PutEnd(put_id, grant.segment.epoch, list(extents)), Done).result(CALL_S_MAX)
        except Exception:
            self._link.tell(PutRevoke(put_id))
            raise
        self._on_saved(len(extents))

    def _write(
        self, save: BlockSave, put_id: bytes, segment: Segment, grant: PutGrant, deadline: float
    ) -> Sequence[Extent]:
        keys = [save.order.keys[index] for index in grant.wanted]
        layout = save.pages.layout
        with open_put(self._link.connections, segment, put_id, deadline=deadline) as connection:
            extents = connection.allocate(
                put_id, len(keys), layout.page_bytes, PUT_TIMEOUT_S, deadline=deadline, term=grant.term
            )
            pages = save.pages.writer.begin(connection, put_id, extents, keys)
            window = save.pages.open_window([save.order.blocks[index] for index in grant.wanted], save.stamps)
            layers = range(len(layout.layers))
            if window.is_direct:
                pages.write_layers(layers, window.memory, ready=save.ready, deadline=deadline)
            else:
                for layer in layers:
                    if not save.ready.wait(layer + 1, deadline):
                        raise TransferCancelled("the step that was to fill these blocks failed")
                    window.fetch(layer)
                    pages.write_layers([layer], window.memory, deadline=deadline)
            if not save.was_read():
                raise TransferCancelled("vLLM has taken the blocks away")
            pages.write_headers(deadline=deadline)
        return extents
