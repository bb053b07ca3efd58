"""The steps go up and down with data in the tables, one by one, and what a step is not about stays as it is.

`ROWS` has rows for the tables of each revision, as its release writes them; whoever adds a table adds rows.
"""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from stratakv import migrate

Rows = list[tuple[Any, ...]]
ROWS = {
    "0001": """
        INSERT INTO stratakv.models (name) VALUES ('m');
        INSERT INTO stratakv.nodes (name) VALUES ('n0');
        INSERT INTO stratakv.segments (epoch, node, host, port, socket_name, size_bytes)
            VALUES ('\\x01', 'n0', 'h', 1, 's', 4096);
        INSERT INTO stratakv.workers (name, epoch, url, role, model, namespace, block_size, max_model_len)
            VALUES ('w', '\\x01', 'http://w', 'both', 'm', '\\x02', 16, 8192);
        INSERT INTO stratakv.put_sessions (put_id, namespace, epoch, worker, page_bytes, block_size, keys, expires_at)
            VALUES ('\\x03', '\\x02', '\\x01', 'w', 4096, 16, '\\x04', now());
        INSERT INTO stratakv.blocks (namespace, key, block_size) VALUES ('\\x02', '\\x04', 16);
        INSERT INTO stratakv.replicas VALUES ('\\x01', 0, 1, '\\x02', '\\x04', 4096, 1, 0);
        INSERT INTO stratakv.removals (id, epoch, extents, page_bytes, reason) VALUES (1, '\\x01', '', '', 'room');
        INSERT INTO stratakv.tenants (name) VALUES ('acme');
        INSERT INTO stratakv.usage_events (request_id, tenant_id, model, source, prompt_tokens, outcome, created_at)
            SELECT 'r' || i, 1 + i % 2, 'm', 'sql', i, 'completed', now() - i * interval '1 hour'
            FROM generate_series(1, 100) i;""",
    "0002": "INSERT INTO stratakv.sql_statements VALUES ('r', 'd', '', 'q', 1, 1, 1, 0, 9, 0, 0, 0, 4, 1.5, 0, now(), now());",
    "0003": """
        INSERT INTO stratakv.nodes (name) VALUES ('n0-disk');
        INSERT INTO stratakv.segments (epoch, node, host, port, socket_name, size_bytes, disk_of)
            VALUES ('\\x05', 'n0-disk', 'h', 2, 's', 4096, 'n0');""",
    "0004": "INSERT INTO stratakv.cache_rules VALUES ('\\x02', 60, 0, 0, true);",
    "0005": """
        INSERT INTO stratakv.kvcm_groups VALUES ('g', '\\x06');
        INSERT INTO stratakv.kvcm_storages VALUES ('s', '\\x06', true);
        INSERT INTO stratakv.kvcm_instances VALUES ('i', '\\x06');
        INSERT INTO stratakv.kvcm_writes VALUES ('w', 'i', 'g', 'p', 'l', '\\x00', '\\x04', '\\x02', NULL, 0, now());""",
    "0006": "INSERT INTO stratakv.meta_servers VALUES ('a:1', '', 0, 0, now());",
    "0007": "INSERT INTO stratakv.kvcm_accounts VALUES ('u', 1, 'h');",
    "0008": """
        INSERT INTO stratakv.api_keys (tenant_id, name, prefix, key_hash) VALUES (2, 'k', 'skv-1', '\\x07');
        INSERT INTO stratakv.tenant_roles (cluster, role_name, role_oid, tenant_id) VALUES ('1', 'r', 1, 2);
        INSERT INTO stratakv.tenant_limits (tenant_id, tokens_per_month) VALUES (2, 1000);
        INSERT INTO stratakv.quota_nodes (node) VALUES ('d');
        INSERT INTO stratakv.quota_state (tenant_id, kind, spent_micros) VALUES (2, 'tokens_month', 7);
        INSERT INTO stratakv.quota_leases VALUES ('d', 2, 'tokens_month', 3);
        INSERT INTO stratakv.reservations (request_id, node, tenant_id, reserved_micros) VALUES ('q', 'd', 2, 9);""",
    "0010": """
        INSERT INTO stratakv.usage_events (request_id, tenant_id, model, source, prompt_tokens, outcome)
            SELECT 's' || i, 2, 'm', 'rest', i, 'unused' FROM generate_series(1, 10) i;""",
    "0012": """
        INSERT INTO stratakv.conversations (id, tenant_id, num_items, expires_at) VALUES ('conv_1', 2, 1, now());
        INSERT INTO stratakv.conversation_items (conversation_id, position, item_id, role, content)
            VALUES ('conv_1', 0, 'msg_1', 'user', 'x');""",
    "0013": """
        INSERT INTO stratakv.statements VALUES
            ('1', 2, 'r', 1, 'd', '', 'q', 1, 1, 1, 0, 9, 0, 0, 0, 4, 1.5, 0, now(), now());""",
    "0014": """
        UPDATE stratakv.put_sessions SET owner = 2;
        INSERT INTO stratakv.cache_usage VALUES (2, 4096, 0);""",
}
KEPT = {
    "tenants": "SELECT id, name FROM stratakv.tenants ORDER BY id",
    "usage": "SELECT request_id, tenant_id, model, prompt_tokens, outcome, created_at"
    " FROM stratakv.usage_events ORDER BY request_id",
    "replicas": "SELECT * FROM stratakv.replicas",
    "puts": "SELECT put_id, keys, state FROM stratakv.put_sessions",
}
"""What every revision must leave as it was."""


def run(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def kept(url: str) -> dict[str, Rows]:
    with psycopg.connect(url) as connection:
        return {name: connection.execute(query.encode()).fetchall() for name, query in KEPT.items()}


@pytest.fixture
def full(url: str) -> str:
    """At the newest revision, with rows that were written at each."""
    for step in migrate.history():
        migrate.upgrade(url, step.revision)
        if step.revision in ROWS:
            run(url, ROWS[step.revision])
    return url


def test_data_survive_each_step_down_and_up_again(full: str) -> None:
    before = kept(full)
    steps = [step.revision for step in migrate.history()]
    for revision in reversed(steps[:-1]):
        migrate.downgrade(full, revision)
        assert kept(full) == before, revision
    for revision in steps[1:]:
        migrate.upgrade(full, revision)
        assert kept(full) == before, revision


def test_every_table_has_rows_when_the_steps_are_taken(full: str) -> None:
    with psycopg.connect(full) as connection:
        tables = connection.execute(
            "SELECT oid::regclass::text FROM pg_class"
            " WHERE relnamespace = 'stratakv'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition"
        ).fetchall()
        found = {name: connection.execute(f"SELECT count(*) FROM {name}".encode()).fetchone() for (name,) in tables}
    assert [name for name, rows in found.items() if rows == (0,)] == []


def test_nothing_is_left_below_the_first_step(full: str) -> None:
    migrate.downgrade(full, "base")
    with psycopg.connect(full) as connection:
        found = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'stratakv'::regnamespace AND relkind <> 'i'"
            " UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'stratakv'::regnamespace"
        ).fetchall()
    assert found == [("schema_version",)]


def test_requests_that_were_cleared_away_come_back_on_the_way_down(full: str) -> None:
    before = kept(full)["usage"]
    run(full, "DELETE FROM stratakv.usage_events WHERE request_id IN ('r1', 's1')")
    migrate.downgrade(full, "0009")
    assert kept(full)["usage"] == before


def test_sums_of_what_was_there_before_are_made(full: str) -> None:
    migrate.downgrade(full, "0009")
    migrate.upgrade(full)
    with psycopg.connect(full) as connection:
        sums = connection.execute(
            "SELECT sum(requests), sum(prompt_tokens), sum(unused_requests), sum(unused_tokens) FROM stratakv.usage_daily"
        ).fetchone()
        single = connection.execute("SELECT count(*) FROM stratakv.usage_history").fetchone()
    assert sums == (100, 5050, 10, 55)
    assert single == (110,)
