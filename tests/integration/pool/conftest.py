"""Daemons for the tests of the pool, one per module; tests that harm theirs start their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stratakv import _native
from stratakv._native import Moves, fallback
from stratakv.pool.dmp_client import DmpConnection, TransportKind, connect
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import soon


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
