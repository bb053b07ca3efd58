"""stratakv.explain(): tells what a query would ask, runs no model, leaves nothing behind, and can be turned into nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from dbnode.sql.explain import Estimate
from dbnode.sql.service import InferCall
from stratakv.postgres import EmbeddedPostgres
from stratakv.sqlfunctions import install, uninstall
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread
from tests.support import eventually

TABLE = "CREATE TABLE t AS SELECT i, 'text ' || i % 40 AS body FROM generate_series(1, 120) i"
Connection = psycopg.Connection[tuple[Any, ...]]


class CountingExplainer:
    """A token is a character; keeps what it was asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def estimate(self, calls: Sequence[InferCall]) -> Estimate:
        self.seen = [call.prompt for call in calls]
        lengths = [len(prompt) for prompt in self.seen] or [0]
        return Estimate(sum(lengths), min(lengths), max(lengths), 5, 7, 1.5)


@pytest.fixture(scope="module")
def explainer() -> CountingExplainer:
    return CountingExplainer()


@pytest.fixture(scope="module")
def explaining(
    cluster: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory, explainer: CountingExplainer
) -> Iterator[FrontThread]:
    directory = tmp_path_factory.mktemp("skv")
    for place in (directory, *directory.parents[:2]):
        place.chmod(0o711)
    with front_thread(cluster, directory, ReversingModel(), explainer=explainer) as thread:
        yield thread


@pytest.fixture
def database(cluster: EmbeddedPostgres, explaining: FrontThread, request: pytest.FixtureRequest) -> Iterator[str]:
    name = "explain_" + request.node.name.partition("[")[0][5:50]
    explaining.model.calls.clear()
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        install(cluster.database_url(name), address_in(explaining.settings.listener_dir))  # type: ignore[arg-type]
        yield name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["gateway", "direct"])
def connection(
    request: pytest.FixtureRequest, explaining: FrontThread, cluster: EmbeddedPostgres, database: str
) -> Iterator[Connection]:
    url = explaining.url(database) if request.param == "gateway" else cluster.database_url(database)
    with psycopg.connect(url, autocommit=True) as opened:
        opened.execute(TABLE)
        yield opened


@pytest.fixture
def ada(connection: Connection) -> Iterator[Connection]:
    """An ordinary role, with a table that hides rows by what the model says of them."""
    connection.execute("DROP ROLE IF EXISTS explain_ada; CREATE ROLE explain_ada")
    connection.execute("GRANT SELECT ON t TO explain_ada")
    connection.execute("SET ROLE explain_ada")
    yield connection
    connection.execute("RESET ROLE")
    connection.execute("DROP OWNED BY explain_ada CASCADE; DROP ROLE explain_ada")


def explain(connection: Connection, query: str) -> dict[str, Any]:
    row = connection.execute("SELECT stratakv.explain_json(%s)", (query,)).fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def test_it_counts_without_running_the_model(
    connection: Connection, explaining: FrontThread, explainer: CountingExplainer
) -> None:
    report = explain(connection, "SELECT i, infer('Sum up: ' || body), infer_bool(body) FROM t;")
    assert report == {
        "call_sites": ["infer", "infer_bool"],
        "rows": 120,
        "calls": 240,
        "calls_without_prompt": 0,
        "token_counts": 0,
        "distinct_prompts": 80,
        "prompt_tokens": sum(map(len, explainer.seen)),
        "prompt_tokens_median": 6,
        "prompt_tokens_max": 15,
        "cached_tokens": 5,
        "shared_tokens": 7,
        "estimated_s": 1.5,
        "expected_hit_ratio": pytest.approx(12 / sum(map(len, explainer.seen)), abs=1e-4),
        "is_whole": True,
    }
    assert set(explainer.seen) == {f"{start}text {i}" for i in range(40) for start in ("", "Sum up: ")}
    lines = dict(connection.execute("SELECT * FROM stratakv.explain('SELECT infer(body) FROM t')").fetchall())
    assert lines["distinct prompts"] == "40"
    assert lines["call sites"] == "infer"
    assert lines["estimated time"] == "1.5 s"
    assert explaining.model.calls == []
    assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


@pytest.mark.parametrize(
    ("query", "sites", "calls"),
    [
        ("SELECT infer(infer(body)) FROM t", ["infer", "infer"], 240),
        ("WITH x AS (SELECT stratakv.infer(body) FROM t) SELECT x.infer FROM x", ["infer"], 120),
        ("SELECT 1 FROM t WHERE \"infer\"(body) = 'yes'", ["infer"], 120),
        ("(VALUES (public . infer /* (x) */ ('a')))", ["infer"], 1),
        ('SELECT infer_json(body, \'{"type": "object"}\') FROM t LIMIT 3', ["infer_json"], 3),
        (
            "SELECT infer_choice(body, ARRAY['a']), infer_row('{body}', to_jsonb(t)) FROM t",
            ["infer_choice", "infer_row"],
            240,
        ),
        ("SELECT infer_tokens(body) FROM t", ["infer_tokens"], 120),
        ("SELECT infer('a'), 'infer(', $$infer($$ -- infer(", ["infer"], 1),
        ("SELECT count(*) FROM t", [], 0),
    ],
)
def test_calls_are_found_where_they_are(connection: Connection, query: str, sites: list[str], calls: int) -> None:
    report = explain(connection, query)
    assert (report["call_sites"], report["calls"]) == (sites, calls)


def test_another_function_of_that_name_is_left_alone(connection: Connection) -> None:
    connection.execute("CREATE SCHEMA own; CREATE FUNCTION own.infer(text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
    connection.execute("SET search_path = own, public")
    assert explain(connection, "SELECT infer(body) FROM public.t")["call_sites"] == []
    assert explain(connection, "SELECT stratakv.infer(body), own.infer(body) FROM public.t")["calls"] == 120


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO t SELECT 1, infer('x')",
        "UPDATE t SET body = infer(body)",
        "SELECT 1; SELECT infer('x')",
        "EXPLAIN SELECT 1",
        "COMMIT",
        "DO $$BEGIN END$$",
        "",
        "SELECT 'a\\'",
        "SELECT infer('x') FROM stratakv.explain('SELECT 1')",
        "SELECT stratakv.explain_json('SELECT infer(''x'')')",
    ],
)
def test_what_is_no_single_query_is_refused(connection: Connection, query: str) -> None:
    with pytest.raises(errors.FeatureNotSupported):
        explain(connection, query)
    assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


@pytest.mark.parametrize(
    "query",
    [
        "WITH gone AS (DELETE FROM t RETURNING body) SELECT infer(body) FROM gone",
        "SELECT infer(body) FROM t FOR UPDATE",
        "SELECT infer('x' || nextval('numbers'))",
        "SELECT infer(body), writes() FROM t",
        "SELECT set_config('transaction_read_only', 'off', true), infer(body), writes() FROM t",
    ],
)
def test_what_writes_is_refused(connection: Connection, query: str) -> None:
    connection.execute("CREATE SEQUENCE numbers")
    connection.execute(
        "CREATE FUNCTION writes() RETURNS integer LANGUAGE sql AS 'INSERT INTO t VALUES (0, ''written'') RETURNING 1'"
    )
    with pytest.raises((errors.ReadOnlySqlTransaction, errors.ActiveSqlTransaction, errors.InvalidParameterValue)):
        explain(connection, query)
    assert connection.execute("SELECT count(*), infer('ab') FROM t").fetchone() == (120, "ba")
    assert connection.execute("SHOW transaction_read_only").fetchone() == ("off",)


def test_nothing_of_it_stays_in_the_transaction(connection: Connection) -> None:
    with connection.transaction():
        connection.execute("INSERT INTO t VALUES (121, 'new')")
        report = explain(connection, "SELECT infer(body), set_config('stratakv.made_up', 'x', true) FROM t")
        assert report["distinct_prompts"] == 41
        assert connection.execute("SELECT current_setting('stratakv.made_up', true)").fetchone() in ((None,), ("",))
        connection.execute("INSERT INTO t VALUES (122, infer('ab'))")
    assert connection.execute("SELECT body FROM t WHERE i = 122").fetchone() == ("ba",)


def test_an_error_of_the_query_is_told_and_leaves_the_session_sound(connection: Connection) -> None:
    with pytest.raises(errors.UndefinedTable, match="no_such_table"):
        explain(connection, "SELECT infer(body) FROM no_such_table")
    with pytest.raises(errors.DivisionByZero):
        explain(connection, "SELECT infer(body), 1 / (i - 60) FROM t ORDER BY i")
    assert connection.execute("SELECT count(DISTINCT infer(body)) FROM t").fetchone() == (40,)


def test_a_cancel_in_the_middle_leaves_no_null_behind(
    connection: Connection, cluster: EmbeddedPostgres, database: str
) -> None:
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event = 'PgSleep'"

    def cancel() -> None:
        with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as other:
            eventually(lambda: other.execute(asleep, (database,)).fetchone() != (0,), what="the query to run")
        connection.cancel_safe()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(errors.QueryCanceled):
        explain(connection, "SELECT infer(body), pg_sleep(0.05) FROM t")
    thread.join()
    assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)
    assert explain(connection, "SELECT infer(body) FROM t")["calls"] == 120


def test_a_statement_timeout_holds(connection: Connection) -> None:
    connection.execute("SET statement_timeout = '300ms'")
    with pytest.raises(errors.QueryCanceled):
        explain(connection, "SELECT infer(body), pg_sleep(0.05) FROM t")
    connection.execute("RESET statement_timeout")
    assert connection.execute("SELECT infer('ab')").fetchone() == ("ba",)


# Attacks


@pytest.mark.parametrize("hidden_by", ["policy", "view", "function", "wrapped policy"])
def test_rows_hidden_by_the_model_s_answer_stay_hidden(ada: Connection, hidden_by: str) -> None:
    """NULL would pass IS DISTINCT FROM; a function of the caller's would then see the row."""
    ada.execute("RESET ROLE")
    ada.execute("CREATE TABLE docs AS SELECT 'secret' AS body")
    ada.execute(
        "CREATE FUNCTION admits(body text) RETURNS boolean LANGUAGE plpgsql STABLE"
        " AS $$BEGIN RETURN infer(body) IS DISTINCT FROM 'terces'; END$$"
    )
    if "policy" in hidden_by:
        condition = "admits(body)" if hidden_by == "wrapped policy" else "infer(body) IS DISTINCT FROM 'terces'"
        ada.execute(f"ALTER TABLE docs ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON docs USING ({condition})")
        ada.execute("GRANT SELECT ON docs TO explain_ada")
        source = "docs"
    elif hidden_by == "view":
        ada.execute("CREATE VIEW open_docs AS SELECT * FROM docs WHERE infer(body) IS DISTINCT FROM 'terces'")
        ada.execute("GRANT SELECT ON open_docs TO explain_ada")
        source = "open_docs"
    else:
        ada.execute(
            "CREATE FUNCTION open_docs() RETURNS SETOF text SECURITY DEFINER LANGUAGE sql"
            " AS 'SELECT body FROM public.docs WHERE public.infer(body) IS DISTINCT FROM ''terces'''"
        )
        source = "open_docs() AS body"
    ada.execute("GRANT CREATE ON SCHEMA public TO explain_ada")
    ada.execute("SET ROLE explain_ada")
    ada.execute(
        "CREATE FUNCTION leak(body text) RETURNS text LANGUAGE plpgsql COST 0.0001"
        " AS $$BEGIN RAISE NOTICE '%', body; RETURN body; END$$"
    )
    seen: list[str] = []
    ada.add_notice_handler(lambda notice: seen.append(notice.message_primary or ""))
    with pytest.raises(errors.FeatureNotSupported, match="does not look into"):
        explain(ada, f"SELECT infer(leak(body)) FROM {source}")
    assert ada.execute(f"SELECT body FROM {source}").fetchall() == []
    assert not any("secret" in notice for notice in seen)


def test_stand_ins_are_of_no_use_elsewhere(ada: Connection) -> None:
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="explain"):
        ada.execute("SELECT stratakv_probe.infer('x')")
    ada.execute("SELECT infer('x')")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="explain"):
        ada.execute("SELECT stratakv_probe.infer_json('x', '{}')")


def test_an_explain_that_was_begun_by_hand_changes_no_real_call(ada: Connection) -> None:
    ada.execute("SELECT stratakv.sql_explain_begin('SELECT 1', '{}')")
    assert ada.execute("SELECT infer('ab'), count(infer(body)) FROM t GROUP BY ()").fetchone() == ("ba", 120)
    ada.execute("SELECT stratakv.sql_explain_begin('SELECT 1', '{}')")
    with pytest.raises((errors.InsufficientPrivilege, errors.ObjectNotInPrerequisiteState)):
        ada.execute("SELECT stratakv.sql_explain_end('00', 1)")
    with pytest.raises(errors.InsufficientPrivilege):
        ada.execute("SELECT stratakv.sql_call('poll')")
    assert ada.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_a_plain_setting_makes_no_answer_null(ada: Connection) -> None:
    ada.execute("SET stratakv.explaining = 'on'")
    with pytest.raises(errors.FeatureNotSupported):
        ada.execute("SELECT infer('ab')")
    ada.execute("RESET stratakv.explaining")
    assert ada.execute("SELECT infer('ab')").fetchone() == ("ba",)


def test_the_query_runs_with_the_caller_s_rights(ada: Connection) -> None:
    ada.execute("RESET ROLE")
    ada.execute("CREATE TABLE private AS SELECT 'secret' AS body")
    ada.execute("SET ROLE explain_ada")
    for query in (
        "SELECT infer(body) FROM private",
        "SELECT infer(body) FROM stratakv.sql_listeners, t",
        "SELECT set_config('role', 'none', true), infer(body) FROM private",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            explain(ada, query)
    assert explain(ada, "SELECT infer(current_user || set_config('role', 'explain_ada', true)) FROM t")["calls"] == 120
    assert ada.execute("SELECT current_user").fetchone() == ("explain_ada",)


def test_a_hostile_search_path_changes_nothing(ada: Connection) -> None:
    ada.execute("RESET ROLE; CREATE SCHEMA hostile; GRANT ALL ON SCHEMA hostile TO explain_ada; SET ROLE explain_ada")
    ada.execute("CREATE FUNCTION hostile.bad(jsonb, text) RETURNS text LANGUAGE plpgsql AS $$BEGIN RAISE 'hit'; END$$")
    ada.execute("CREATE OPERATOR hostile.->> (leftarg = jsonb, rightarg = text, function = hostile.bad)")
    ada.execute("CREATE FUNCTION hostile.set_config(text, text, boolean) RETURNS text LANGUAGE sql AS $$SELECT 'hit'$$")
    ada.execute("SET search_path = hostile, pg_catalog, public")
    assert explain(ada, "SELECT infer(body) FROM public.t")["calls"] == 120


def test_it_goes_with_the_functions(cluster: EmbeddedPostgres, database: str) -> None:
    install_url = cluster.database_url(database)
    uninstall(install_url)
    with psycopg.connect(install_url) as connection:
        row = connection.execute(
            sql.SQL("SELECT to_regnamespace('stratakv_probe'), to_regnamespace('stratakv')")
        ).fetchone()
    assert row == (None, None)


@pytest.mark.parametrize("call", ["infer_agg('Sum up.', body)", "stratakv.infer_fold('Sum up.', array_agg(body))"])
def test_folds_are_explained_by_their_texts(
    connection: Connection, explainer: CountingExplainer, explaining: FrontThread, call: str
) -> None:
    connection.execute("SELECT stratakv.explain(%s)", (f"SELECT {call} FROM t GROUP BY i % 3",))
    assert len(explainer.seen) == 3
    assert all("text" in prompt for prompt in explainer.seen)
    assert explaining.model.calls == []
