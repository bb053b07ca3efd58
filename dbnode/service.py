"""Puts a DB node together and runs it: schema check, node, REST face, SQL face, drain.

`python -m dbnode` and `stratakv serve dbnode` come here.
"""

from __future__ import annotations

import asyncio

from dbnode.node import Node
from dbnode.own_usage import own_usage_topics
from dbnode.sql.admin.login import check_name
from dbnode.sql.front import SqlFront
from dbnode.sql_conversations import SqlConversations
from dbnode.sql_explain import SqlExplainer
from dbnode.sql_inference import SqlInference
from dbnode.sql_metrics import SqlMetrics
from stratakv import migrate
from stratakv.errors import SetupError
from stratakv.http_server import HttpServer
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.shards import pool_client
from stratakv.process import on_hangup, require_loopback, started
from stratakv.settings import Settings

log = EventLogger("dbnode")

DRAIN_S_MAX = 30.0
"""What is in flight when the node is told to end gets so long."""


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Run one DB node until `stop` is set and what is in flight has ended, or DRAIN_S_MAX has passed. Raises SetupError."""
    database_url = settings.database.url
    if database_url is None:
        raise SetupError(
            "database.url is not set", hint="set STRATAKV_DATABASE_URL, or start everything with `stratakv up`"
        )
    if settings.rest.api_key is None:
        require_loopback(settings.rest.host, "rest.host", "because rest.api_key is not set")
    rest = HttpServer(settings.rest.host, settings.rest.port, "rest")
    await asyncio.to_thread(migrate.check, database_url)
    await check_name(settings.sql.backend_url or database_url, settings.sql.admin_database)
    credentials = PoolCredentials.from_settings(settings.pool)
    meta = pool_client(settings.meta, role="dbnode", name=f"{settings.rest.host}:{rest.port}", credentials=credentials)
    node = Node(settings, meta)
    try:
        await node.tenants.load()
        sql = SqlFront(
            settings.sql,
            settings.sql.backend_url or database_url,
            SqlInference(node.inference, node.tenants),
            trusted_backend=settings.sql.backend_trusted,
            postgres_uid=settings.sql.backend_uid,
            statements=node.statements,
            explainer=SqlExplainer(node.inference, node.tenants),
            topics={
                **node.statements.topics(),
                **own_usage_topics(node.metadata),
                **SqlConversations(node.conversations, node.tenants).topics(),
            },
        )
        node.metrics.registry.register(SqlMetrics(sql))
        await sql.start()
        on_hangup(sql.reload)
        try:
            await _run(settings, node, rest, sql, stop)
        finally:
            await sql.close()
    finally:
        await node.close()
        await meta.close()


async def _run(settings: Settings, node: Node, rest: HttpServer, sql: SqlFront, stop: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        http = tasks.create_task(rest.run(node.rest_app()), name="rest")
        upkeep = tasks.create_task(node.run(), name="node")
        started()
        log.info(
            "ready",
            rest=f"http://{settings.rest.host}:{rest.port}/v1",
            sql=f"postgresql://{settings.sql.host}:{sql.port}",
            model=node.model,
        )
        await stop.wait()
        log.info("draining", in_flight=node.inference.in_flight)
        await sql.drain()  # before new requests are refused: rows of running statements are new requests
        node.inference.draining = True
        if not await node.inference.drained(DRAIN_S_MAX):
            log.warning("drain_gave_up", in_flight=node.inference.in_flight)
        rest.stop()
        await http
        upkeep.cancel()
