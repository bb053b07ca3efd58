"""The DB node with one vLLM for prefill and one for decode, KV handed over through the pool: SQL, REST, events, a lost server."""

from __future__ import annotations

import json
import os
import random
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from benchmarks.harness import words
from benchmarks.vllm_process import BLOCK_SIZE, connector_config
from stratakv.migrate import upgrade
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import SqlSettings
from stratakv.sqlfunctions import ListenerAddress, install
from stratakv.text import decode, load_tokenizer, render_chat
from tests.integration.fleet.processes import Fleet
from tests.service_process import ServiceProcess
from tests.support import eventually, free_port
from tests.vllm.openai_server import LossyRelay, OpenAiServer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"
SPLIT_FROM = 256
COMPUTED = "vllm:request_prefill_kv_computed_tokens_sum"


@dataclass
class Site:
    """All that runs."""

    node: ServiceProcess
    rest_port: int
    sql_url: str
    prefill: OpenAiServer
    decode: OpenAiServer
    relay: LossyRelay
    openai: openai.OpenAI

    def admin(self, what: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.rest_port}/admin/{what}", timeout=10) as response:
            found: list[dict[str, Any]] = json.load(response)[what]
        return found

    def worker(self, server: OpenAiServer) -> dict[str, Any]:
        return next(w for w in self.admin("workers") if w["url"].endswith(f":{server.port}"))

    def events(self, server: OpenAiServer) -> dict[str, Any]:
        found: dict[str, Any] = self.worker(server)["events"]
        return found

    def complete(self, prompt: list[int], max_tokens: int, **options: Any) -> Any:
        return self.openai.completions.create(
            model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, **options
        )

    def sql(self, query: str) -> Any:
        with psycopg.connect(self.sql_url, autocommit=True) as connection:
            row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]


@pytest.fixture(scope="module")
def fleet(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE vllm_node")
    upgrade(postgres.database_url("vllm_node"))
    fleet = Fleet(postgres.database_url("vllm_node"), tmp_path_factory.mktemp("fleet"))
    fleet.env["STRATAKV_DMP_SEGMENT_BYTES"] = "512MiB"
    fleet.meta()
    fleet.daemon("dmp-0")
    yield fleet
    fleet.stop()


@pytest.fixture(scope="module")
def site(
    fleet: Fleet, model: Path, postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("vllm-node")
    prefill, decode = (OpenAiServer(directory / f"{name}.log") for name in ("prefill", "decode"))
    connector = connector_config(fleet.meta_port)
    cores = sorted(os.sched_getaffinity(0))
    for number, server in enumerate((prefill, decode)):
        # A core each: threads that wait for each other take the core from the other server.
        server.start(model, directory, core=cores[number % len(cores)], connector=connector)
    relay = LossyRelay(f"tcp://127.0.0.1:{decode.events_port}")
    try:
        for server in (prefill, decode):
            server.wait_ready()
        with tempfile.TemporaryDirectory(prefix="skv-") as listener:
            Path(listener).chmod(0o711)
            yield from _node(fleet, postgres, Path(listener), prefill, decode, relay)
    finally:
        relay.close()
        for server in (prefill, decode):
            server.stop()


def _node(
    fleet: Fleet,
    postgres: EmbeddedPostgres,
    listener: Path,
    prefill: OpenAiServer,
    decode: OpenAiServer,
    relay: LossyRelay,
) -> Iterator[Site]:
    rest_port, sql_port = free_port(), free_port()
    flags = {
        "rest-port": rest_port,
        "port": sql_port,
        "listener-dir": listener,
        "backend-trusted": "true",
        "backend-uid": postgres.uid,
        "split-tokens-min": SPLIT_FROM,
        "refresh-s": 0.2,
    }
    addresses = [
        f"vllm://127.0.0.1:{prefill.port},role=prefill,"
        f"events=tcp://127.0.0.1:{prefill.events_port},replay=tcp://127.0.0.1:{prefill.replay_port}",
        f"vllm://127.0.0.1:{decode.port},role=decode,"
        f"events={relay.endpoint},replay=tcp://127.0.0.1:{decode.replay_port}",
    ]
    arguments = [*(f"--{name}={value}" for name, value in flags.items()), *(f"--worker={a}" for a in addresses)]
    node = fleet._add("dbnode", "dbnode", arguments)
    install(fleet.database_url, ListenerAddress.from_settings(SqlSettings(listener_dir=listener, port=sql_port)))
    sql_url = make_conninfo(fleet.database_url, host="127.0.0.1", port=sql_port)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{rest_port}/v1", api_key="none", max_retries=0, timeout=120)
    site = Site(node, rest_port, sql_url, prefill, decode, relay, client)
    eventually(lambda: _are_alive(site), timeout_s=60, what=f"both workers:\n{node.log_tail()}")
    yield site
    client.close()
    node.stop()


def _are_alive(site: Site) -> bool:
    assert not site.node.has_ended(), site.node.log_tail()
    try:
        return sum(worker["alive"] for worker in site.admin("workers")) == 2
    except OSError:
        return False


@pytest.fixture(scope="module")
def prompts(model: Path) -> Iterator[list[int]]:
    """New prompts of 420 tokens, which begin differently."""

    def make() -> Iterator[list[int]]:
        rng = random.Random(11)
        tokenizer = load_tokenizer(model)
        while True:
            yield tokenizer.encode(words(500, rng))[:420]

    return make()


def test_sql_and_rest_give_the_answer_that_vllm_gives(site: Site, model: Path) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    tokenizer = load_tokenizer(model)
    expected = decode(tokenizer, site.decode.complete(render_chat(tokenizer, messages), 24))
    assert "Paris" in expected
    options = '{"max_tokens": 24, "temperature": 0}'
    assert site.sql(f"SELECT infer('{QUESTION}', NULL, '{options}')") == expected
    chat = site.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
    assert chat.choices[0].message.content == expected


def test_answers_have_the_form_that_sql_asks_for(site: Site) -> None:
    assert site.sql(f"SELECT infer_bool('Is this a question? {QUESTION}')") in (True, False)
    assert site.sql(f"SELECT infer_choice('{QUESTION}', ARRAY['Paris', 'Rome'])") in ("Paris", "Rome")
    schema = '{"type": "object", "properties": {"city": {"type": "boolean"}}, "required": ["city"]}'
    assert site.sql(f"SELECT infer_json('{QUESTION}', '{schema}')")["city"] in (True, False)


def test_what_is_wrong_with_a_request_is_said(site: Site) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError):
        site.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], response_format=wrong
        )


def test_a_long_prompt_is_computed_once_and_answered_elsewhere(
    site: Site, prompts: Iterator[list[int]], model: Path
) -> None:
    prompt = next(prompts)
    computed_before = site.decode.metric(COMPUTED)
    answer = site.complete(prompt, 16)
    route = site.admin("routes")[-1]
    assert (route["prefill"], route["worker"]) == (
        f"127.0.0.1:{site.prefill.port}",
        f"127.0.0.1:{site.decode.port}",
    )
    left = len(prompt) + 1 - len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    eventually(
        lambda: site.decode.metric(COMPUTED) - computed_before == left,
        timeout_s=10,
        what="the decode server loads the full blocks and computes what is left",
    )
    assert answer.choices[0].text == decode(load_tokenizer(model), site.prefill.complete(prompt, 16))
    num_full = len(prompt) // BLOCK_SIZE
    eventually(lambda: site.prefill.metric("stratakv_vllm_blocks_saved_total") >= num_full, what="saves to be counted")
    loaded = "stratakv_vllm_tokens_loaded_total"
    eventually(lambda: site.decode.metric(loaded) >= num_full * BLOCK_SIZE, what="the load to be counted")


def test_a_seeded_answer_is_the_same_wherever_it_is_made(site: Site, prompts: Iterator[list[int]]) -> None:
    prompt = next(prompts)
    ask = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 1.0, "seed": 5}
    apart = site.openai.completions.create(**ask)
    assert site.admin("routes")[-1]["prefill"] is not None
    together = site.openai.completions.create(**ask)
    assert site.admin("routes")[-1]["prefill"] is None
    assert apart.choices[0].text == together.choices[0].text


def test_events_tell_the_router_what_is_held_and_a_gap_is_filled(site: Site, prompts: Iterator[list[int]]) -> None:
    for server in (site.prefill, site.decode):
        server.complete(next(prompts), 1)
        eventually(lambda s=server: site.events(s)["state"] == "live", timeout_s=20, what="events believed")
    before = site.events(site.decode)
    site.relay.loses = True
    site.decode.complete(next(prompts), 1)
    eventually(lambda: site.relay.num_lost > 0, timeout_s=20, what="events lost")
    site.relay.loses = False
    site.decode.complete(next(prompts), 1)
    eventually(lambda: site.events(site.decode)["gaps"] > before["gaps"], timeout_s=20, what="the gap seen")
    eventually(lambda: _has_all(site.events(site.decode)), timeout_s=20, what="the gap filled")
    assert site.events(site.decode)["resyncs"] == before["resyncs"]


def _has_all(events: dict[str, Any]) -> bool:
    return bool(events["batches"] == events["sequence"] + 1)


def test_a_client_that_goes_away_frees_the_server(site: Site) -> None:
    def num_running() -> float:
        return sum(server.metric("vllm:num_requests_running") for server in (site.prefill, site.decode))

    stream = site.complete([1, 2, 3], 1500, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    eventually(lambda: num_running() == 1, timeout_s=20, what="the request seen to run")
    stream.close()
    eventually(lambda: num_running() == 0, timeout_s=10, what="the request aborted")


def test_a_killed_server_costs_no_token(site: Site, prompts: Iterator[list[int]], model: Path) -> None:
    prompt = next(prompts)[:100]
    expected = site.prefill.complete(prompt, 24, ignore_eos=True)
    seen: list[str] = []
    for chunk in site.complete(prompt, 24, stream=True, extra_body={"ignore_eos": True}):
        seen += [choice.text for choice in chunk.choices]
        if len(seen) == 5:
            site.decode.kill()
    assert "".join(seen) == decode(load_tokenizer(model), expected)
    eventually(lambda: not site.worker(site.decode)["alive"], timeout_s=20, what="the server gone")
    assert site.complete(prompt, 4).usage.completion_tokens == 4
