"""Requests in vLLM's words, and its events as those of a worker of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dbnode.errors import WorkerLost, WorkerRefused
from dbnode.generate import FinishReason, StructuredOutputs
from dbnode.vllm.wire import Part, Reader, body, refusal
from dbnode.worker_messages import KVTransfer, WorkerRequest
from stratakv.errors import InvalidRequest, Overloaded

REQUEST = WorkerRequest("m", [5, 6, 7], "r", 10, 0.0, timeout_s=3.0)
RESUMED = KVTransfer(output_token_ids=[8, 9])


def request(**changes: Any) -> WorkerRequest:
    fields = {name: getattr(REQUEST, name) for name in REQUEST.__struct_fields__}
    return WorkerRequest(**fields | changes)


def event(token_ids: list[int], reason: str | None = None, stop_reason: int | str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": "x", "token_ids": token_ids, "finish_reason": reason, "stop_reason": stop_reason}
    return json.dumps({"id": "c", "object": "text_completion", "choices": [choice]} | more).encode()


def test_a_servers_own_defaults_do_not_matter() -> None:
    sent = body(REQUEST, "their-name", Part.ALL)
    assert sent.keys() >= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"}
    assert sent["model"] == "their-name"
    assert "timeout_s" not in sent


def test_tokens_made_elsewhere_become_part_of_the_prompt() -> None:
    sent = body(request(kv_transfer_params=RESUMED), "m", Part.ALL)
    assert (sent["prompt"], sent["max_tokens"]) == ([5, 6, 7, 8, 9], 8)


def test_with_a_form_or_a_seed_they_do_not() -> None:
    for changes in ({"structured_outputs": StructuredOutputs(choice=["a"])}, {"seed": 1, "temperature": 1.0}):
        sent = body(request(kv_transfer_params=RESUMED, **changes), "m", Part.ALL)
        assert (sent["prompt"], sent["max_tokens"]) == ([5, 6, 7], 10)


def test_a_prefill_generates_one_token_without_a_form_or_stop() -> None:
    sent = body(request(structured_outputs=StructuredOutputs(choice=["a"]), stop=["x"]), "m", Part.PREFILL)
    assert sent["max_tokens"] == 1
    assert not sent.keys() & {"structured_outputs", "stop"}


@pytest.mark.parametrize(
    ("said", "token_ids"),
    [
        (event([1, 2], "stop"), [1]),
        (event([1, 2], "stop", 2), [1]),
        (event([1, 2], "stop", "x"), [1, 2]),
        (event([1, 2], "length"), [1, 2]),
        (event([1, 2]), [1, 2]),
    ],
)
def test_only_a_token_that_ends_the_answer_is_left_out(said: bytes, token_ids: list[int]) -> None:
    assert Reader("u", REQUEST, Part.ALL).read(said).token_ids == token_ids


def test_when_an_answer_may_end_is_told_in_vllms_words() -> None:
    how: dict[str, Any] = {"min_tokens": 4, "stop_token_ids": [2], "skip_special_tokens": False}
    sent = body(request(**how, kv_transfer_params=RESUMED), "m", Part.ALL)
    assert (sent["min_tokens"], sent["stop_token_ids"], sent["skip_special_tokens"]) == (2, [2], False)
    assert body(request(**how), "m", Part.PREFILL)["min_tokens"] == 1
    assert not body(REQUEST, "m", Part.ALL).keys() & how.keys()


@pytest.mark.parametrize(("token", "shown"), [(2, [1, 2]), (3, [1])])
def test_a_stop_token_that_is_asked_for_is_told(token: int, shown: list[int]) -> None:
    reader = Reader("u", request(stop_token_ids=[2], include_stop_str_in_output=True), Part.ALL)
    assert reader.read(event([1, token], "stop", token)).token_ids == shown


def test_an_answer_begun_again_continues_where_the_other_ended() -> None:
    reader = Reader("u", request(kv_transfer_params=RESUMED, seed=1, temperature=1.0), Part.ALL)
    assert reader.read(event([8])).token_ids == []
    assert reader.read(event([9, 10])).token_ids == [10]
    assert reader.read(event([11, 2], "stop")).token_ids == [11]


@pytest.mark.parametrize("said", [event([9]), event([8], "length"), event([8, 2], "stop")])
def test_an_answer_begun_again_that_differs_is_refused(said: bytes) -> None:
    reader = Reader("u", request(kv_transfer_params=RESUMED, seed=1, temperature=1.0), Part.ALL)
    with pytest.raises(WorkerRefused, match="does not begin"):
        reader.read(said)


def test_the_first_token_of_an_answer_that_cannot_go_on_elsewhere_is_kept_back() -> None:
    chunk = Reader("u", request(seed=1, temperature=1.0), Part.PREFILL).read(event([2], "stop"))
    assert (chunk.token_ids, chunk.finish_reason) == ([], FinishReason.LENGTH)


def test_usage_tells_what_was_not_computed_and_what_was_handed_over() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}
    said = json.dumps({"choices": [], "usage": usage, "metrics": {"queue_time_ms": 1.5}}).encode()
    found = Reader("u", REQUEST, Part.ALL).read(said).usage
    assert found is not None
    assert found.stratakv is not None
    assert (found.stratakv.computed, found.stratakv.l1, found.stratakv.queue_ms) == (1, 2, 1.5)
    handed = Reader("u", request(kv_transfer_params=KVTransfer(do_remote_prefill=True)), Part.ALL).read(said).usage
    assert handed is not None
    assert handed.stratakv is not None
    assert (handed.stratakv.l1, handed.stratakv.pool) == (0, 2)


@pytest.mark.parametrize(
    ("code", "kind"), [(400, InvalidRequest), (429, Overloaded), (500, WorkerRefused), (404, WorkerRefused)]
)
def test_errors_mean_the_same_in_a_stream_and_without(code: int, kind: type[Exception]) -> None:
    error = {"error": {"message": "no", "type": "SomeError", "param": None, "code": code}}
    assert type(refusal("u", code, json.dumps(error).encode())) is kind
    with pytest.raises(kind):
        Reader("u", REQUEST, Part.ALL).read(json.dumps(error).encode())


@pytest.mark.parametrize(("reason", "kind"), [("abort", WorkerLost), ("error", WorkerRefused)])
def test_ends_that_are_no_answer_are_failures(reason: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        Reader("u", REQUEST, Part.ALL).read(event([1], reason))


def test_a_server_that_sends_no_token_ids_is_refused() -> None:
    with pytest.raises(WorkerRefused, match="without token ids"):
        Reader("u", REQUEST, Part.ALL).read(b'{"choices": [{"index": 0, "text": "Paris", "finish_reason": null}]}')


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"choices": 3}', b"\xff", b'{"choices": [{"token_ids": ["a"]}]}'])
def test_what_is_no_completion_is_refused(payload: bytes) -> None:
    with pytest.raises(WorkerRefused):
        Reader("u", REQUEST, Part.ALL).read(payload)


def test_penalties_biases_and_logprobs_are_asked_for_in_its_words() -> None:
    sent = body(request(repetition_penalty=1.2, logit_bias={5: 1.0}, logprobs=3), "m", Part.ALL)
    assert (sent["repetition_penalty"], sent["logit_bias"]) == (1.2, {5: 1.0})
    assert (sent["logprobs"], sent["return_tokens_as_token_ids"]) == (3, True)
    assert not sent.keys() & {"presence_penalty", "frequency_penalty", "seed"}


def test_a_penalised_answer_begins_again_with_the_same_numbers_on_every_server() -> None:
    seeds = set()
    for attempt in range(2):
        asked = request(
            request_id=f"chatcmpl-1-{attempt}", presence_penalty=0.5, temperature=1.0, kv_transfer_params=RESUMED
        )
        sent = body(asked, "m", Part.ALL)
        assert (sent["prompt"], sent["max_tokens"]) == ([5, 6, 7], 10)
        seeds.add(sent["seed"])
    assert len(seeds) == 1


def test_logprobs_are_told_of_new_tokens_only() -> None:
    asked = request(kv_transfer_params=RESUMED, frequency_penalty=0.5, logprobs=1)
    logprobs = {"token_logprobs": [-1.0, -2.0, -3.0, -4.0], "top_logprobs": [{"token_id:1": -0.5}] * 4}
    told = event([8, 9, 3, 2], "stop")
    told = json.dumps(
        json.loads(told) | {"choices": [json.loads(told)["choices"][0] | {"logprobs": logprobs}]}
    ).encode()
    chunk = Reader("u", asked, Part.ALL).read(told)
    assert chunk.token_ids == [3]
    assert [(score.logprob, score.top) for score in chunk.scores] == [(-3.0, ((1, -0.5),))]
