"""One meta server with the KVCM API for a module's tests, and a client per transport."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest

from stratakv import migrate
from stratakv.postgres import EmbeddedPostgres
from tests.kvcm_clients import TRANSPORTS, Client, KvcmProcess, running

Register = Callable[..., Awaitable[str]]


@pytest.fixture(scope="module")
def server(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KvcmProcess]:
    name = f"kvcm_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        url = postgres.database_url(name)
        migrate.upgrade(url)
        with running(KvcmProcess(url, tmp_path_factory.mktemp("kvcm"), kvcm_probe_s=0.2)) as process:
            yield process
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(params=TRANSPORTS)
def client(server: KvcmProcess, request: pytest.FixtureRequest) -> Client:
    """Over each transport in turn."""
    return TRANSPORTS[request.param](server.ports)


@pytest.fixture
def register(client: Client) -> Register:
    """Registers a new instance; its id."""

    async def register(**fields: Any) -> str:
        instance = {
            "instance_id": uuid.uuid4().hex,
            "instance_group": "default",
            "block_size": 4,
            "location_spec_infos": [{"name": "tp0", "size": 64}, {"name": "tp1", "size": 64}],
            "location_spec_groups": [{"name": "first", "spec_names": ["tp0"]}],
        } | fields
        await client.ok("RegisterInstance", **instance)
        return str(instance["instance_id"])

    return register
