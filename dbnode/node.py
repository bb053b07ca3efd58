"""The DB node without its faces: tokenizer, workers, scheduler, inference, usage, put together and kept running.

Made by `dbnode.service`, which sets the REST and the SQL face upon it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from dbnode.all_workers import AllWorkers
from dbnode.conversations.metrics import ConversationMetrics
from dbnode.conversations.service import Conversations
from dbnode.conversations.store import ConversationStore
from dbnode.generate import Source
from dbnode.inference import InferenceService
from dbnode.metadata import Metadata
from dbnode.metrics import NodeMetrics
from dbnode.rest.app import RestFace
from dbnode.rest.http import Guard
from dbnode.scheduler.metrics import RouterMetrics
from dbnode.scheduler.pool_view import MetaCalls, PoolView
from dbnode.scheduler.scheduler import Scheduler
from dbnode.scheduler.workers import WorkerDirectory
from dbnode.statement_stats import StatementStats
from dbnode.suspects import Suspects
from dbnode.tenants.cache_quotas import CacheQuotas
from dbnode.tenants.directory import Directory
from dbnode.tenants.journals import read_journals
from dbnode.tenants.ledger import Ledger
from dbnode.tenants.quotas import Quotas
from dbnode.tenants.recovery import Journals, Recovery
from dbnode.upkeep import Upkeep
from dbnode.usage import UsageWriter
from dbnode.vllm.client import GoldenText, VllmClient
from dbnode.worker_client import WorkerClient
from stratakv.models import resolve, served_name
from stratakv.pool.auth import PoolCredentials
from stratakv.settings import Settings
from stratakv.text import encode, load_tokenizer
from stratakv.worker_address import vllm_addresses

KV_ELEMENT_BYTES = 2
GOLDEN_TEXT = "Fünf große Äpfel cost 3.50 €,\n\tfor i in range(10): 漢字 🙂 don't!"
"""What tokenizers differ on: accents, digits, spaces, code, signs of more than one token."""


class Node:
    """Owns everything below the faces. `run` keeps it going; `close` ends it."""

    def __init__(self, settings: Settings, meta: MetaCalls | None) -> None:
        """Loads the tokenizer, which takes up to a few seconds. Raises SetupError."""
        self.model = served_name(settings.model.name)
        model_dir = resolve(settings.model.name, settings.model.cache_dir.expanduser())
        tokenizer = load_tokenizer(model_dir)
        pool = PoolView(meta)
        credentials = PoolCredentials.from_settings(settings.pool)
        self.client = AllWorkers(
            WorkerClient(credentials),
            VllmClient(
                vllm_addresses(settings.router.workers).values(),
                self.model,
                GoldenText(GOLDEN_TEXT, encode(tokenizer, GOLDEN_TEXT, special=False)),
                pool,
                settings.router.vllm_api_key,
            ),
        )
        self.metrics = NodeMetrics(self.model)
        self._pool = pool
        self.metadata = Metadata(settings.database)
        self.tenants = Directory(settings.database)
        self.quotas = Quotas(Ledger(settings.database), settings.tenants)
        self._recovery = Recovery(settings.database, self._read_journals)
        self._cache_quotas = CacheQuotas(settings.database, meta)
        self.usage = UsageWriter(settings.database, self.metrics.usage_dropped.inc)
        self.upkeep = Upkeep(settings.database, settings.usage, settings.tenants, self.metrics.upkeep)
        self.statements = StatementStats(settings.database, self.metrics.statements_dropped.inc)
        self.directory = WorkerDirectory(
            settings.router, self.client, pool, self._on_workers_changed, credentials=credentials
        )
        self.metrics.registry.register(RouterMetrics(self.directory))
        scheduler = Scheduler(settings.router, self.directory, pool, kv_bytes_per_token(model_dir))
        self.inference = InferenceService(
            self.model,
            tokenizer,
            self.client,
            scheduler,
            suspects=Suspects(settings.router.poison_prompt_s),
            observers=(self.metrics, self.usage),
            waiting_max={Source.REST: settings.rest.requests_max, Source.SQL: settings.sql.calls_waiting_max},
            router=settings.router,
            quotas=self.quotas,
        )
        self.conversations = Conversations(
            ConversationStore(self.metadata, settings.conversations),
            self.inference,
            settings.router.request_timeout_s,
            ConversationMetrics(self.metrics.registry),
        )
        self.metrics.watch_admission(lambda: self.inference.admission.running, lambda: self.inference.admission.waiting)
        self.metrics.watch_suspects(lambda: self.inference.suspects.num_remembered)
        self._rest = settings.rest

    def rest_app(self) -> Guard:
        """The REST face over this node."""
        return RestFace(
            self._rest,
            self.inference,
            self.client,
            self.metrics.registry,
            self.not_ready,
            self._pool,
            self.tenants,
            self.quotas,
            self.conversations,
        ).app()

    def not_ready(self) -> list[str]:
        """Why no request should be sent here; empty when ready."""
        reasons = []
        if self.inference.draining:
            reasons.append("draining")
        if not self.directory.usable(self.model):
            reasons.append(f"no worker is there for model {self.model}")
        return reasons

    async def run(self) -> None:
        """Watch workers and tenants, and write usage, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.directory.run(), name="workers")
            tasks.create_task(self.tenants.run(), name="tenants")
            tasks.create_task(self.quotas.run(), name="quotas")
            tasks.create_task(self._recovery.run(), name="recovery")
            tasks.create_task(self._cache_quotas.run(), name="cache-quotas")
            tasks.create_task(self.usage.run(), name="usage")
            tasks.create_task(self.statements.run(), name="statements")
            tasks.create_task(self.upkeep.run(), name="upkeep")
            tasks.create_task(self.conversations.run(), name="conversations")

    async def close(self) -> None:
        await self.quotas.close()
        self._recovery.close()
        self._cache_quotas.close()
        await self.usage.close()
        await self.statements.close()
        await self.metadata.close()
        await self.client.close()
        self.inference.close()

    async def _read_journals(self, request_ids: Sequence[str]) -> Journals:
        return await read_journals(self.client, [record.url for record in self.directory.records], request_ids)

    def _on_workers_changed(self) -> None:
        self.inference.admission.wake()


def kv_bytes_per_token(model_dir: Path) -> int:
    """Bytes of keys and values per token at two bytes an element; enough for the router's estimates."""
    config = json.loads((model_dir / "config.json").read_text())
    num_heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    kv_heads = int(config.get("num_key_value_heads") or num_heads)
    return 2 * KV_ELEMENT_BYTES * int(config["num_hidden_layers"]) * kv_heads * head_dim
