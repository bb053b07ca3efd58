"""Every metric is documented with the name under which it is scraped, and every name that is documented exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.registry import Collector

from dbnode.conversations.metrics import ConversationMetrics
from dbnode.metrics import NodeMetrics
from dbnode.scheduler.metrics import RouterMetrics
from dbnode.scheduler.pool_view import PoolView
from dbnode.scheduler.workers import WorkerDirectory
from dbnode.worker_base import WorkerDoor
from dmp.allocator import ExtentAllocator
from dmp.disk.store import DiskStore
from dmp.metrics import DaemonMetrics
from dmp.puts import PutTable
from dmp.traffic import no_traffic
from meta_server.metrics import PoolCollector
from stratakv.integrations.sglang import metrics as sglang
from stratakv.integrations.vllm.counters import COUNTERS
from stratakv.pool.messages import DaemonStats
from stratakv.settings import RouterSettings
from tests.pool_world import World
from workers.metrics import WorkerMetrics

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
_ROW = re.compile(r"^\| (`stratakv_[^|]*)\|", re.MULTILINE)
_NAME = re.compile(r"`(stratakv_\w+)`")


def documented(prefix: str) -> set[str]:
    names = {name for row in _ROW.findall(PAGE.read_text()) for name in _NAME.findall(row)}
    return {name for name in names if name.startswith(prefix)}


def told(registry: CollectorRegistry | Collector) -> set[str]:
    return {f"{m.name}_total" if m.type == "counter" else m.name for m in registry.collect()}


def test_those_of_a_daemon(tmp_path: Path) -> None:
    metrics, puts = DaemonMetrics(), PutTable(ExtentAllocator(4096), lambda: 0.0)
    stats = DaemonStats(4096, 0, 0, 0, 0, 0, 0)
    metrics.watch(puts, DiskStore(tmp_path, 4096, 4096), lambda: stats, no_traffic)
    assert told(metrics.registry) == documented("stratakv_dmp_")


def test_those_of_the_meta_server() -> None:
    world = World()
    assert told(PoolCollector(lambda: world.handlers)) == documented("stratakv_pool_") - {"stratakv_pool_errors_total"}
    world.close()


def test_those_of_the_router() -> None:
    directory = WorkerDirectory(RouterSettings(), cast(WorkerDoor, None), PoolView(None), lambda: None)
    assert told(RouterMetrics(directory)) == documented("stratakv_router_")


def test_those_of_the_sglang_integration() -> None:
    assert {name for name in told(REGISTRY) if name.startswith("stratakv_sglang_")} == documented("stratakv_sglang_")
    assert sglang.FAILURES.describe()


def test_those_of_the_vllm_integration() -> None:
    assert {f"{counter.name}_total" for counter in COUNTERS} == documented("stratakv_vllm_")


def test_those_of_conversations() -> None:
    registry = CollectorRegistry()
    ConversationMetrics(registry)
    assert told(registry) == documented("stratakv_conversation")


@pytest.mark.parametrize("registry", [WorkerMetrics("m").registry, NodeMetrics("m").registry], ids=["worker", "node"])
def test_those_of_workers_and_db_nodes(registry: CollectorRegistry) -> None:
    assert told(registry) <= documented("stratakv_")
