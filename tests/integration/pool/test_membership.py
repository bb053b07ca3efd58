"""A pool with a secret: who does not know it reaches no daemon, no meta server and no worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from dbnode.errors import WorkerUnreachable
from dbnode.worker_client import WorkerClient
from stratakv.errors import Unavailable
from stratakv.http_server import HttpServer
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.dmp_client import TransportKind, connect
from stratakv.pool.errors import NotAMember
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import MetaSettings
from stratakv.wire import ListNodes, Nodes
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import soon
from tests.meta_process import MetaProcess
from tests.service_process import ServiceProcess
from tests.support import eventually_async, free_port
from workers.membership import MembersOnly

SECRET = "a secret of the pool under test"
OURS, THEIRS = PoolCredentials(SECRET), PoolCredentials("the secret of another pool")


def test_a_daemon_serves_those_who_know_its_secret(start_daemon: Callable[..., DaemonProcess]) -> None:
    segment = start_daemon(flags=("--secret", SECRET)).segment
    for stranger in (None, THEIRS):
        with pytest.raises(NotAMember):
            connect(segment, deadline=soon(), force=TransportKind.TCP, credentials=stranger)
    connection = connect(segment, deadline=soon(), force=TransportKind.TCP, credentials=OURS)
    assert connection.allocate(b"p" * 16, 2, 4096, 10.0, deadline=soon())
    connection.close()


def test_a_member_sends_nothing_to_a_daemon_that_cannot_prove_itself(daemon: DaemonProcess) -> None:
    with pytest.raises(NotAMember, match="does not know the secret"):
        connect(daemon.segment, deadline=soon(), force=TransportKind.TCP, credentials=OURS)


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("dmp", ("--host", "0.0.0.0", "--port", "0", "--segment-bytes", "2MiB")),
        ("meta_server", ("--host", "0.0.0.0", "--native-port", "0")),
        ("workers", ("--host", "0.0.0.0", "--port", "0")),
    ],
)
def test_no_service_listens_beyond_this_machine_without_a_secret(
    module: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    service = ServiceProcess(module, list(flags), {}, tmp_path / "log")
    service.start()
    assert service.wait() == 2
    assert "without a secret" in service.log()


def test_a_daemon_on_all_addresses_must_name_one(tmp_path: Path) -> None:
    flags = ["--host", "0.0.0.0", "--port", "0", "--segment-bytes", "2MiB", "--secret", SECRET]
    service = ServiceProcess("dmp", flags, {}, tmp_path / "log")
    service.start()
    assert service.wait() == 2
    assert "dmp.public_host" in service.log()


async def test_the_meta_server_hears_members_only(migrated_url: str, tmp_path: Path) -> None:
    server = MetaProcess(migrated_url, tmp_path, secret=SECRET)
    server.start()
    settings = MetaSettings(native_port=server.port, request_timeout_s=1.0)
    try:
        async with MetaClient(settings, credentials=OURS) as member:
            await eventually_async(lambda: member.available, what="the meta server answers a member")
            assert await member.call(ListNodes(), Nodes) == Nodes([])
            for credentials in (None, THEIRS):
                async with MetaClient(settings, credentials=credentials) as stranger:
                    with pytest.raises(Unavailable, match="does not answer"):
                        await stranger.call(ListNodes(), Nodes)
            assert await member.call(ListNodes(), Nodes) == Nodes([])
    finally:
        server.stop()


@asynccontextmanager
async def _guarded_worker() -> AsyncIterator[str]:
    async def load(request: Request) -> JSONResponse:
        return JSONResponse({"running": 3})

    async def echo(request: Request) -> JSONResponse:
        return JSONResponse({"body": (await request.body()).decode()})

    app = Starlette(routes=[Route("/load", load), Route("/cache/drop", echo, methods=["POST"])])
    port = free_port()
    server = HttpServer("127.0.0.1", port, "worker")
    serving = asyncio.create_task(server.run(MembersOnly(app, OURS)))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
        await serving


async def test_a_worker_answers_members_only() -> None:
    async with _guarded_worker() as url:
        member = WorkerClient(OURS)
        many = await asyncio.gather(*(member.load(url, 5.0) for _ in range(20)))
        assert {load.running for load in many} == {3}
        assert await member.drop_cache(url, b'{"tiers": []}', 5.0) == {"body": '{"tiers": []}'}
        await member.close()
        for credentials in (None, THEIRS):
            stranger = WorkerClient(credentials)
            with pytest.raises(WorkerUnreachable, match=r"pool\.secret"):
                await stranger.load(url, 5.0)
            await stranger.close()
