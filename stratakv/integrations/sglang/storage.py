"""`StrataKVStorage`: SGLang's HiCache stores pages of its host memory in the pool and loads them from there.

SGLang constructs one per rank, registers its host pools, and calls from its prefetch and backup threads. Whatever fails is a
miss or False, with a log line and a counter; nothing is raised to SGLang once the storage is set up.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.pool_host import HostKVCache
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.observability.metrics_collector import StorageMetrics

from stratakv.errors import StrataError
from stratakv.integrations.link import PoolLink, read_credentials
from stratakv.integrations.page_store import PageStore, Patience
from stratakv.integrations.sglang import metrics
from stratakv.integrations.sglang.engine_facts import engine_facts
from stratakv.integrations.sglang.hits import Policy, restorable
from stratakv.integrations.sglang.host_pages import host_pages
from stratakv.integrations.sglang.metrics import Transfers
from stratakv.integrations.sglang.options import parse_options
from stratakv.integrations.sglang.pool_pages import PoolPages
from stratakv.integrations.sglang.scope import Ranks, ServerScope, weights_of
from stratakv.keys import NAMESPACE_BYTES
from stratakv.log import EventLogger, log_as_guest
from stratakv.wire import Flush, Flushed

log = EventLogger("stratakv.sglang.storage")

FLUSH_S_MAX = 5.0
NODE_RETRY_S = 30.0
COMPLAINT_S = 10.0
KV = str(PoolName.KV)
_RANK_OWNED = frozenset({str(PoolName.MAMBA)})
"""Pools that hold another state on each rank, also where the KV is replicated."""
_DRAFTS = frozenset({str(PoolName.DRAFT), str(PoolName.DRAFT_SWA)})

ResultT = TypeVar("ResultT")


class StrataKVStorage(HiCacheStorage):
    """SGLang's third tier."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        """Raises SetupError for options that cannot be meant; a meta server that is away is waited for in the background."""
        log_as_guest()
        self._config = storage_config
        self._options = parse_options(storage_config.extra_config)
        facts = engine_facts(storage_config.model_name)
        weights = weights_of(self._options, facts.model_path, facts.revision)
        self._scope = ServerScope(weights, facts.numerics, self._options)
        self._name = f"sglang-{socket.gethostname()}-{os.getpid()}-tp{storage_config.tp_rank}"
        self._link = PoolLink(
            self._options.meta,
            credentials=read_credentials(self._options.pool_secret_file),
            role="sglang",
            name=self._name,
        )
        self._node = self._options.node or self._link.local_node()
        self._node_asked_at = time.monotonic()
        self._pools: dict[str, PoolPages] = {}
        self._loads, self._saves = Transfers(), Transfers()
        self._silent_until: dict[tuple[str, str], float] = {}
        self._has_no_kv = False
        """The host pool is only an anchor for others: its pages hold nothing."""
        self.registered_pools: dict[str, HostKVCache] = {}
        log.info("storage_started", meta=self._options.meta, node=self._node, numerics=facts.numerics)

    def register_mem_pool_host(self, mem_pool_host: HostKVCache) -> None:
        """The pool of `batch_get_v1` and `batch_set_v1`. Raises StrataError."""
        super().register_mem_pool_host(mem_pool_host)
        self._has_no_kv = mem_pool_host.kv_buffer is None
        if not self._has_no_kv:
            self._register(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: HostKVCache, host_pool_name: str) -> None:
        """A pool of `batch_get_v2` and `batch_set_v2`. Raises StrataError."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool.kv_buffer is not None:
            self._register(host_pool, str(host_pool_name))

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many leading pages the pool has: one lookup."""
        if self._has_no_kv:
            return len(keys)
        return self._guarded("exists", lambda: self._pools[KV].count(keys), 0)

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Load pages into host memory in place; which of them are there, whole and verified."""
        if self._has_no_kv:
            return [True] * len(keys)
        return self._guarded("get", lambda: self._pools[KV].load(keys, host_indices), [False] * len(keys))

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store pages from host memory in place; which of them the pool has now."""
        if self._has_no_kv:
            return [True] * len(keys)
        return self._guarded("set", lambda: self._pools[KV].put(keys, host_indices), [False] * len(keys))

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """The longest prefix that every pool can restore, what each pool has by itself, and all lengths that would do.

        A pool whose policy this does not know is left out of the result and has no say.
        """
        kv_pages = self.batch_exists(keys)
        hits = {PoolName.KV: kv_pages} if kv_pages else {}
        lengths = set(range(1, kv_pages + 1))
        for transfer in pool_transfers or []:
            policy = _policy(transfer)
            if not lengths or policy is None:
                continue
            own = self._restorable(transfer, policy, keys[:kv_pages])
            if own:
                hits[transfer.name] = max(own)
            lengths &= own
        return PoolTransferResult(max(lengths, default=0), hits, sorted(lengths))

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """As `batch_get_v1`, for each pool."""
        return {t.name: self._transfer("get", t, PoolPages.load) for t in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """As `batch_set_v1`, for each pool."""
        return {t.name: self._transfer("set", t, PoolPages.put) for t in transfers}

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """One page, as `get_data_page` of the host pool gives it; in the given tensor if there is one."""
        targets = None if target_location is None else [target_location]
        return self.batch_get([key], targets)[0]

    def batch_get(
        self, keys: list[str], target_locations: Sequence[torch.Tensor] | None = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Pages in tensors; None for each that is missing."""

        def load() -> list[torch.Tensor | None]:
            targets = target_locations or [self.mem_pool_host.get_dummy_flat_data_page() for _ in keys]
            return self._pools[KV].load_flat(keys, targets)

        return self._guarded("get", load, [None] * len(keys))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """One page in a tensor; whether the pool has it now."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Pages in tensors; whether the pool has all of them now."""
        return all(self._guarded("set", lambda: self._pools[KV].put_flat(keys, values or []), [False]))

    def clear(self) -> None:
        """Drop the pages of this rank's pools, and of nobody else who has not the same namespace."""
        self._guarded("clear", self._flush, None)

    def get_stats(self) -> StorageMetrics | None:
        """Batches since the last call, if SGLang keeps such metrics."""
        if not self._config.enable_storage_metrics:
            return None
        prefetch_pages, prefetch_bandwidth = self._loads.take()
        backup_pages, backup_bandwidth = self._saves.take()
        return StorageMetrics(prefetch_pages, backup_pages, prefetch_bandwidth, backup_bandwidth)

    def close(self) -> None:
        """Let go of the pool; safe to call more than once."""
        self._link.close()

    def _register(self, pool: HostKVCache, name: str) -> None:
        config = self._config
        ranks = Ranks(
            config.tp_rank,
            config.tp_size,
            config.pp_rank,
            config.pp_size,
            config.attn_cp_rank,
            config.attn_cp_size,
            config.dcp_rank,
            config.dcp_size,
        )
        if config.is_mla_model and _is_replicated(pool, name):
            ranks = ranks.replicated()
        pages = host_pages(pool, str(pool.dtype).removeprefix("torch."), ranks.tp_rank, ranks.pp_rank)
        options = self._options
        store = PageStore(
            self._link,
            pages.layout,
            self._scope.namespace(name, pages.layout, ranks),
            name=self._name,
            node=self._local_node,
            patience=Patience(options.lookup_timeout_s, options.load_timeout_s, options.save_timeout_s),
        )
        self._pools[name] = PoolPages(name, pages, store, self._loads, self._saves)
        log.info(
            "pool_registered",
            pool=name,
            pages=type(pages).__name__,
            page_bytes=pages.layout.data_bytes,
            namespace=store.namespace.hex(),
        )

    def _local_node(self) -> str | None:
        """Asked again now and then while there is none: the daemon may have been started after SGLang."""
        if self._node is None and time.monotonic() > self._node_asked_at + NODE_RETRY_S:
            self._node_asked_at = time.monotonic()
            self._node = self._link.local_node()
        return self._node

    def _restorable(self, transfer: PoolTransfer, policy: Policy, keys: list[str]) -> AbstractSet[int]:
        pool = self._pools.get(str(transfer.name))
        if pool is None:
            return frozenset()
        present = self._guarded("exists", lambda: pool.present(keys), [False] * len(keys))
        return restorable(policy, present, len(transfer.keys or ()))

    def _transfer(
        self, call: str, transfer: PoolTransfer, move: Callable[[PoolPages, Sequence[str], torch.Tensor], list[bool]]
    ) -> list[bool]:
        keys, indices = transfer.keys or [], transfer.host_indices
        if not keys or indices is None:
            return [False] * len(keys)
        return self._guarded(call, lambda: move(self._pools[str(transfer.name)], keys, indices), [False] * len(keys))

    def _flush(self) -> None:
        for pool in self._pools.values():
            namespace = pool.store.namespace
            assert len(namespace) == NAMESPACE_BYTES, "an empty namespace would mean all of them"
            flushed = self._link.call(Flush(namespace), Flushed).result(FLUSH_S_MAX)
            log.info("flushed", pool=pool.name, pages=flushed.num_blocks)

    def _complain(self, call: str, error: StrataError) -> None:
        """Once in a while for each kind: a pool that is away fails every call."""
        now = time.monotonic()
        if now >= self._silent_until.get((call, error.code), now):
            self._silent_until[call, error.code] = now + COMPLAINT_S
            log.warning("call_failed", call=call, error=error.message)

    def _guarded(self, call: str, work: Callable[[], ResultT], miss: ResultT) -> ResultT:
        """What the work gives, or the miss if it fails."""
        try:
            return work()
        except StrataError as error:
            metrics.failed(call, error.code)
            self._complain(call, error)
        except Exception:
            # SGLang's threads end with what is raised to them, and the server hangs with them.
            log.exception("call_failed", call=call)
            metrics.failed(call, "bug")
        return miss


def _policy(transfer: PoolTransfer) -> Policy | None:
    return next((policy for policy in Policy if policy.value == transfer.hit_policy.value), None)


def _is_replicated(pool: HostKVCache, name: str) -> bool:
    """Whether all tensor-parallel ranks of a model with replicated KV hold the same in this pool."""
    return name not in _RANK_OWNED and not (name in _DRAFTS and isinstance(pool, MHATokenToKVPoolHost))
