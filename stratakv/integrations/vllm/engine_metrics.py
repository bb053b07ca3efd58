"""The connector's counters on their way through vLLM: from its scheduler to its log, and to the metrics that it serves."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from stratakv.integrations.vllm.counters import COUNTERS, Counts, added
from stratakv.integrations.vllm.rates import Distance


class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """`Counts` of some time."""

    data: Counts

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return ConnectorStats(added(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        return {
            " ".join(filter(None, (name.removeprefix("stratakv_vllm_"), distance))): round(count, 3)
            for name, by_distance in self.data.items()
            for distance, count in by_distance.items()
        }

    def is_empty(self) -> bool:
        return not self.data


class ConnectorMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """In the process that serves vLLM's metrics."""

    def __init__(self, config: Any, metric_types: Any, labels: list[str], engines: dict[int, list[object]]) -> None:
        super().__init__(config, metric_types, labels, engines)
        self._children: dict[tuple[int, str, str], Counter] = {}
        for spec in COUNTERS:
            distances = [distance.value for distance in Distance] if spec.by_distance else [""]
            more = ["distance"] if spec.by_distance else []
            counter = self._counter_cls(name=spec.name, documentation=spec.what, labelnames=[*labels, *more])
            for engine, values in engines.items():
                for distance in distances:
                    child = counter.labels(*values, *([distance] if distance else []))
                    self._children[engine, spec.name, distance] = child

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, by_distance in transfer_stats_data.items():
            for distance, count in by_distance.items():
                self._children[engine_idx, name, distance].inc(count)
