"""What the calls of a statement need is reserved before they run together: all of it, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg
import pytest

from dbnode.errors import QuotaExceeded
from dbnode.sql.service import InferCall
from stratakv.postgres import EmbeddedPostgres
from tests.integration.sql.harness import FrontThread, ReversingModel, front_thread
from tests.support import eventually

Connection = psycopg.Connection[tuple[object, ...]]


class LimitedModel(ReversingModel):
    """Has room for so many calls; those that were reserved together, and others one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.room = 0
        self.windows: list[int] = []

    async def reserve(self, calls: Sequence[InferCall]) -> list[InferCall]:
        if len(calls) > self.room:
            raise QuotaExceeded("tenant acme has reached its limit of 5 requests per minute", 12.5)
        self.room -= len(calls)
        self.windows.append(len(calls))
        return list(calls)

    async def infer_text(self, call: InferCall) -> str:
        if call.charge is None:
            if not self.room:
                raise QuotaExceeded("tenant acme has reached its limit of 5 requests per minute", 12.5)
            self.room -= 1
        return await super().infer_text(call)


@pytest.fixture(scope="module")
def limited(cluster: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontThread]:
    directory = tmp_path_factory.mktemp("limited")
    with front_thread(cluster, directory, LimitedModel()) as thread:
        yield thread


@pytest.fixture
def connection(limited: FrontThread, cluster: EmbeddedPostgres, database: str) -> Iterator[Connection]:
    from stratakv.sqlfunctions import install
    from tests.integration.sql.harness import address_in

    assert limited.settings.listener_dir is not None
    install(cluster.database_url(database), address_in(limited.settings.listener_dir))
    limited.model.calls.clear()
    with psycopg.connect(limited.url(database), autocommit=True) as opened:
        yield opened


def room(limited: FrontThread, number: int) -> LimitedModel:
    assert isinstance(limited.model, LimitedModel)
    limited.model.room = number
    limited.model.windows.clear()
    return limited.model


def test_a_statement_that_does_not_fit_fails_before_anything_runs(connection: Connection, limited: FrontThread) -> None:
    model = room(limited, 5)
    with pytest.raises(psycopg.errors.ConfigurationLimitExceeded) as caught:
        connection.execute("SELECT infer('row ' || i) FROM generate_series(1, 6) i").fetchall()
    assert caught.value.diag.message_hint == "retry_after_ms=12500"
    assert (model.calls, model.room) == ([], 5)
    rows = connection.execute("SELECT infer('row ' || i) FROM generate_series(1, 5) i").fetchall()
    assert len(rows) == 5
    assert (model.windows, model.room) == ([5], 0)


def test_a_statement_that_may_stop_early_goes_on_call_by_call(connection: Connection, limited: FrontThread) -> None:
    model = room(limited, 5)
    query = "SELECT i FROM generate_series(1, 500) i WHERE infer('row ' || i) LIKE '%' LIMIT {}"
    assert len(connection.execute(query.format(3).encode()).fetchall()) == 3
    assert (model.windows, model.room) == ([], 2)
    with pytest.raises(psycopg.errors.ConfigurationLimitExceeded):
        connection.execute(query.format(10).encode())
    eventually(lambda: model.room == 0)
    assert len(model.calls) == 5  # the others were refused before they did anything
