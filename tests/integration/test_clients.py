"""Ordinary clients get a real model's answer, and the second time from the pool: psql, psycopg, asyncpg, openai.

Typed answers are tested here too, since only a real worker holds a model to them.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

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
PERSON: dict[str, object] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
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


def test_the_openai_package_gets_answers_tokens_and_calls_of_a_real_model(cluster: Instance) -> None:
    client = openai.OpenAI(base_url=f"{cluster.rest_url}/v1", api_key="none", max_retries=0)
    question: Messages = [{"role": "user", "content": QUESTION}]
    how: dict[str, Any] = {"model": cluster.state["model"], "messages": question, "max_tokens": 12}
    several = client.chat.completions.create(**how, n=3, seed=5, logprobs=True, top_logprobs=2)
    assert len({c.message.content for c in several.choices}) > 1
    for choice in several.choices:
        content = choice.logprobs.content if choice.logprobs else None
        assert content
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in content)
    greedy = client.chat.completions.create(**how, temperature=0)
    rest = RestClient(cluster.rest_url)
    bias = {str(token): -100 for token in rest.post("/tokenize", {"prompt": " Paris"})["tokens"]}
    rest.close()
    assert "Paris" in (greedy.choices[0].message.content or "")
    city = {
        "name": "city",
        "parameters": {
            "type": "object",
            "properties": {"id": {"enum": ["Oslo", "Rome"]}},
            "required": ["id"],
            "additionalProperties": False,
        },
    }
    tools: list[Any] = [{"type": "function", "function": city}]
    biased = client.chat.completions.create(**how, temperature=0, logit_bias=bias, presence_penalty=0.5)
    assert biased.choices[0].message.content != greedy.choices[0].message.content
    for choice_of in ("required", {"type": "function", "function": {"name": "city"}}):
        asked = {**how, "max_tokens": 60, "temperature": 0, "tools": tools, "tool_choice": choice_of}
        answer = client.chat.completions.create(**asked, parallel_tool_calls=False)
        [call] = answer.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments)["id"] in ("Oslo", "Rome")


def test_the_command_line_finds_it_by_its_state_file(cluster: Instance) -> None:
    shown = json.loads(stratakv(cluster, "status", "--json").stdout)
    assert shown["db_node"]["ready"] == "yes"
    is_disk = sorted("disk_of" in node["segment"] for node in shown["nodes"])
    assert (len(shown["workers"]), is_disk) == (2, [False, False, True, True])
    assert "Paris" in stratakv(cluster, "chat", QUESTION).stdout
    assert "Paris" in stratakv(cluster, "sql", "-c", QUERY).stdout


def test_a_long_prompt_is_split_between_workers_and_then_comes_from_the_pool(cluster: Instance) -> None:
    log = "\n".join(f"{minute // 60:02d}:{minute % 60:02d} device {minute} restarted" for minute in range(150))
    messages: Messages = [{"role": "system", "content": log}, {"role": "user", "content": "Which device was first?"}]
    client = RestClient(cluster.rest_url)

    cold = client.chat(messages, model=cluster.state["model"], max_tokens=8)
    client.post("/admin/cache/drop", {"tiers": ["l1", "l2"]})
    warm = client.chat(messages, model=cluster.state["model"], max_tokens=8)

    assert cold.tokens_by_tier() == {"computed": cold.usage["prompt_tokens"], "l1": 0, "l2": 0, "pool": 0, "disk": 0}
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


def test_a_column_of_choices_has_members_only_and_booleans_are_booleans(cluster: Instance) -> None:
    reviews = ["I love it", "Terrible, broke at once", "It is a kettle", "é☕"]
    query = """SELECT infer_choice('Is this review positive or negative? ' || r, ARRAY['positive', 'negative', 'not sure'],
            options => '{"temperature": 1, "seed": 5}'),
        infer_bool('Is this review positive? ' || r), infer_tokens(r) FROM unnest(%s::text[]) r"""
    with psycopg.connect(cluster.state["sql_url"]) as session:
        rows = session.execute(query, (reviews,)).fetchall()
    assert len(rows) == len(reviews)
    assert {row[0] for row in rows} <= {"positive", "negative", "not sure"}
    assert all(isinstance(row[1], bool) and row[2] > 0 for row in rows)


def test_json_answers_fit_their_schema_also_for_a_prompt_that_is_split(cluster: Instance) -> None:
    text = "Name one person of this list. " + " ".join(f"{number}: John, aged {number % 60}." for number in range(150))
    with psycopg.connect(cluster.state["sql_url"]) as session:
        rows = session.execute(
            "SELECT infer_json(p, %s), infer_row('Who is {who}?', '{\"who\": \"Ada\"}', options => '{\"max_tokens\": 4}')"
            " FROM unnest(%s::text[]) p",
            (json.dumps(PERSON), [text, "John is 30 years old."]),
        ).fetchall()
    for person, answer in rows:
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 12
        assert 0 <= person["age"] <= 150
        assert isinstance(answer, str)


def test_what_is_wrong_with_a_schema_or_an_answer_is_told(cluster: Instance) -> None:
    cut = """infer_json('List numbers.', '{"type": "array", "items": {"type": "integer"}, "minItems": 50}', options => %s)"""
    with psycopg.connect(cluster.state["sql_url"], autocommit=True) as session:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="objct"):
            session.execute("""SELECT infer_json('x', '{"type": "objct"}')""")
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="choices"):
            session.execute("SELECT infer_choice('x', '{}')")
        with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="max_tokens"):
            session.execute(f"SELECT {cut}".encode(), ('{"max_tokens": 5}',))
        rows = session.execute(
            f"SELECT {cut}, {cut}".encode(),
            ('{"max_tokens": 5, "on_error": "null"}', '{"max_tokens": 5, "on_error": "detail"}'),
        ).fetchall()
    assert rows[0][0] is None
    assert rows[0][1]["error"]["code"] == "answer_cut"


def test_the_openai_package_gets_an_answer_in_its_schema(cluster: Instance) -> None:
    client = openai.OpenAI(base_url=f"{cluster.rest_url}/v1", api_key="none", max_retries=0)

    def ask(schema: dict[str, object]) -> str:
        answer = client.chat.completions.create(
            model=cluster.state["model"],
            messages=[{"role": "user", "content": "John is 30 years old."}],
            max_tokens=100,
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        )
        return answer.choices[0].message.content or ""

    assert set(json.loads(ask(PERSON))) == {"name", "age"}
    with pytest.raises(openai.BadRequestError, match="objct"):
        ask({"type": "objct"})
