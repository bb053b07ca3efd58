"""The meta server refuses to start where it cannot work, with exit status 2 and a message that says what to do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psycopg
import pytest

from tests.kvcm_clients import GrpcClient, HttpClient, Ports
from tests.meta_process import MetaProcess
from tests.service_process import ServiceProcess
from tests.support import eventually, eventually_async, free_port


def test_an_unmigrated_database_is_refused(postgres_url: str, tmp_path: Path) -> None:
    status, errors = MetaProcess(postgres_url, tmp_path).run()
    assert status == 2
    assert "is at revision none" in errors
    assert "stratakv migrate upgrade" in errors


def test_a_database_of_an_unknown_revision_is_refused(migrated_url: str, tmp_path: Path) -> None:
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        connection.execute("UPDATE stratakv.schema_version SET version_num = '9999', compatible = '9999'")
    status, errors = MetaProcess(migrated_url, tmp_path).run()
    assert status == 2
    assert "9999" in errors


async def test_with_a_postgresql_of_its_own_it_needs_nothing_else_and_finds_everything_again(tmp_path: Path) -> None:
    ports = Ports.free()
    numbers = {"native_port": free_port(), **ports.numbers}
    flags = [f"--{name.replace('_', '-')}={number}" for name, number in numbers.items()]
    flags += ["--debug-service", "--embedded-postgres", str(tmp_path / "pg"), "--kvcm-file-dir", str(tmp_path / "kv")]
    server = ServiceProcess("meta_server", flags, {}, tmp_path / "meta.log")
    client = GrpcClient(ports)
    try:
        for times in (1, 2):
            server.start()
            eventually(lambda: server.log().count(" ready ") == times, what="it answers")  # noqa: B023
            if times == 1:
                await client.ok("CreateInstanceGroup", "admin", instance_group={"name": "g"})
                server.kill()
        assert (await HttpClient(ports).ok("GetInstanceGroup", "admin", name="g"))["instance_group"]["version"] == "1"
        await client.ok("ClearFaults", "debug")

        os.kill(_postmaster(tmp_path), signal.SIGKILL)

        async def is_written() -> bool:
            return await client.code("CreateInstanceGroup", "admin", instance_group={"name": "h"}) in (
                "OK",
                "DUPLICATE_ENTITY",
            )

        await eventually_async(is_written)
        assert server.stop() == 0
    finally:
        server.kill()


def _postmaster(directory: Path) -> int:
    """Its pid file may be below root's own directory (see EmbeddedPostgres), so it is found by its command line."""
    for entry in Path("/proc").iterdir():
        command = (entry / "cmdline").read_bytes() if entry.name.isdecimal() and (entry / "cmdline").exists() else b""
        if str(directory).encode() in command and b"-D" in command.split(b"\0"):
            return int(entry.name)
    raise AssertionError("PostgreSQL does not run")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"embedded_postgres": "/nowhere"}, "database.url and meta.embedded_postgres are both set"),
        ({"debug_service": "true"}, "set meta.kvcm_enabled, too"),
    ],
)
def test_settings_that_exclude_or_need_each_other_are_told(
    postgres_url: str, tmp_path: Path, settings: dict[str, str], expected: str
) -> None:
    status, errors = MetaProcess(postgres_url, tmp_path, **settings).run()
    assert status == 2
    assert expected in errors
