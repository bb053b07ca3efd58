"""Daemons for the tests of the pool, one per module; tests that harm theirs start their own."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from stratakv import _native
from stratakv._native import Moves, fallback
from stratakv.pool.dmp_client import DmpConnection, TransportKind, connect
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import MetaSettings
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import soon
from tests.service_process import ServiceProcess
from tests.support import eventually_async, free_port


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("dmp") / "log") as running:
        yield running


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Starts a daemon that this test may harm."""
    numbers = itertools.count()
    with ExitStack() as stack:

        def start(**options: object) -> DaemonProcess:
            log_file = tmp_path / f"dmp-{next(numbers)}.log"
            return stack.enter_context(DaemonProcess(log_file, **options))  # type: ignore[arg-type]

        yield start


@pytest.fixture(params=[TransportKind.SHM, TransportKind.TCP])
def kind(request: pytest.FixtureRequest) -> TransportKind:
    kind: TransportKind = request.param
    return kind


@pytest.fixture(params=["native", "python"])
def moves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Moves:
    """The test runs with either implementation of the moves."""
    if request.param == "native" and _native.moves is fallback:
        pytest.skip("the C++ module was not built")
    if request.param == "python":
        monkeypatch.setattr(_native, "moves", fallback)
    return _native.moves


@pytest.fixture
def connection(daemon: DaemonProcess, kind: TransportKind) -> Iterator[DmpConnection]:
    connected = connect(daemon.segment, deadline=soon(), force=kind)
    yield connected
    connected.close()


@pytest.fixture
def meta_port() -> int:
    return free_port()


@pytest.fixture
def meta_flags() -> list[str]:
    """Of this module's meta server."""
    return ["--heartbeat-s", "0.2"]


@pytest.fixture
def meta_server(migrated_url: str, meta_port: int, meta_flags: list[str], tmp_path: Path) -> Iterator[ServiceProcess]:
    env = {"STRATAKV_DATABASE_URL": migrated_url, "STRATAKV_META_NATIVE_PORT": str(meta_port)}
    service = ServiceProcess("meta_server", meta_flags, env, tmp_path / "meta.log")
    service.start()
    yield service
    service.kill()


@pytest_asyncio.fixture
async def client(meta_server: ServiceProcess, meta_port: int) -> AsyncIterator[MetaClient]:
    async with MetaClient(replace(MetaSettings(), native_port=meta_port)) as started:
        await eventually_async(lambda: started.available, what="meta server to answer")
        yield started
