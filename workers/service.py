"""Puts a worker together and runs it: model, engine, tiers, HTTP face, registration, drain.

`python -m workers` and `stratakv serve worker` come here.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from stratakv.errors import SetupError
from stratakv.http_server import HttpServer
from stratakv.keys import Namespace, NamespaceScope
from stratakv.layout import KVLayout
from stratakv.log import EventLogger
from stratakv.models import ModelIdentity, model_identity, resolve, served_name
from stratakv.pool.auth import PoolCredentials, require_credentials
from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.mooncake import transfer_engine
from stratakv.pool.shards import of_namespace
from stratakv.process import advertised_host, started
from stratakv.profile_store import ProfileStore
from stratakv.settings import Settings, WorkerSettings
from stratakv.text import load_tokenizer
from stratakv.wire import EPOCH_BYTES, WorkerInfo
from workers.engine.config import EngineConfig, EngineDtype
from workers.engine.engine import Engine
from workers.engine.model_config import ModelFacts
from workers.engine.structured import Structures
from workers.handover.client import HandoverClient
from workers.handover.incoming import HandoverTaker
from workers.handover.outgoing import HandoverBook
from workers.http import create_app
from workers.kv_events import KvEventPublisher
from workers.metrics import WorkerMetrics
from workers.profiling import profile_key
from workers.rates import Rates
from workers.registration import stay_registered
from workers.request_journal import RequestJournal
from workers.runtime import Runtime
from workers.tiers.tiers import Tiers
from workers.warmup import Profiling, warm_up

log = EventLogger("workers")

DRAIN_S_MAX = 30.0


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run one worker until `stop` is set and what is in flight has ended, or DRAIN_S_MAX has passed."""
    worker = settings.worker
    credentials = PoolCredentials.from_settings(settings.pool)
    require_credentials(worker.host, "worker.host", credentials)
    server = HttpServer(worker.host, worker.port, "worker")
    loop = asyncio.get_running_loop()
    parts = await asyncio.to_thread(_build, settings, credentials, loop)
    runtime = parts.runtime
    events = KvEventPublisher(parts.engine.kv_cache, worker.host, worker.events_port, credentials)
    runtime.publishes(events.events_port, events.replay_port)
    parts.engine.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            http = tasks.create_task(server.run(create_app(runtime, credentials)), name="http")
            await warm_up(parts.engine, parts.rates, parts.profiling)
            started()
            runtime.open()
            telling = tasks.create_task(events.run(), name="kv-events")
            log.info(
                "ready", worker=runtime.info.worker, url=runtime.info.url, model=runtime.info.model, role=worker.role
            )
            registration = tasks.create_task(stay_registered(runtime, parts.meta), name="registration")
            await stop.wait()
            await _drain(runtime)
            registration.cancel()
            telling.cancel()
            server.stop()
            await http
    finally:
        await asyncio.to_thread(parts.engine.shutdown)
        events.close()
        if parts.taker is not None:
            await parts.taker.close()
        if parts.tiers is not None:
            await parts.tiers.close()
        await parts.meta.close()


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a worker is put together of, as far as it has to be started and ended."""

    runtime: Runtime
    engine: Engine
    rates: Rates
    profiling: Profiling
    meta: MetaClient
    tiers: Tiers | None
    taker: HandoverTaker | None


def _build(settings: Settings, credentials: PoolCredentials | None, loop: asyncio.AbstractEventLoop) -> _Parts:
    worker = settings.worker
    directory = resolve(settings.model.name, settings.model.cache_dir)
    identity = model_identity(directory)
    engine = _engine(worker, directory)
    facts = engine.model.facts
    layout = facts.kv_layout(worker.block_size)
    host = advertised_host(worker.host, worker.public_host, "worker")
    info = _info(settings, identity, facts, layout, host)
    namespace = Namespace(info.namespace)
    meta = MetaClient(of_namespace(settings.meta, namespace), credentials=credentials)
    metrics = WorkerMetrics(info.model)
    rates = Rates()
    handovers = HandoverBook(namespace, loop)
    tiers, taker = None, None
    if worker.pool_enabled:
        transfers = transfer_engine(host, settings.pool.transfer_engine)
        connections = ConnectionCache(
            shared_memory=settings.pool.shared_memory, credentials=credentials, engine=transfers
        )
        listen = handovers.listener
        tiers = Tiers(info, layout, worker, meta, connections, engine.kv_cache, rates, metrics, loop, listen)
        client = HandoverClient(credentials)
        taker = HandoverTaker(namespace, tiers, engine.reservations, engine.num_cached_blocks, client, metrics)
    metrics.watch(engine.kv_cache, lambda: tiers.num_l2_pages if tiers is not None else 0, layout.page_bytes)
    metrics.watch_engine(engine.stats)
    engine.attach(tiers)
    tokenizer = load_tokenizer(directory)
    structures = Structures(tokenizer, facts.vocab_size, sorted(facts.eos_token_ids))
    runtime = Runtime(
        info,
        facts.dtype,
        engine,
        tiers,
        tokenizer,
        structures,
        rates,
        metrics,
        handovers,
        taker,
        _journal(settings, info.worker),
    )
    profiling = Profiling(
        ProfileStore(settings.model.cache_dir),
        profile_key(info.model, identity, engine),
        worker.profile_s,
        tiers.bandwidth_probe(engine.reservations, engine.config.num_blocks).measure if tiers is not None else None,
    )
    return _Parts(runtime, engine, rates, profiling, meta, tiers, taker)


def _engine(worker: WorkerSettings, model_dir: Path) -> Engine:
    """Raises SetupError."""
    return Engine(
        EngineConfig(
            model_dir=model_dir,
            dtype=_dtype(worker.dtype),
            device=None if worker.device == "auto" else worker.device,
            block_size=worker.block_size,
            num_blocks=-(-worker.l1_tokens // worker.block_size),
            num_threads=worker.threads or None,
            max_running=worker.max_running,
            max_waiting=worker.max_waiting,
            max_batched_tokens=worker.max_batched_tokens,
            load_ahead_requests=worker.load_ahead_requests,
            load_ahead_bytes=worker.load_ahead_bytes,
        )
    )


def _info(settings: Settings, identity: ModelIdentity, facts: ModelFacts, layout: KVLayout, host: str) -> WorkerInfo:
    """What it tells of itself; `host` is where others reach it."""
    worker = settings.worker
    scope = NamespaceScope(
        model_revision=identity.revision,
        tokenizer_digest=identity.tokenizer_digest,
        dtype=facts.dtype,
        layout_digest=layout.digest(),
        block_size=worker.block_size,
    )
    return WorkerInfo(
        worker=worker.name or f"{worker.role}-{worker.port}",
        epoch=os.urandom(EPOCH_BYTES),
        url=f"http://{host}:{worker.port}",
        role=worker.role,
        model=served_name(settings.model.name),
        namespace=scope.namespace(),
        block_size=worker.block_size,
        max_model_len=facts.max_model_len,
        node=worker.node or None,
    )


def _journal(settings: Settings, worker: str) -> RequestJournal | None:
    """Raises SetupError."""
    directory = settings.worker.journal_dir
    return None if directory is None else RequestJournal(directory.expanduser(), worker)


def _dtype(name: str) -> EngineDtype:
    try:
        return EngineDtype(name)
    except ValueError:
        raise SetupError(f"worker.dtype = {name!r}: expected one of {', '.join(EngineDtype)}") from None


async def _drain(runtime: Runtime) -> None:
    """Refuse new requests and wait for those in flight."""
    runtime.draining = True
    try:
        await asyncio.wait_for(runtime.wait_idle(), DRAIN_S_MAX)
    except TimeoutError:
        log.warning("drain_incomplete", in_flight=runtime.in_flight)
