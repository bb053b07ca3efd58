"""A real pool for SGLang's classes: meta server, daemon, PostgreSQL. Without sglang installed nothing here is collected."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from tests.integration.pool.daemon import DaemonProcess
from tests.meta_process import MetaProcess
from tests.support import eventually

if TYPE_CHECKING:
    from stratakv.integrations.sglang import StrataKVStorage

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]


_libraries: list[Any] = []


def _let_torchvision_be_imported() -> None:
    """SGLang imports it for images. A wheel for another build of torch lacks operators that its import looks up."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _libraries[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if find_spec("sglang"):
    _let_torchvision_be_imported()


@dataclass
class Pool:
    """Processes of one pool."""

    directory: Path
    database_url: str
    meta: MetaProcess = field(init=False)
    daemons: dict[str, DaemonProcess] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        migrate.upgrade(self.database_url)
        self.meta = MetaProcess(self.database_url, self.directory, heartbeat_s=0.2)
        self.meta.start()
        self._stack.callback(lambda: self.meta.kill())

    def start_daemon(self, node: str, **options: Any) -> DaemonProcess:
        daemon = DaemonProcess(self.directory / f"{node}.log", node=node, meta_port=self.meta.port, **options)
        self.daemons[node] = self._stack.enter_context(daemon)
        eventually(lambda: any(e["event"] == "registered" for e in daemon.events()), what="daemon to register")
        return daemon

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def make_pool(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Pool]]:
    """Starts a pool with one daemon, `dmp-t`."""
    with ExitStack() as stack:

        def make() -> Pool:
            directory = tmp_path_factory.mktemp("pool")
            name = f"sglang_{os.urandom(4).hex()}"
            with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            pool = Pool(directory, postgres.database_url(name))
            stack.callback(pool.close)
            pool.start_daemon("dmp-t")
            return pool

        yield make


@pytest.fixture(scope="module")
def pool(make_pool: Callable[[], Pool]) -> Pool:
    """One for the tests of a module that do it no harm."""
    return make_pool()


@pytest.fixture
def make_storage(request: pytest.FixtureRequest) -> Iterator[Callable[..., StrataKVStorage]]:
    """Makes a storage as SGLang does, with a host pool registered; `pool` is the module's unless another is given."""
    from tests.sglang.sglang_server import make_storage as make

    with ExitStack() as stack:

        def make_one(host_pool: Any, on: Pool | None = None, **options: Any) -> StrataKVStorage:
            pool: Pool = on or request.getfixturevalue("pool")
            storage = make(host_pool, pool.meta.endpoint, **options)
            stack.callback(storage.close)
            return storage

        yield make_one
