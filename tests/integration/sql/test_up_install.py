"""The functions of a user's own database: `stratakv up` puts them in, `stratakv install` uses the key that it keeps."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from stratakv.cli.functions import _listener
from stratakv.errors import SetupError
from stratakv.settings import DatabaseSettings, Secret, Settings, SqlSettings, UpSettings
from stratakv.sqlfunctions import ListenerAddress, install
from stratakv.up.run import _with_key, install_functions

METADATA = DatabaseSettings(url=Secret("postgresql://nobody@127.0.0.1:1/metadata"))


def _settings(backend_url: str, home: Path) -> Settings:
    return _with_key(Settings(database=METADATA, sql=SqlSettings(backend_url=Secret(backend_url))), home)


@pytest.fixture
def ordinary_url(postgres_url: str) -> Iterator[str]:
    """The same database, as a role that may not install."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE ordinary LOGIN")
        yield postgres_url.replace("postgres@", "ordinary@")
        connection.execute("DROP ROLE ordinary")


def test_up_installs_in_the_backend_that_is_not_the_metadatas(postgres_url: str, tmp_path: Path) -> None:
    assert "infer() in" in install_functions(_settings(postgres_url, tmp_path))
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT name FROM stratakv.sql_listeners").fetchall() == [("127.0.0.1:6433",)]


def test_a_role_that_may_not_install_is_told_what_to_run(ordinary_url: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot be installed") as caught:
        install_functions(_settings(ordinary_url, tmp_path))
    assert "stratakv install --database" in str(caught.value.hint)


def test_functions_that_another_role_has_installed_are_kept(
    postgres_url: str, ordinary_url: str, tmp_path: Path
) -> None:
    settings = _settings(ordinary_url, tmp_path)
    install(postgres_url, ListenerAddress.from_settings(settings.sql))
    assert "installed before" in install_functions(settings)


def test_a_backend_without_a_database_is_left_to_the_operator(tmp_path: Path) -> None:
    assert "stratakv install --database" in install_functions(_settings("postgresql://127.0.0.1:1", tmp_path))


def test_install_finds_the_key_that_up_keeps(tmp_path: Path) -> None:
    settings = Settings(database=METADATA, up=UpSettings(data_dir=tmp_path / "data"))
    with pytest.raises(SetupError, match="nowhere to call back") as caught:
        _listener(settings)
    for way in ("sql.listener_dir", "sql.listener_key", "listener.key"):
        assert way in str(caught.value.hint)
    with_key = _with_key(settings, settings.up.data_dir)
    assert with_key.sql.listener_key
    assert _with_key(settings, settings.up.data_dir) == with_key
    assert _listener(settings) == ListenerAddress.from_settings(with_key.sql)
    own = replace(settings, sql=SqlSettings(listener_key=Secret("own")))
    assert (_listener(own).key, _with_key(own, settings.up.data_dir)) == ("own", own)
    assert stat.S_IMODE((tmp_path / "data" / "listener.key").stat().st_mode) == 0o600
