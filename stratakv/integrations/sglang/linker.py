"""`StrataKVLinker`: SGLang's unified radix cache below the device, without host memory of SGLang's own in between.

SGLang's scheduler thread calls; loads and offloads run on a thread each, through host memory of their own. A load that fails is
told to SGLang, which aborts its requests; a lookup that fails is a miss; an offload that fails is told as not done.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import DevicePoolGroup, resolve_hybrid_device_pool_group
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker
from sglang.srt.utils import get_device_module

from stratakv.errors import StrataError
from stratakv.integrations.link import PoolLink, read_credentials
from stratakv.integrations.page_store import PageStore, Patience
from stratakv.integrations.sglang import metrics
from stratakv.integrations.sglang.device_pages import DevicePages
from stratakv.integrations.sglang.engine_facts import engine_facts
from stratakv.integrations.sglang.hits import Policy, restorable
from stratakv.integrations.sglang.options import parse_options
from stratakv.integrations.sglang.scope import Ranks, ServerScope, page_key, weights_of
from stratakv.log import EventLogger, log_as_guest

log = EventLogger("stratakv.sglang.linker")

POOL_PREFIX = "device."
"""Pages of a device pool are laid out otherwise than those of a host pool of the same name."""


class StrataKVLinker(UnifiedCacheLinker):
    """For `--unified-cache-external-linker-backend dynamic`."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
        pool_group: DevicePoolGroup | None = None,
    ) -> None:
        """Raises SetupError. `pool_group` stands in for the one of the device."""
        log_as_guest()
        self.forward_stream = forward_stream
        self._group = pool_group or resolve_hybrid_device_pool_group(
            kvcache=params.token_to_kv_pool_allocator.get_kvcache(),
            page_size=params.page_size,
            params=params,
            components=components,
        )
        self.pools = self._group.entry_map
        self._options = options = parse_options(extra_config)
        ranks = _ranks(params, is_replicated=self._group.rank_replicated)
        self._is_owner = not self._group.rank_replicated or _tp(params)[0] == 0
        name = f"sglang-{socket.gethostname()}-{os.getpid()}"
        self._link = PoolLink(
            options.meta, credentials=read_credentials(options.pool_secret_file), role="sglang", name=name
        )
        node = options.node or self._link.local_node()
        facts = engine_facts(None)
        scope = ServerScope(weights_of(options, facts.model_path, facts.revision), facts.numerics, options)
        patience = Patience(options.lookup_timeout_s, options.load_timeout_s, options.save_timeout_s)
        self._pages: dict[str, DevicePages] = {}
        self._stores: dict[str, PageStore] = {}
        for pool, entry in self.pools.items():
            dtype = ",".join(sorted({str(buffer.dtype) for buffer in entry.kv_buffer}))
            pages = DevicePages(entry, dtype, ranks.tp_rank, ranks.pp_rank)
            space = scope.namespace(POOL_PREFIX + str(pool), pages.layout, ranks)
            store = PageStore(self._link, pages.layout, space, name=name, node=lambda: node, patience=patience)
            self._pages[str(pool)], self._stores[str(pool)] = pages, store
            log.info("pool_registered", pool=pool, page_bytes=pages.layout.data_bytes, namespace=space.hex())
        self.layer_done_counter = LayerWiseLoadCounter(self._group.num_layers)
        self._pending: dict[str, list[PoolTransfer]] = {}
        self._results: deque[bool] = deque()
        self._load_thread = ThreadPoolExecutor(1, thread_name_prefix="stratakv-load")
        self._offload_thread = ThreadPoolExecutor(1, thread_name_prefix="stratakv-offload")

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """All prefix lengths, in pages, that every pool can restore."""
        expanded = self._group.resolve_transfers(transfers)
        if not expanded:
            return []
        keys = next(list(t.keys) for t in transfers if str(t.name) == "kv")
        lengths = set(range(1, len(keys) + 1))
        try:
            for transfer in expanded:
                pool = str(transfer.name)
                present = self._stores[pool].present([page_key(key) for key in keys])
                metrics.looked_up(pool, len(keys), sum(present))
                lengths &= restorable(Policy(transfer.hit_policy.value), present, len(transfer.keys))
        except (StrataError, ValueError) as error:
            log.info("lookup_failed", error=str(error))
            metrics.failed("exists", getattr(error, "code", "policy"))
            return []
        return sorted(lengths)

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue it for the next `start_layer_wise_loading`."""
        expanded = self._group.resolve_transfers(transfers, allow_partial=True, allow_missing_kv=True)
        if not expanded or rid in self._pending:
            return False
        self._pending[rid] = expanded
        return True

    def start_layer_wise_loading(self) -> int:
        if not self._pending:
            return -1
        pending, self._pending = self._pending, {}
        index = int(self.layer_done_counter.update_producer())
        # The device's slots may still be in use by what the current stream was given before.
        ready = get_device_module().Event()
        ready.record()
        transfers = [transfer for of_request in pending.values() for transfer in of_request]
        self._load_thread.submit(self._load, index, transfers, ready)
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return bool(self.layer_done_counter.finish(counter_index))

    def cancel_queued_load(self, rid: str) -> bool:
        return self._pending.pop(rid, None) is not None

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        expanded = self._group.resolve_transfers(transfers, allow_partial=True)
        if not expanded:
            return False
        if not self._is_owner:
            self._results.append(True)
            return True
        self._offload_thread.submit(self._offload, expanded, self.record_offload_ready())
        return True

    def num_completed_offloads(self) -> int:
        return len(self._results)

    def pop_completed_offload(self) -> bool:
        return self._results.popleft()

    def reset(self) -> None:
        self._pending.clear()
        for thread in (self._load_thread, self._offload_thread):
            thread.submit(lambda: None).result()
        self._results.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Finish what is under way, and let go of the pool."""
        self._pending.clear()
        self._load_thread.shutdown()
        self._offload_thread.shutdown()
        self._link.close()

    def _load(self, index: int, transfers: Sequence[PoolTransfer], ready: Any) -> None:
        try:
            ready.synchronize()
            self._load_layers(index, _by_pool(transfers))
        except StrataError as error:
            log.warning("load_failed", error=error.message)
            metrics.failed("get", error.code)
            self.layer_done_counter.fail(index, error)
        except Exception as error:
            log.exception("load_failed")
            metrics.failed("get", "bug")
            self.layer_done_counter.fail(index, error)

    def _load_layers(self, index: int, batches: dict[str, tuple[list[str], torch.Tensor]]) -> None:
        with ExitStack() as stack:
            opened = []
            for pool, (keys, indices) in batches.items():
                pages = self._pages[pool]
                all_keys = [page_key(key) for key in keys]
                source = stack.enter_context(self._stores[pool].opened(all_keys, self._options.load_timeout_s))
                opened.append((pages, pages.open(indices), source))
            for layer in range(self._group.num_layers):
                for pages, window, source in opened:
                    if layer in pages.layers:
                        at = pages.layers.index(layer)
                        source.read(at, window.memory)
                        window.publish(at)
                self.layer_done_counter.complete(index, layer)
        for pool, (keys, _) in batches.items():
            metrics.loaded(pool, [True] * len(keys))

    def _offload(self, transfers: Sequence[PoolTransfer], ready: Sequence[Any]) -> None:
        is_stored = False
        try:
            for event in ready:
                event.synchronize()
            is_stored = all(self._store(transfer) for transfer in transfers)
        except StrataError as error:
            log.info("offload_failed", error=error.message)
            metrics.failed("set", error.code)
        except Exception:
            log.exception("offload_failed")
            metrics.failed("set", "bug")
        finally:
            self._results.append(is_stored)

    def _store(self, transfer: PoolTransfer) -> bool:
        pool = str(transfer.name)
        window = self._pages[pool].open(transfer.host_indices)
        window.fetch()
        stored = self._stores[pool].put([page_key(key) for key in transfer.keys], window.memory)
        metrics.stored(pool, stored)
        return all(stored)


def _by_pool(transfers: Sequence[PoolTransfer]) -> dict[str, tuple[list[str], torch.Tensor]]:
    """Keys and device indices of all requests, by pool."""
    keys: dict[str, list[str]] = {}
    indices: dict[str, list[torch.Tensor]] = {}
    for transfer in transfers:
        keys.setdefault(str(transfer.name), []).extend(transfer.keys)
        indices.setdefault(str(transfer.name), []).append(transfer.host_indices)
    return {pool: (keys[pool], torch.cat(indices[pool])) for pool in keys}


def _ranks(params: Any, *, is_replicated: bool) -> Ranks:
    ranks = Ranks(
        *_tp(params),
        pp_rank=params.pp_rank,
        pp_size=params.pp_size,
        cp_rank=params.attn_cp_rank,
        cp_size=params.attn_cp_size,
    )
    return ranks.replicated() if is_replicated else ranks


def _tp(params: Any) -> tuple[int, int]:
    """Rank and size of tensor parallelism."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    group = params.attn_tp_cache_group or params.tp_cache_group
    return torch.distributed.get_rank(group=group), torch.distributed.get_world_size(group=group)
