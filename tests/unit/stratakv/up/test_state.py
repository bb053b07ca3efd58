"""What `stratakv up` tells others of itself."""

from __future__ import annotations

from stratakv.settings import DatabaseSettings, RestSettings, Secret, Settings, SqlSettings
from stratakv.up.readiness import authorization
from stratakv.up.state import sql_url


def test_the_sql_address_names_the_backends_role_and_database_but_no_password() -> None:
    database = DatabaseSettings(url=Secret("postgresql://ann:geheim@db.example/shop"))
    assert sql_url(Settings(database=database, sql=SqlSettings(port=7))) == "postgresql://ann@127.0.0.1:7/shop"
    embedded = DatabaseSettings(url=Secret("postgresql://postgres@/stratakv?host=/x&port=5432"))
    assert sql_url(Settings(database=embedded)) == "postgresql://postgres@127.0.0.1:6432/stratakv"


def test_a_listener_on_all_addresses_is_reached_on_this_machine() -> None:
    assert sql_url(Settings(sql=SqlSettings(host="0.0.0.0"))).startswith("postgresql://postgres@127.0.0.1:")


def test_readiness_is_asked_with_the_api_key() -> None:
    assert authorization(RestSettings(api_key=Secret("k"))) == {"Authorization": "Bearer k"}
    assert authorization(RestSettings()) == {}
