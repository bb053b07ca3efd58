"""`StrataKVConnector`: what vLLM calls, in its scheduler and in each of its workers; hands on to the one side or the other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

from stratakv._native import is_built
from stratakv.errors import SetupError
from stratakv.integrations.link import PoolLink, read_credentials
from stratakv.integrations.vllm.engine_metrics import ConnectorMetrics, ConnectorStats
from stratakv.integrations.vllm.fingerprint import rank_namespace
from stratakv.integrations.vllm.group_pages import GroupPages, RankMemory
from stratakv.integrations.vllm.group_specs import groups_of
from stratakv.integrations.vllm.keys import RequestKeys
from stratakv.integrations.vllm.kv_tensors import layer_tensors, layout_of
from stratakv.integrations.vllm.options import LoadMode, parse_options
from stratakv.integrations.vllm.orders import Rank, RankSpec, StepOrders, StepReport
from stratakv.integrations.vllm.scheduler_side import INTRODUCTION, SchedulerSide
from stratakv.integrations.vllm.worker_side import WorkerSide, dtype_name
from stratakv.log import EventLogger, log_as_guest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = EventLogger("stratakv.vllm")


@dataclass
class OrdersMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to the workers, once per step."""

    orders: StepOrders = field(default_factory=StepOrders)


@dataclass
class SpecMetadata(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """From a worker to the scheduler, once."""

    spec: RankSpec


@dataclass
class ReportMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the workers to the scheduler, once per step."""

    report: StepReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, ReportMetadata)
        self.report.add(other.report)
        return self


class StrataKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """vLLM's prefix cache, continued in a StrataKV pool."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Raises SetupError for what cannot be served."""
        super().__init__(vllm_config, role, kv_cache_config)
        log_as_guest()
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        self._options = parse_options(transfer.kv_connector_extra_config)
        self._groups = groups_of(vllm_config, kv_cache_config)
        if transfer.kv_load_failure_policy != "recompute":
            raise SetupError(
                "a block that cannot be loaded would fail its request",
                hint='Add "kv_load_failure_policy": "recompute" to --kv-transfer-config.',
            )
        self._link = PoolLink(
            self._options.meta,
            credentials=read_credentials(self._options.pool_secret_file),
            role="vllm",
            name=f"{os.uname().nodename}-{os.getpid()}",
        )
        self._scheduler = self._make_scheduler_side() if role is KVConnectorRole.SCHEDULER else None
        self._worker: WorkerSide | None = None

    # In each worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        node = self._options.node or self._link.local_node()
        if not is_built():
            log.info("native_module_missing", effect="pages are moved by Python, slower")
        rank: Rank = (get_tensor_model_parallel_rank(), get_pp_group().rank_in_group)
        groups = [self._pages_of(n, kv_caches, rank) for n in range(len(self._groups.groups))]
        for pages in groups:
            log.info(
                "joined", node=node, namespace=pages.namespace.hex(), page_bytes=pages.layout.page_bytes, rank=rank
            )
        memory = RankMemory(rank, groups, self._groups.are_plain)
        self._worker = WorkerSide(self._link, self._options, memory, node, f"vllm-{os.uname().nodename}-{os.getpid()}")

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return SpecMetadata(self._worker.spec) if self._worker is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None:
            self._worker.take_back(_orders(kv_connector_metadata))

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin_step(_orders(connector_metadata))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self._worker is not None and self.has_connector_metadata():
            self._worker.start_loads(_orders(self._get_connector_metadata()))

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        if self._worker is not None:
            self._worker.layer_saved(layer_name)

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        sent, received = self._worker.finished()
        return KVConnectorTransferResults(sent, received, self._worker.take_failed())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._worker.take_report() if self._worker is not None else None
        return ReportMetadata(report) if report else None

    # In the scheduler.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.cache_known(kv_cache_manager)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """vLLM's keys are (pipeline rank, tensor rank)."""
        if self._scheduler is not None:
            self._scheduler.ranks_known({(tp, pp): _spec(sent) for (pp, tp), sent in metadata.items()})

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None or request.skip_reading_prefix_cache:
            return 0, False
        return self._scheduler.num_tokens_to_load(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.blocks_allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        scheduler = self._scheduler
        assert scheduler is not None
        counts = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            scheduler.request_scheduled(
                new.req_id, new.block_ids, new.num_computed_tokens, counts[new.req_id], is_anew=True
            )
        cached = scheduler_output.scheduled_cached_reqs
        known = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for request_id, blocks, num_computed_tokens in known:
            scheduler.request_scheduled(
                request_id,
                blocks or (),
                num_computed_tokens,
                counts[request_id],
                is_anew=request_id in cached.resumed_req_ids,
            )
        return OrdersMetadata(scheduler.take_orders(scheduler_output.preempted_req_ids or ()))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._scheduler is not None:
            sent = connector_output.kv_connector_worker_meta
            report = sent.report if isinstance(sent, ReportMetadata) else None
            self._scheduler.step_done(
                connector_output.finished_recving or (),
                connector_output.failed_recving,
                connector_output.invalid_block_ids,
                report,
            )

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        num_final_tokens = request.num_computed_tokens - request.num_in_flight_tokens
        must_wait = self._scheduler.request_finished(request, block_ids, num_final_tokens)
        is_asked_who = INTRODUCTION in (request.kv_transfer_params or {})
        return must_wait, self._scheduler.introduction() if is_asked_who else None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """vLLM asks both sides; what the workers have to tell goes with their reports."""
        counts = self._scheduler.take_counts() if self._scheduler is not None else None
        return ConnectorStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return ConnectorStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return ConnectorMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def take_events(self) -> Iterable[KVCacheEvent]:
        return ()

    def reset_cache(self) -> bool:
        return self._scheduler is None or self._scheduler.flush()

    # In both.

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        elif self._scheduler is not None:
            self._scheduler.close()
        else:
            self._link.close()

    @property
    def requires_kv_delivery(self) -> bool:
        """A lost save is only a later miss."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return extra_config.get("load") == LoadMode.LAYERWISE

    def _make_scheduler_side(self) -> SchedulerSide:
        config = self._vllm_config
        cache = config.cache_config
        hash_tokens = self._kv_cache_config.hash_block_size or cache.hash_block_size
        keys = RequestKeys(self._groups.key_tokens, hash_tokens, cache.prefix_caching_hash_algo)
        return SchedulerSide(
            self._link,
            self._options,
            self._groups,
            keys,
            may_load_layerwise=self._may_load_layerwise(),
            are_steps_apart=not self._do_steps_overlap(),
        )

    def _pages_of(self, group: int, kv_caches: dict[str, torch.Tensor], rank: Rank) -> GroupPages:
        """What pages of one group are in this rank. Raises SetupError."""
        config = self._kv_cache_config
        if len(self._groups.groups) > 1:
            of_group = config.kv_cache_groups[group].layer_names
            kv_caches = {name: kv_caches[name] for name in of_group if name in kv_caches}
        if not kv_caches:
            raise SetupError(f"rank {rank} has no layer of the KV caches of group {group}, which is not supported")
        layers = layer_tensors(kv_caches, config.num_blocks)
        layout = layout_of(layers, self._groups.groups[group].block_size, dtype_name(kv_caches), group, *rank)
        namespace = rank_namespace(self._vllm_config, self._options, self._groups, layers, layout)
        return GroupPages.of(layers, layout, namespace)

    def _do_steps_overlap(self) -> bool:
        """Whether vLLM plans a step before it knows how the one before it went."""
        config = self._vllm_config
        return bool(config.scheduler_config.async_scheduling or config.parallel_config.pipeline_parallel_size > 1)

    def _may_load_layerwise(self) -> bool:
        """Whether a step can wait for layers. Raises SetupError if that is asked for and cannot be."""
        is_asked_for = self._options.load is LoadMode.LAYERWISE
        if is_asked_for and self._do_steps_overlap():
            raise SetupError(
                "layer-wise loading needs steps that do not overlap",
                hint="Start vLLM with --no-async-scheduling and without pipeline parallelism, or leave out load.",
            )
        if is_asked_for and not self._groups.are_plain:
            raise SetupError(
                "a model with sliding windows cannot be loaded layer by layer: vLLM can recompute only whole requests",
                hint="Leave out load, or start vLLM with --disable-hybrid-kv-cache-manager.",
            )
        if self._do_steps_overlap() or not self._groups.are_plain:
            return False
        # CUDA graphs skip the hooks of layers unless they are told not to, which only `layerwise` does.
        return is_asked_for or self._vllm_config.device_config.device_type == "cpu"


def _orders(metadata: KVConnectorMetadata) -> StepOrders:
    assert isinstance(metadata, OrdersMetadata)
    return metadata.orders


def _spec(metadata: KVConnectorHandshakeMetadata) -> RankSpec:
    assert isinstance(metadata, SpecMetadata)
    return metadata.spec
