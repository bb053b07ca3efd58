"""Several DB nodes on one cluster, and one DB node that several clusters call: nothing of one is another's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from dbnode.sql.binding import SessionBinding
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import PostgresSettings
from stratakv.sqlfunctions import ListenerAddress, install
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread
from tests.support import free_port


@pytest.fixture
def second(cluster: EmbeddedPostgres, database: str, front: FrontThread) -> Iterator[FrontThread]:
    """Another DB node on the same cluster, whose listener is the database's default."""
    with tempfile.TemporaryDirectory(prefix="skv-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        install(cluster.database_url(database), address_in(directory))
        with front_thread(cluster, directory, ReversingModel()) as running:
            yield running


def _sessions(front: FrontThread) -> set[str]:
    return {call.session.partition("-")[0] for call in front.model.calls}


def test_sessions_are_bound_to_the_node_they_came_through(
    front: FrontThread, second: FrontThread, database: str, direct_url: str
) -> None:
    with (
        psycopg.connect(front.url(database), autocommit=True) as through_first,
        psycopg.connect(second.url(database), autocommit=True) as through_second,
        psycopg.connect(direct_url, autocommit=True) as direct,
    ):
        for session in (through_first, through_second):
            assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)
        assert (_sessions(front), _sessions(second)) == ({"sql"}, {"sql"})
        second.model.calls.clear()
        assert direct.execute("SELECT infer('ab')").fetchone() == ("ba",)
        assert _sessions(second) == {"direct"}, "the one that was installed last"
        second.stop()
        assert through_first.execute("SELECT infer('cd')").fetchone() == ("dc",)
        assert _sessions(front) == {"sql"}
        with pytest.raises(psycopg.OperationalError):
            through_second.execute("SELECT 1")
        install(direct_url, front.front.address)
        assert direct.execute("SELECT infer('ef')").fetchone() == ("fe",)
        assert _sessions(front) == {"sql", "direct"}


def test_nonce_of_one_node_is_refused_by_the_other(front: FrontThread, second: FrontThread, direct_url: str) -> None:
    async def issue(pid: int) -> str:
        return front.front.relay.registry.issue(SessionBinding("sql-forged", pid))

    with psycopg.connect(direct_url, autocommit=True) as direct:
        nonce = front.run(issue(direct.info.backend_pid))
        with pytest.raises(errors.InvalidAuthorizationSpecification):
            direct.execute("SELECT stratakv.bind(%s, %s)", (nonce, second.front.address.name))
        direct.execute("SELECT infer('a')")
    assert _sessions(second) == {"direct"}
    assert front.model.calls == []


def test_two_clusters_call_one_node(cluster: EmbeddedPostgres, database: str, tmp_path: Path) -> None:
    address = ListenerAddress("127.0.0.1", free_port(), "key")
    options = {"listener_host": address.host, "listener_port": address.port, "listener_key": address.key}
    with (
        EmbeddedPostgres(PostgresSettings(), tmp_path / "other", throw_away=True) as other,
        front_thread(cluster, None, ReversingModel(), **options) as front,
    ):
        for url in (cluster.database_url(database), other.database_url("postgres")):
            install(url, address)
        with (
            psycopg.connect(front.url(database), autocommit=True) as bound,
            psycopg.connect(other.database_url("postgres"), autocommit=True) as elsewhere,
        ):
            for session in (bound, elsewhere, bound):
                assert session.execute("SELECT infer('ab')").fetchone() == ("ba",)
            told = [(call.database, call.session.partition("-")[0]) for call in front.model.calls]
    assert told == [(database, "sql"), ("postgres", "direct"), (database, "sql")]
