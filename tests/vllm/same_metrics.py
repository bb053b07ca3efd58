"""Run by vLLM's Python: what workers report is what vLLM serves, for the engine that it happened in."""

from __future__ import annotations

from collections import Counter as CounterOf
from types import SimpleNamespace
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from stratakv.integrations.vllm import StrataKVConnector
from stratakv.integrations.vllm.counters import COUNTERS, counted
from stratakv.integrations.vllm.engine_metrics import ConnectorStats
from stratakv.integrations.vllm.orders import StepReport
from stratakv.integrations.vllm.rates import Distance

LABELS = ["model_name", "engine"]


def main() -> None:
    config: Any = SimpleNamespace(kv_transfer_config=None)
    types: Any = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    metrics = StrataKVConnector.build_prom_metrics(config, types, LABELS, {0: ["m", "0"], 1: ["m", "1"]})
    assert metrics is not None
    for step in (1, 2):
        report = StepReport(CounterOf({Distance.FAR: 100 * step}), {Distance.FAR: 0.5}, loads=step, saved_blocks=7)
        stats = StrataKVConnector.build_kv_connector_stats(counted(report))
        assert isinstance(stats, KVConnectorStats)
        metrics.observe(stats.to_dict(), 1)
    assert [value("loads", "1"), value("loads", "0"), value("blocks_saved", "1")] == [3, 0, 14]
    assert value("tokens_loaded", "1", distance="far") == 300
    assert value("tokens_loaded", "1", distance="near") == 0
    assert all(REGISTRY._names_to_collectors[f"{counter.name}_total"] for counter in COUNTERS)
    summed = ConnectorStats(counted(report)).aggregate(ConnectorStats(counted(report)))
    assert summed.reduce() == {"loads": 4, "tokens_loaded far": 400, "load_seconds far": 1.0, "blocks_saved": 14}
    assert ConnectorStats(counted(StepReport())).is_empty()
    print("same")


def value(name: str, engine: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"stratakv_vllm_{name}_total", {"model_name": "m", "engine": engine, **labels})


if __name__ == "__main__":
    main()
