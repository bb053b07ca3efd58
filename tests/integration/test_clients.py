"""Ordinary clients get a real model's answer, and the second time from the pool: psql, psycopg, asyncpg, openai."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import asyncpg
import openai
import psycopg
import pytest

from stratakv.postgres import find_binaries
from stratakv.rest_client import Messages, RestClient
from stratakv.up.instance import Instance
from tests.cluster import running_cluster, stratakv
from tests.support import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

QUESTION = "What is the capital of France?"
QUERY = f"""SELECT infer('{QUESTION}', options => '{{"temperature": 0}}')"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    with running_cluster(tmp_path_factory.mktemp("up")) as running:
        yield running
        assert running.stop() == 0


def test_psql_gets_an_answer(cluster: Instance) -> None:
    psql = find_binaries(None).program("psql")
    shown = subprocess.run(
        [psql, cluster.state["sql_url"], "--no-psqlrc", "-At", "-c", QUERY],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Paris" in shown.stdout


def test_psycopg_gets_an_answer(cluster: Instance) -> None:
    with psycopg.connect(cluster.state["sql_url"]) as session:
        row = session.execute(QUERY).fetchone()
    assert row is not None
    assert "Paris" in row[0]


async def test_asyncpg_gets_an_answer(cluster: Instance) -> None:
    session = await asyncpg.connect(cluster.state["sql_url"], ssl=False)
    try:
        assert "Paris" in await session.fetchval(QUERY)
    finally:
        await session.close()


def test_the_openai_package_gets_an_answer(cluster: Instance) -> None:
    client = openai.OpenAI(base_url=f"{cluster.rest_url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=cluster.state["model"], messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=20
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None


def test_the_command_line_finds_it_by_its_state_file(cluster: Instance) -> None:
    shown = json.loads(stratakv(cluster, "status", "--json").stdout)
    assert shown["db_node"]["ready"] == "yes"
    assert (len(shown["workers"]), len(shown["nodes"])) == (2, 2)
    assert "Paris" in stratakv(cluster, "chat", QUESTION).stdout
    assert "Paris" in stratakv(cluster, "sql", "-c", QUERY).stdout


def test_a_long_prompt_is_split_between_workers_and_then_comes_from_the_pool(cluster: Instance) -> None:
    log = "\n".join(f"{minute // 60:02d}:{minute % 60:02d} device {minute} restarted" for minute in range(150))
    messages: Messages = [{"role": "system", "content": log}, {"role": "user", "content": "Which device was first?"}]
    client = RestClient(cluster.rest_url)

    cold = client.chat(messages, model=cluster.state["model"], max_tokens=8)
    client.post("/admin/cache/drop", {"tiers": ["l1", "l2"]})
    warm = client.chat(messages, model=cluster.state["model"], max_tokens=8)

    assert cold.tokens_by_tier() == {"computed": cold.usage["prompt_tokens"], "l1": 0, "l2": 0, "pool": 0}
    assert warm.tokens_by_tier()["pool"] >= warm.usage["prompt_tokens"] - 16
    routes = client.get("/admin/routes")
    assert any(route["prefill"] and route["prefill"] != route["worker"] for route in routes["routes"])
    client.close()


def test_usage_is_written_once_for_each_request(cluster: Instance) -> None:
    client = RestClient(cluster.rest_url)
    answer = client.chat(
        [{"role": "user", "content": "Say yes, and nothing else at all."}], model=cluster.state["model"], max_tokens=4
    )
    client.close()

    def times_written() -> int:
        with psycopg.connect(cluster.state["database_url"]) as session:
            row = session.execute(
                "SELECT count(*) FROM stratakv.usage_events WHERE prompt_tokens = %s AND generated_tokens = %s",
                (answer.usage["prompt_tokens"], answer.usage["completion_tokens"]),
            ).fetchone()
            assert row is not None
            return int(row[0])

    eventually(lambda: times_written() == 1, what="usage event of the last request")
