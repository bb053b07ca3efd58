"""Statements that a client sends behind others, without waiting for answers, are looked ahead in as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from dbnode.sql.hints import HintStats
from dbnode.sql.messages import cstring, int16, int32, message
from tests.integration.sql.harness import MANY, SLOW, FrontThread, ReversingModel
from tests.integration.sql.raw_client import RawClient

BEGIN = message(b"P", cstring("") + cstring("BEGIN") + int16(0)) + message(b"B", cstring("") * 2 + int16(0) * 3)
BEGIN += message(b"E", cstring("") + int32(0))
EXECUTE = message(b"E", cstring("") + int32(0))
SYNC = message(b"S")
PIPELINED = f"SELECT infer('p' || i, {SLOW}) FROM generate_series(1, 40) i"


def _bound(name: str = "") -> bytes:
    return message(b"B", cstring("") + cstring(name) + int16(0) * 3) + EXECUTE


def _parsed(query: str, name: str = "") -> bytes:
    return message(b"P", cstring(name) + cstring(query) + int16(0))


@pytest.fixture
def raw(front: FrontThread, database: str) -> Iterator[RawClient]:
    with RawClient(front.settings.port) as client:
        client.log_in(database)
        yield client


@pytest.mark.parametrize(
    "opening",
    [BEGIN, message(b"Q", cstring("BEGIN")), message(b"Q", cstring("start transaction isolation level serializable"))],
    ids=["JDBC", "Npgsql", "Npgsql serializable"],
)
def test_a_begin_that_comes_along_does_not_hide_the_statement(
    raw: RawClient, model: ReversingModel, stats: Callable[[], HintStats], opening: bytes
) -> None:
    raw.send(opening + _parsed(PIPELINED) + _bound() + SYNC)
    answer = b""
    while not answer.endswith(b"SELECT 40\0Z\0\0\0\5T"):
        answer += raw.socket.recv(65536)
    assert answer.count(b"BEGIN\0") + answer.count(b"START TRANSACTION\0") == 1
    assert answer.count(b"Z\0\0\0\5T") == (1 if opening is BEGIN else 2)
    assert model.most_running > MANY
    raw.send(message(b"Q", cstring("ROLLBACK")))
    raw.read_until(b"Z\0\0\0\5I")
    assert (stats().consumed, stats().wasted) == (40, 0)


def test_a_begin_that_was_prepared_does_not_hide_it_either(raw: RawClient, model: ReversingModel) -> None:
    rollback = message(b"Q", cstring("ROLLBACK"))
    raw.send(_parsed("BEGIN", "S_1") + _bound("S_1") + _parsed("SELECT 1") + _bound() + SYNC + rollback)
    raw.read_until(b"ROLLBACK\0Z\0\0\0\5I")
    for statement in (_parsed(PIPELINED, "S_2") + _bound("S_2"), _bound("S_2")):
        model.most_running = 0
        raw.send(_bound("S_1") + statement + SYNC)
        raw.read_until(b"SELECT 40\0Z\0\0\0\5T")
        assert model.most_running > MANY
        raw.send(rollback)
        raw.read_until(b"Z\0\0\0\5I")
    raw.send(_bound("S_1") + _parsed("SELECT 1 / 0 AS infer") + _bound() + SYNC)
    raw.read_until(b"Z\0\0\0\5E")


def test_a_begin_that_postgresql_refuses_fails_its_batch(raw: RawClient, model: ReversingModel) -> None:
    raw.send(_parsed("BEGIN isolation") + _bound() + _parsed(PIPELINED) + _bound() + SYNC + _parsed("SELECT 'after'"))
    assert raw.read_until(b"Z\0\0\0\5I").count(b"C42601\0") == 1
    assert model.calls == []
    raw.send(_bound() + SYNC)
    assert b"after" in raw.read_until(b"Z\0\0\0\5I")


def test_a_statement_behind_others_is_looked_ahead_in_when_they_are_done(
    raw: RawClient, model: ReversingModel, stats: Callable[[], HintStats]
) -> None:
    raw.send(message(b"Q", cstring("SELECT infer('bind')")))
    raw.read_until(b"Z\0\0\0\5I")
    copy = message(b"Q", cstring("COPY c FROM STDIN")) + message(b"d", b"x\n") + message(b"c")
    raw.send(message(b"Q", cstring("CREATE TEMP TABLE c (body text)")) + copy + message(b"Q", cstring(PIPELINED)))
    answer = raw.read_until(b"SELECT 40\0Z\0\0\0\5I")
    assert answer.index(b"COPY 1\0") < answer.index(b"SELECT 40\0")
    before = stats().passes
    raw.send(message(b"Q", cstring("SELECT pg_sleep(0.2)")))
    raw.send(_parsed(PIPELINED) + _bound() + SYNC + message(b"Q", cstring(PIPELINED)))
    raw.read_until(b"SELECT 40\0Z\0\0\0\5I")
    raw.read_until(b"SELECT 40\0Z\0\0\0\5I")
    assert stats().passes - before == 2
