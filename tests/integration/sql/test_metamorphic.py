"""Statements of many shapes give the rows that they give with an ordinary SQL function in place of infer().

The model answers with the MD5 of the prompt, and so does the function. The server's buffers are so small that scans of the large
table are what PostgreSQL calls large. That the statements were looked ahead in is asserted as well.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg import IsolationLevel, errors
from psycopg.rows import TupleRow

from dbnode.sql.hints import HintStats
from dbnode.sql.messages import cstring, int16, int32, message
from dbnode.sql.service import InferCall
from stratakv.postgres import EmbeddedPostgres, find_binaries
from stratakv.postgres.account import choose_account
from stratakv.settings import PostgresSettings
from stratakv.sqlfunctions import install
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread
from tests.integration.sql.raw_client import RawClient

Connection = psycopg.Connection[TupleRow]
INFER, ORDINARY = "infer", "ordinary"
OPTIONS = {"shared_buffers": "2MB", "max_prepared_transactions": "4"}
STATEMENTS = 40
"""Drawn for each way of running them."""
SCHEMA = """
CREATE FUNCTION ordinary(prompt text, model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS text
    LANGUAGE sql STABLE COST 1000 AS 'SELECT md5(prompt)';
CREATE TABLE t AS
SELECT i, i % 5 AS g, 'text ' || i % 20 AS body, CASE WHEN i % 7 = 0 THEN NULL ELSE 'n' || i END AS maybe
FROM generate_series(1, 50) i;
CREATE TABLE big AS SELECT i, 'big ' || i AS body, repeat(md5(i::text), 40) AS filler FROM generate_series(1, 800) i;
ALTER TABLE big ALTER filler SET STORAGE PLAIN;
UPDATE big SET filler = filler || '.';
ANALYZE t, big
"""
VALUES = [
    "{f}(body)",
    "{f}(maybe)",
    "{f}({f}(body) || i)",
    "coalesce({f}(maybe), {f}('c' || body))",
    "CASE WHEN {f}(body) < '8' THEN {f}('a' || body) ELSE maybe END",
    "length({f}(body)) + i",
    "{f}('s' || body, options => '{{\"system\": \"be brief\"}}')",
]
CONDITIONS = [
    "i <= 20",
    "{f}(body) < '8'",
    "{f}(body) LIKE '1%' OR {f}(maybe) > 'c'",
    "{f}(maybe) IS NOT NULL AND g < 3",
    "NOT ({f}(body) > '4' AND i > 10)",
    "{f}(maybe) IS DISTINCT FROM {f}(body)",
    "EXISTS (SELECT FROM t u WHERE u.i = t.i + 1 AND {f}(u.body) > '8')",
    "i IN (SELECT i + 1 FROM t WHERE {f}(body) > 'a')",
]
QUERIES = [
    "SELECT i, {value} FROM t WHERE {condition} ORDER BY i",
    "SELECT DISTINCT {value} AS v FROM t WHERE {condition} ORDER BY v",
    "SELECT g, count({value}) FROM t WHERE {condition} GROUP BY g ORDER BY g",
    "SELECT i, row_number() OVER (PARTITION BY g ORDER BY {value}, i) FROM t WHERE {condition} ORDER BY i",
    "SELECT x.i, y.v FROM t x JOIN (SELECT i, {value} AS v FROM t WHERE {condition}) y ON y.i = x.i + 1 ORDER BY 1",
    "WITH w AS MATERIALIZED (SELECT i, body FROM t WHERE {condition}) SELECT i, {f}('w' || body) FROM w ORDER BY i",
    "SELECT t.i, l.v FROM t, LATERAL (SELECT {value} AS v) l WHERE {condition} ORDER BY t.i",
    "SELECT i, {value} FROM t WHERE {condition} ORDER BY {f}(body), i LIMIT 7",
    "SELECT string_agg(({value})::text, ',' ORDER BY i) FROM t WHERE {condition}",
    "SELECT ({value})::text AS v FROM t UNION SELECT {f}(body) FROM t WHERE {condition} ORDER BY 1",
]
WRITES = [
    "INSERT INTO kept SELECT ({value})::text FROM t WHERE {condition} RETURNING v",
    "UPDATE kept SET v = {f}(v) WHERE {f}('u' || v) < '8' RETURNING v",
    "DELETE FROM kept WHERE {f}(v) < '8' RETURNING v",
]
LIMITED = [
    "SELECT i FROM big WHERE {f}(body) < '4' LIMIT 10",
    "SELECT i, {f}(body) FROM big LIMIT 40",
    "SELECT i, {f}({f}(body)) FROM big WHERE {f}(body) < '8' LIMIT 5",
    "SELECT i FROM big b WHERE EXISTS (SELECT FROM t WHERE t.i = b.i % 50 AND {f}(t.body) < '8') LIMIT 30",
]


class DigestModel(ReversingModel):
    """Answers a prompt by its MD5."""

    async def infer_text(self, call: InferCall) -> str:
        await super().infer_text(call)
        return hashlib.md5(call.prompt.encode()).hexdigest()


@pytest.fixture(scope="module")
def small_buffers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A server for which the large table is larger than a quarter of its buffers."""
    home = tmp_path_factory.mktemp("small")
    with EmbeddedPostgres(PostgresSettings(), home, throw_away=True, options=OPTIONS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def face(small_buffers: EmbeddedPostgres) -> Iterator[FrontThread]:
    """With the tables."""
    with tempfile.TemporaryDirectory(prefix="skv-") as directory:
        Path(directory).chmod(0o711)
        install(small_buffers.database_url("postgres"), address_in(Path(directory)))
        with psycopg.connect(small_buffers.database_url("postgres"), autocommit=True) as admin:
            admin.execute(SCHEMA)
            large = "SELECT pg_relation_size('big') > 8192 * setting::int / 4 FROM pg_settings WHERE name = 'shared_buffers'"
            assert admin.execute(large).fetchone() == (True,)
        # No test finds what another one has got, and none loses its hints on a busy machine.
        with front_thread(small_buffers, Path(directory), DigestModel(), memo_ttl_s=0.0, hints_budget_s=20.0) as thread:
            yield thread


@pytest.fixture
def asked(face: FrontThread) -> Callable[[], tuple[int, HintStats]]:
    """How often the model was asked in this test, and what of it was looked ahead for."""
    face.model.calls.clear()
    face.model.most_running = 0
    before = replace(face.front.hint_stats)

    def since() -> tuple[int, HintStats]:
        now = face.front.hint_stats
        names = HintStats.__slots__
        return len(face.model.calls), HintStats(*(getattr(now, name) - getattr(before, name) for name in names))

    return since


def _drawn(seed: int) -> list[str]:
    """Statements, `{f}` where the function stands."""
    chosen = random.Random(seed)

    def one(template: str) -> str:
        value, condition = chosen.choice(VALUES), chosen.choice(CONDITIONS)
        return template.replace("{value}", value).replace("{condition}", condition)

    return [one(chosen.choice([*QUERIES, *QUERIES, *WRITES])) for _ in range(STATEMENTS)] + LIMITED


def _rows(connection: Connection, statement: str, function: str) -> object:
    """Of a statement in a transaction of its own, or its error."""
    with nullcontext() if connection.autocommit else connection.transaction(force_rollback=True):
        connection.execute("CREATE TEMP TABLE IF NOT EXISTS kept (v text)")
        connection.execute("TRUNCATE kept")
        connection.execute("INSERT INTO kept SELECT 'v' || i FROM generate_series(1, 40) i")
        try:
            cursor = connection.execute(statement.format(f=function).encode())
            rows = cursor.fetchall()
        except psycopg.Error as error:
            return error.sqlstate
        return rows if "ORDER BY" in statement or "LIMIT" in statement else sorted(map(repr, rows))


@pytest.mark.parametrize("cursor_class", [psycopg.Cursor, psycopg.ClientCursor], ids=["extended", "simple"])
@pytest.mark.parametrize(
    "level", [None, *list(IsolationLevel)[1:]], ids=lambda level: level.name if level else "autocommit"
)
@pytest.mark.parametrize("seed", [1, 2])
def test_rows_are_those_of_an_ordinary_function(
    face: FrontThread,
    asked: Callable[[], tuple[int, HintStats]],
    level: IsolationLevel | None,
    cursor_class: type[psycopg.Cursor[TupleRow]],
    seed: int,
) -> None:
    with psycopg.connect(face.url("postgres"), autocommit=level is None, cursor_factory=cursor_class) as connection:
        connection.isolation_level = level
        connection.execute("SET synchronize_seqscans = off")
        connection.commit()
        for statement in _drawn(seed):
            expected = _rows(connection, statement, ORDINARY)
            assert not isinstance(expected, str), f"{expected}: {statement}"
            assert _rows(connection, statement, INFER) == expected, statement
    num_asked, stats = asked()
    assert stats.distinct > STATEMENTS * 10
    assert num_asked - stats.distinct <= num_asked / 20
    assert face.model.most_running > 16


def test_scans_that_begin_elsewhere_each_time_give_right_rows(face: FrontThread) -> None:
    with psycopg.connect(face.url("postgres"), autocommit=True) as connection:
        right = set(connection.execute("SELECT i, ordinary(body) FROM big WHERE ordinary(body) < '4'").fetchall())
        for _ in range(5):
            rows = connection.execute("SELECT i, infer(body) FROM big WHERE infer(body) < '4' LIMIT 30").fetchall()
            assert len(set(rows)) == 30
            assert set(rows) <= right


@pytest.mark.parametrize("autocommit", [True, False])
def test_several_statements_in_one_query(face: FrontThread, autocommit: bool) -> None:
    script = (
        "CREATE TEMP TABLE IF NOT EXISTS s (v text); INSERT INTO s SELECT {f}(body) FROM t;"
        " SELECT count(*) FROM s; SELECT DISTINCT {f}(v) FROM s ORDER BY 1; DROP TABLE s"
    )
    found = []
    with psycopg.connect(face.url("postgres"), autocommit=autocommit) as connection:
        for function in (ORDINARY, INFER):
            cursor = psycopg.ClientCursor(connection)
            cursor.execute(script.format(f=function).encode())
            found.append([])
            while True:
                found[-1].append(cursor.fetchall() if cursor.description else cursor.statusmessage)
                if not cursor.nextset():
                    break
    assert found[0] == found[1]
    assert len(found[0]) == 5


@pytest.mark.parametrize("opening", [[], ["BEGIN"], ["BEGIN ISOLATION LEVEL SERIALIZABLE"]], ids=len)
def test_parse_in_an_earlier_batch_than_bind(
    face: FrontThread, asked: Callable[[], tuple[int, HintStats]], opening: list[str]
) -> None:
    query = "SELECT infer($1 || i) FROM generate_series(1, 40) i"
    sync = message(b"S")
    with RawClient(face.settings.port) as client:
        client.log_in("postgres")
        for statement in [*opening, "SELECT infer('bind')"]:
            client.send(message(b"Q", cstring(statement)))
            client.read_ready()
        client.send(message(b"P", cstring("mine") + cstring(query) + int16(0)) + sync)
        client.read_ready()
        for prompt in (b"a", b"b"):
            value = int16(0) + int16(1) + int32(1) + prompt + int16(0)
            client.send(
                message(b"B", cstring("") + cstring("mine") + value) + message(b"E", cstring("") + int32(0)) + sync
            )
            answer = client.read_ready()
            assert all(hashlib.md5(prompt + b"%d" % i).hexdigest().encode() in answer for i in range(1, 41))
    num_asked, stats = asked()
    assert (num_asked, stats.distinct) == (81, 80)


def test_a_pipeline_larger_than_the_buffers(face: FrontThread, asked: Callable[[], tuple[int, HintStats]]) -> None:
    many = 12
    text = "x" * 1_000_000
    with psycopg.connect(face.url("postgres")) as connection:
        connection.execute("SELECT infer('bind')")
        with connection.pipeline():
            first = connection.execute("SELECT infer(body) FROM t ORDER BY i")
            others = [connection.execute("SELECT ordinary(%s), infer(%s)", (text, str(i))) for i in range(many)]
        assert first.fetchall() == connection.execute("SELECT ordinary(body) FROM t ORDER BY i").fetchall()
        digest = hashlib.md5(text.encode()).hexdigest()
        expected = [(digest, hashlib.md5(b"%d" % i).hexdigest()) for i in range(many)]
        assert [cursor.fetchone() for cursor in others] == expected
    assert asked()[0] == 21 + many


# Cursors


@pytest.mark.parametrize("level", list(IsolationLevel)[1:], ids=lambda level: level.name)
@pytest.mark.parametrize("query", ["SELECT i, {f}(body) FROM big", "SELECT i FROM big WHERE {f}({f}(body)) < '8'"])
@pytest.mark.parametrize("part", [1, 30, 100])
def test_a_cursor_fetched_in_parts(
    face: FrontThread, asked: Callable[[], tuple[int, HintStats]], level: IsolationLevel, query: str, part: int
) -> None:
    """Each part looks further ahead; not much further than it is fetched."""
    with psycopg.connect(face.url("postgres")) as connection:
        connection.isolation_level = level
        connection.execute("SET LOCAL synchronize_seqscans = off")
        expected = connection.execute(query.format(f=ORDINARY) + " LIMIT 200").fetchall()
        with connection.cursor("named") as cursor:
            cursor.execute(query.format(f=INFER))
            found = []
            while len(found) < 200:
                found += cursor.fetchmany(min(part, 200 - len(found)))
        assert found == expected
    num_asked, stats = asked()
    assert stats.consumed > 150
    assert num_asked - stats.distinct <= num_asked / 5
    assert stats.distinct <= 3 * stats.consumed
    assert face.model.most_running > 16


def test_a_cursor_fetched_whole(face: FrontThread, asked: Callable[[], tuple[int, HintStats]]) -> None:
    with psycopg.connect(face.url("postgres")) as connection:
        expected = connection.execute("SELECT ordinary(body) FROM t WHERE i > 1 ORDER BY i").fetchall()
        connection.execute("DECLARE c SCROLL CURSOR FOR SELECT infer(body) FROM t ORDER BY i")
        first = connection.execute("FETCH FROM c").fetchall()
        connection.execute("SAVEPOINT mine")
        assert connection.execute("FETCH ALL FROM c").fetchall() == expected
        connection.execute("ROLLBACK TO mine")
        assert connection.execute("FETCH BACKWARD ALL FROM c").fetchall() == expected[::-1] + first
        connection.execute("DECLARE held CURSOR WITH HOLD FOR SELECT infer('h' || body) FROM t ORDER BY i")
        connection.commit()
        held = connection.execute("SELECT ordinary('h' || body) FROM t ORDER BY i").fetchall()
        assert connection.execute("FETCH ALL FROM held").fetchall() == held
    num_asked, stats = asked()
    assert (num_asked, stats.distinct) == (40, 40)


@pytest.mark.parametrize("portal", [b"", b"mine"])
def test_a_portal_that_is_suspended(
    face: FrontThread, asked: Callable[[], tuple[int, HintStats]], portal: bytes
) -> None:
    name, sync = portal + b"\0", message(b"S")
    query = "SELECT infer('p' || i) FROM generate_series(1, 1000) i"
    part = message(b"E", name + int32(20))
    with RawClient(face.settings.port) as client:
        client.log_in("postgres")
        client.send(message(b"Q", cstring("BEGIN")))
        client.read_ready()
        bind = message(b"P", cstring("") + cstring(query) + int16(0)) + message(b"B", name + cstring("") + int16(0) * 3)
        client.send(bind + part + sync)
        answers = [client.read_ready()]
        for _ in range(9):
            client.send(part + sync)
            answers.append(client.read_ready())
    for number in range(200):
        digest = hashlib.md5(b"p%d" % (number + 1)).hexdigest().encode()
        assert digest in answers[number // 20]
    num_asked, stats = asked()
    assert num_asked == stats.distinct
    assert stats.consumed == 200
    assert stats.distinct <= 600


# Transactions


def test_rows_that_others_have_locked_are_skipped(face: FrontThread) -> None:
    with psycopg.connect(face.url("postgres")) as locking, psycopg.connect(face.url("postgres")) as connection:
        locking.execute("SELECT FROM t WHERE i <= 25 FOR UPDATE")
        query = "SELECT i, {f}(body) FROM t WHERE {f}(body) < '8' ORDER BY i FOR UPDATE SKIP LOCKED"
        expected = connection.execute(query.format(f=ORDINARY)).fetchall()
        connection.rollback()
        assert connection.execute(query.format(f=INFER).encode()).fetchall() == expected
        assert len(expected) > 3


def test_a_transaction_that_failed_goes_on_from_its_savepoint(
    face: FrontThread, asked: Callable[[], tuple[int, HintStats]]
) -> None:
    with psycopg.connect(face.url("postgres")) as connection:
        connection.execute("CREATE TEMP TABLE s AS SELECT i, body FROM t")
        connection.execute("SAVEPOINT mine")
        connection.execute("UPDATE s SET body = infer(body)")
        with pytest.raises(errors.DivisionByZero):
            connection.execute("SELECT infer(body), 1 / (i - 50) FROM s ORDER BY i")
        with pytest.raises(errors.InFailedSqlTransaction):
            connection.execute("SELECT infer('in vain ' || body) FROM s")
        connection.execute("ROLLBACK TO mine")
        expected = connection.execute("SELECT ordinary(body) FROM s ORDER BY i").fetchall()
        before = asked()[0]
        assert connection.execute("SELECT infer(body) FROM s ORDER BY i").fetchall() == expected
        assert asked()[0] == before, "the transaction has these answers"


def test_a_prepared_transaction_holds_its_rows(face: FrontThread, asked: Callable[[], tuple[int, HintStats]]) -> None:
    with psycopg.connect(face.url("postgres")) as connection:
        connection.execute("CREATE TABLE prepared AS SELECT i, infer('p' || body) AS v FROM t")
        connection.execute("PREPARE TRANSACTION 'both'")
        connection.autocommit = True
        connection.execute("COMMIT PREPARED 'both'")
        found = connection.execute("SELECT v FROM prepared ORDER BY i").fetchall()
        assert found == connection.execute("SELECT ordinary('p' || body) FROM t ORDER BY i").fetchall()
        connection.execute("DROP TABLE prepared")
    assert asked()[1].distinct == 20


def test_a_standby_answers(
    small_buffers: EmbeddedPostgres, face: FrontThread, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It only reads; passes are read-only anyway."""
    query = "SELECT i, {f}({f}(body)) FROM t ORDER BY i"
    home = tmp_path_factory.mktemp("standby")
    with tempfile.TemporaryDirectory(prefix="skv-") as directory:
        Path(directory).chmod(0o711)
        install(small_buffers.database_url("postgres"), address_in(Path(directory)))
        _copy(small_buffers, home / "data")
        with (
            EmbeddedPostgres(PostgresSettings(), home, throw_away=True, options=OPTIONS) as standby,
            front_thread(standby, Path(directory), DigestModel()) as front,
        ):
            _check_standby(front, query)


def _copy(primary: EmbeddedPostgres, data_dir: Path) -> None:
    """As a standby that follows the primary."""
    program = find_binaries(None).program("pg_basebackup")
    command = choose_account().command(program, "-R", "-c", "fast", "-D", str(data_dir), "-d", primary.url)
    subprocess.run(command, check=True, timeout=60, cwd="/")


def _check_standby(front: FrontThread, query: str) -> None:
    for autocommit in (True, False):
        with psycopg.connect(front.url("postgres"), autocommit=autocommit) as connection:
            assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
            front.model.calls.clear()
            expected = connection.execute(query.format(f=ORDINARY)).fetchall()
            assert connection.execute(query.format(f=INFER)).fetchall() == expected
            assert len(front.model.calls) == 40
            assert front.model.most_running > 16
