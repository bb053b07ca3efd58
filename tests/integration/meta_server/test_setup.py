"""The meta server refuses to start where it cannot work, with exit status 2 and a message that says what to do."""

from __future__ import annotations

from pathlib import Path

import psycopg

from tests.meta_process import MetaProcess


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
