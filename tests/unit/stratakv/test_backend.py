"""Where clients are sent: to the DB node, as whom and into which database its backend's URL says."""

from __future__ import annotations

import pytest

from stratakv.backend import client_parameters, client_url
from stratakv.errors import SetupError
from stratakv.settings import DatabaseSettings, Secret, Settings, SqlSettings


def _settings(backend: str | None = None, database: str | None = None, host: str = "127.0.0.1") -> Settings:
    sql = SqlSettings(host=host, port=7, backend_url=Secret(backend) if backend else None)
    return Settings(sql=sql, database=DatabaseSettings(url=Secret(database) if database else None))


@pytest.mark.parametrize(
    ("backend", "database", "expected"),
    [
        (None, "postgresql://ann:geheim@db.example/shop", "postgresql://ann@127.0.0.1:7/shop"),
        (None, "postgresql://postgres@/stratakv?host=/x&port=5432", "postgresql://postgres@127.0.0.1:7/stratakv"),
        ("postgresql://bob@db.example/shop?password=geheim", "postgresql://a@x/y", "postgresql://bob@127.0.0.1:7/shop"),
        ("postgresql://b%40b@db.example/a%2Fb", None, "postgresql://b%40b@127.0.0.1:7/a%2Fb"),
        ("postgresql://db.example:5432", "postgresql://a@x/y", "postgresql://127.0.0.1:7"),
        (None, None, "postgresql://postgres@127.0.0.1:7/stratakv"),
    ],
)
def test_the_address_names_the_backends_role_and_database_but_no_password(
    backend: str | None, database: str | None, expected: str
) -> None:
    assert client_url(_settings(backend, database)) == expected


def test_the_password_is_there_for_those_who_connect() -> None:
    assert client_parameters(_settings("postgresql://ann:p%40ss@db/shop"))["password"] == "p@ss"


def test_a_node_that_listens_on_all_addresses_is_reached_on_this_machine() -> None:
    assert client_parameters(_settings(host="0.0.0.0"))["host"] == "127.0.0.1"


def test_what_is_no_url_is_told_with_its_setting() -> None:
    with pytest.raises(SetupError, match=r"sql\.backend_url"):
        client_url(_settings("db.example:5432"))
