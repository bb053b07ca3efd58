"""The meta server refuses to start where it cannot work, with exit status 2 and a message that says what to do."""

from __future__ import annotations

from pathlib import Path

import psycopg

from stratakv.errors import SetupError
from tests.meta_process import MetaProcess, connected, meta_server


def test_an_unmigrated_database_is_refused(postgres_url: str, tmp_path: Path) -> None:
    status, errors = MetaProcess(postgres_url, tmp_path).run()
    assert status == 2
    assert "is at revision none" in errors
    assert "stratakv migrate upgrade" in errors


def test_a_database_of_an_unknown_revision_is_refused(migrated_url: str, tmp_path: Path) -> None:
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        connection.execute("UPDATE stratakv.schema_version SET version_num = '9999'")
    status, errors = MetaProcess(migrated_url, tmp_path).run()
    assert status == 2
    assert "9999" in errors


async def test_a_second_one_on_the_same_database_is_refused(migrated_url: str) -> None:
    async with meta_server(migrated_url) as endpoint:
        client = await connected(endpoint)
        refused = ""
        try:
            async with meta_server(migrated_url):
                pass
        except SetupError as error:
            refused = error.message
        assert "another meta server" in refused
        assert client.available
        await client.close()
