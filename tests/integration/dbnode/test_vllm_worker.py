"""A DB node over servers that speak as vLLM does (the real one is tested by `make test-vllm`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from dbnode.errors import WorkerRefused
from dbnode.generate import GenerateRequest, Sampling, Source, StructuredOutputs
from dbnode.kv_events.feed import FeedState
from dbnode.vllm import client
from stratakv.cli.status import Report, _ask_db_node, _print
from stratakv.keys import KEY_BYTES, block_keys
from stratakv.settings import RestSettings, Secret, Settings
from stratakv.text import encode, load_tokenizer
from stratakv.wire import MatchPrefix
from tests.integration.dbnode.running_node import CACHE_DIR, PoolOfBlocks, RunningNode, running_node
from tests.kv_event_publisher import publishing, removed, stored
from tests.stand_in_vllm import BLOCK_SIZE, StandInVllm
from tests.stand_in_worker import MODEL, StandInWorker, expected_tokens, token_at
from tests.support import eventually_async, free_port

PROMPT = list(range(1000, 1080))
LONG = list(range(2000, 2800))
NAMESPACE = "ab" * 16


@pytest_asyncio.fixture
async def vllm() -> AsyncIterator[StandInVllm]:
    server = await StandInVllm().start()
    yield server
    await server.stop()


@pytest_asyncio.fixture
async def other() -> AsyncIterator[StandInVllm]:
    server = await StandInVllm().start()
    yield server
    await server.stop()


async def complete(node: RunningNode, prompt: list[int], num_tokens: int = 5, **options: Any) -> Any:
    return await node.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=num_tokens, **options)


async def tokens_of(node: RunningNode, prompt: list[int], num_tokens: int = 5, **sampling: Any) -> list[int]:
    """The answer's token ids, which REST does not show."""
    request = GenerateRequest(
        request_id=str(next(_NUMBERS)),
        source=Source.REST,
        arrived_s=time.monotonic(),
        prompt=tuple(prompt),
        sampling=Sampling(max_tokens=num_tokens, **sampling),
    )
    return [token async for chunk in node.node.inference.generate(request) for token in chunk.token_ids]


_NUMBERS = itertools.count()


async def test_a_vllm_server_answers_as_a_worker_of_ours_does(vllm: StandInVllm) -> None:
    async with running_node(also=(vllm.url,)) as node:
        assert await tokens_of(node, PROMPT, temperature=0.5, top_k=3, min_p=0.1) == expected_tokens(PROMPT, 5)
        (sent,) = vllm.requests
        assert (sent["prompt"], sent["max_tokens"], sent["stream"]) == (PROMPT, 5, True)
        assert (sent["temperature"], sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (0.5, 3, 0.1, 1.0)
        answer = await complete(node, PROMPT, 3, extra_body={"cache_salt": "t1"}, stop=["zzz"], seed=7)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 3)
        assert vllm.requests[1].items() >= {"cache_salt": "t1", "stop": ["zzz"], "seed": 7}.items()
        again = await complete(node, PROMPT, 3)
        assert again.usage.prompt_tokens_details.cached_tokens == 64


async def test_its_end_of_sequence_token_is_not_part_of_the_answer(vllm: StandInVllm) -> None:
    vllm.eos_after = 2
    async with running_node(also=(vllm.url,)) as node:
        assert await tokens_of(node, PROMPT) == expected_tokens(PROMPT, 2)
        assert (await complete(node, PROMPT)).choices[0].finish_reason == "stop"


async def test_forms_are_asked_for_in_its_words(vllm: StandInVllm) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    async with running_node(also=(vllm.url,)) as node:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        await node.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], response_format=form, max_tokens=2
        )
        assert vllm.requests[0]["structured_outputs"] == {"json": schema}


async def test_a_client_that_goes_away_cancels_its_request(vllm: StandInVllm) -> None:
    vllm.token_delay_s = 0.05
    async with running_node(also=(vllm.url,)) as node:
        stream = await complete(node, PROMPT, 500, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await eventually_async(lambda: vllm.cancelled == 1, what="the request aborted")


async def test_a_request_that_takes_too_long_is_ended_in_the_server_too(vllm: StandInVllm) -> None:
    vllm.token_delay_s = 0.1
    async with running_node(also=(vllm.url,), request_timeout_s=0.5) as node:
        with pytest.raises(openai.APIStatusError, match="deadline"):
            await complete(node, PROMPT, 500)
        await eventually_async(lambda: vllm.cancelled == 1, what="the request aborted")


async def test_workers_of_both_makers_stand_in_for_each_other(vllm: StandInVllm) -> None:
    own = await StandInWorker("w0", lose_after_tokens=2).start()
    vllm.waiting = 50
    try:
        async with running_node(own, also=(vllm.url,)) as node:
            found = await tokens_of(node, PROMPT, 4)
    finally:
        await own.stop()
    sent = expected_tokens(PROMPT, 2)
    assert found == [*sent, *expected_tokens([*PROMPT, *sent], 2)]


async def test_a_refusal_in_words_or_in_a_stream_is_the_clients_error(vllm: StandInVllm) -> None:
    wrong = {"message": "Grammar error: Invalid type", "type": "BadRequestError", "param": None, "code": 400}
    async with running_node(also=(vllm.url,)) as node:
        vllm.stream_error = wrong
        with pytest.raises(openai.BadRequestError, match="Grammar error"):
            await complete(node, PROMPT)
        vllm.stream_error, vllm.refuse = None, (400, wrong | {"message": "too long"})
        with pytest.raises(openai.BadRequestError, match="too long"):
            await complete(node, PROMPT)
        assert len(vllm.requests) == 2, "what is the client's mistake is not tried again"


async def test_an_engine_that_died_is_tried_elsewhere(vllm: StandInVllm, other: StandInVllm) -> None:
    dead = {"message": "EngineCore encountered an issue", "type": "InternalServerError", "param": None, "code": 500}
    vllm.stream_error = dead
    async with running_node(also=(vllm.url, other.url)) as node:
        for _ in range(4):
            assert await tokens_of(node, PROMPT) == expected_tokens(PROMPT, 5)
    assert len(other.requests) == 4


async def test_a_lost_server_is_continued_elsewhere_from_the_tokens_sent(vllm: StandInVllm, other: StandInVllm) -> None:
    vllm.lose_after_tokens, other.waiting = 2, 50
    async with running_node(also=(vllm.url, other.url)) as node:
        found = await tokens_of(node, PROMPT, 4)
    sent = expected_tokens(PROMPT, 2)
    longer = [*PROMPT, *sent]
    assert other.requests[0].items() >= {"prompt": longer, "max_tokens": 2}.items()
    assert found == [*sent, *expected_tokens(longer, 2)]


@pytest.mark.parametrize(
    "sampling", [{"structured_outputs": StructuredOutputs(choice=["a", "b"])}, {"seed": 3, "temperature": 1.0}]
)
async def test_an_answer_with_a_form_or_a_seed_is_generated_again_and_each_token_sent_once(
    vllm: StandInVllm, other: StandInVllm, sampling: dict[str, Any]
) -> None:
    vllm.lose_after_tokens, other.waiting = 2, 50
    async with running_node(also=(vllm.url, other.url)) as node:
        assert await tokens_of(node, PROMPT, 4, **sampling) == expected_tokens(PROMPT, 4)
    assert other.requests[0].items() >= {"prompt": PROMPT, "max_tokens": 4}.items()


async def test_an_answer_that_begins_differently_the_second_time_is_an_error(
    vllm: StandInVllm, other: StandInVllm
) -> None:
    vllm.lose_after_tokens, other.waiting, other.eos_after = 2, 50, 1
    async with running_node(also=(vllm.url, other.url)) as node:
        with pytest.raises(WorkerRefused, match="does not begin the answer"):
            await tokens_of(node, PROMPT, 4, seed=3)


async def test_a_server_that_is_gone_is_not_used_and_one_that_is_back_is(vllm: StandInVllm) -> None:
    async with running_node(also=(vllm.url,)) as node:
        port = vllm.port
        await vllm.stop()
        await node.sees()
        vllm.started += 100
        await vllm.start(port)
        await node.sees(vllm.url)
        assert await tokens_of(node, PROMPT) == expected_tokens(PROMPT, 5)


async def test_a_server_whose_engine_died_is_not_used(vllm: StandInVllm) -> None:
    async with running_node(also=(vllm.url,)) as node:
        vllm.engine_is_dead = True
        await node.sees()


async def test_the_api_key_is_shown_and_vllms_name_of_the_model_used(vllm: StandInVllm) -> None:
    vllm.served = "HuggingFaceTB/SmolLM2"
    async with running_node(also=(vllm.url,), vllm_api_key=Secret("k")) as node:
        await complete(node, PROMPT)
    assert vllm.authorizations == ["Bearer k"]
    assert vllm.requests[0]["model"] == "HuggingFaceTB/SmolLM2"


async def test_a_server_of_another_model_is_not_used_and_the_reason_shown() -> None:
    tokenizer = load_tokenizer(CACHE_DIR / "models" / MODEL)
    own, same = await StandInWorker("w0").start(), StandInVllm(tokenize=lambda text: encode(tokenizer, text))
    await same.start()
    another = await StandInVllm(tokenize=lambda text: [*encode(tokenizer, text), 1]).start()
    try:
        async with running_node(own, also=(same.url,), later=(another.url,)) as node:
            records = {record.url: record for record in node.node.directory.records}
            await eventually_async(lambda: "makes other tokens" in records[another.url].problem, what="the reason")
            assert not records[another.url].usable
    finally:
        for server in (own, same, another):
            await server.stop()


class PoolAfterPrefill(PoolOfBlocks):
    """What a prompt has in the pool once a server has computed it: all its blocks, if its connector works."""

    def __init__(self, prefill: StandInVllm, *, works: bool = True) -> None:
        super().__init__()
        self._prefill = prefill
        self._works = works

    async def call(self, request: Any, reply_type: type[Any], timeout_s: float | None = None) -> Any:
        if isinstance(request, MatchPrefix):
            assert request.namespace.hex() == NAMESPACE
            self.num_blocks = len(request.keys) // KEY_BYTES if self._prefill.requests and self._works else 0
        return await super().call(request, reply_type, timeout_s)


def prefill_and_decode(vllm: StandInVllm, other: StandInVllm) -> tuple[str, str]:
    return f"{vllm.url},role=prefill,namespace={NAMESPACE}", f"{other.url},role=decode,namespace={NAMESPACE}"


async def test_a_long_prompt_is_computed_by_one_server_and_answered_by_the_other(
    vllm: StandInVllm, other: StandInVllm
) -> None:
    pair = prefill_and_decode(vllm, other)
    async with running_node(also=pair, meta=PoolAfterPrefill(vllm)) as node:
        found = await tokens_of(node, LONG, 4)
    longer = [*LONG, token_at(LONG, 0)]
    assert found == [token_at(LONG, 0), *expected_tokens(longer, 3)]
    assert vllm.requests[0].items() >= {"prompt": LONG, "max_tokens": 1}.items()
    assert other.requests[0].items() >= {"prompt": longer, "max_tokens": 3}.items()


async def test_a_seeded_answer_to_a_long_prompt_comes_whole_from_the_decode_server(
    vllm: StandInVllm, other: StandInVllm
) -> None:
    pair = prefill_and_decode(vllm, other)
    async with running_node(also=pair, meta=PoolAfterPrefill(vllm)) as node:
        assert await tokens_of(node, LONG, 4, seed=3) == expected_tokens(LONG, 4)
    assert len(vllm.requests) == 1
    assert other.requests[0].items() >= {"prompt": LONG, "max_tokens": 4}.items()


async def test_blocks_that_do_not_get_into_the_pool_keep_the_answer_where_it_began(
    vllm: StandInVllm, other: StandInVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "HAND_OVER_S_MAX", 0.05)
    pair = prefill_and_decode(vllm, other)
    async with running_node(also=pair, meta=PoolAfterPrefill(vllm, works=False)) as node:
        found = await tokens_of(node, LONG, 4)
    assert found == [token_at(LONG, 0), *expected_tokens([*LONG, token_at(LONG, 0)], 3)]
    assert (len(vllm.requests), len(other.requests)) == (2, 0)


async def test_a_connector_tells_its_namespace_itself(vllm: StandInVllm, other: StandInVllm) -> None:
    vllm.namespace = other.namespace = NAMESPACE
    pair = f"{vllm.url},role=prefill", f"{other.url},role=decode"
    async with running_node(also=pair, meta=PoolAfterPrefill(vllm)) as node:
        await tokens_of(node, LONG, 4)
    assert (len(vllm.requests), len(other.requests)) == (1, 1)


async def test_servers_without_a_common_namespace_are_not_split_over(vllm: StandInVllm, other: StandInVllm) -> None:
    pair = f"{vllm.url},role=prefill", f"{other.url},role=decode"
    async with running_node(also=pair, meta=PoolOfBlocks(1000)) as node:
        assert await tokens_of(node, LONG, 4) == expected_tokens(LONG, 4)
    assert (len(vllm.requests), len(other.requests)) == (0, 1)


async def test_events_decide_where_a_prompt_goes(vllm: StandInVllm, other: StandInVllm) -> None:
    async with publishing() as publisher:
        told = f"{other.url},events={publisher.events},replay={publisher.replay}"
        async with running_node(also=(vllm.url, told)) as node:
            await publisher.subscribed()
            await publisher.publish(stored(LONG, BLOCK_SIZE))
            record = next(r for r in node.node.directory.records if r.url == other.url)
            await eventually_async(lambda: record.index.is_told, what="events believed")
            for _ in range(4):
                await tokens_of(node, LONG)
            assert (len(vllm.requests), len(other.requests)) == (0, 4)
            await publisher.publish(removed(block_keys(LONG, BLOCK_SIZE)))
            await eventually_async(lambda: not len(record.index), what="the blocks gone")
            async with node.http.get("/admin/workers") as answer:
                states = {state["url"]: state for state in (await answer.json())["workers"]}
            assert states[other.url]["events"]["state"] == "live"
            async with node.http.get("/metrics") as answer:
                metrics = await answer.text()
            assert f'stratakv_router_event_batches_total{{worker="{other.url}"}} 2.0' in metrics
            assert f'stratakv_router_index_blocks{{worker="{other.url}"}} 0.0' in metrics
            assert states[vllm.url]["info"]["engine"] == "vllm"


async def test_a_server_that_hashes_otherwise_is_told_which_flag_mends_it(vllm: StandInVllm) -> None:
    vllm.algorithm = "sha256"
    async with running_node(also=(f"{vllm.url},events=tcp://127.0.0.1:{free_port()}",)) as node:
        (record,) = node.node.directory.records
        assert record.events is not None
        assert record.events.state is FeedState.REFUSED
        assert "--prefix-caching-hash-algo sha256_cbor" in record.events.detail
        assert await tokens_of(node, PROMPT) == expected_tokens(PROMPT, 5)


async def test_status_shows_the_servers_and_what_is_wrong_with_them(
    vllm: StandInVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm.running = 3
    gone = f"vllm://127.0.0.1:{free_port()}"
    async with running_node(also=(f"{vllm.url},role=decode",), later=(gone,)) as node:
        await eventually_async(lambda: all(r.alive or r.problem for r in node.node.directory.records), what="a reason")
        report = Report()
        await _ask_db_node(Settings(rest=RestSettings(port=int(node.url.rsplit(":", 1)[1]))), report)
    _print(report)
    shown = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "vllm://" in line}
    assert [cell.strip() for cell in shown[vllm.url].split("│")[2:6]] == ["yes", "decode", MODEL, "3"]
    assert "no: " in shown[gone]
