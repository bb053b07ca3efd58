"""Keeps the meta server informed of this worker: registers, then heartbeats with the current load, for as long as it runs."""

from __future__ import annotations

import asyncio
import random

from stratakv.errors import StrataError
from stratakv.log import EventLogger
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import HeartbeatWorker, Registered, RegisterWorker, WorkerOrders
from workers.runtime import Runtime

log = EventLogger("workers.registration")

RETRY_S = 1.0


async def stay_registered(runtime: Runtime, meta: MetaClient) -> None:
    """Runs until cancelled; a meta server that is away is tried again with jitter."""
    heartbeat_s = 0.0
    while True:
        try:
            if heartbeat_s == 0.0:
                reply = await meta.call(RegisterWorker(runtime.info), Registered)
                heartbeat_s = reply.heartbeat_s
                log.info("registered", worker=runtime.info.worker)
            load = runtime.load()
            runtime.metrics.observe_load(load)
            orders = await meta.call(HeartbeatWorker(runtime.info.worker, runtime.info.epoch, load), WorkerOrders)
            if not orders.known:
                heartbeat_s = 0.0
                continue
            await asyncio.sleep(heartbeat_s)
        except StrataError as error:
            log.debug("meta_server_unavailable", error=error.message)
            heartbeat_s = 0.0
            await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))
