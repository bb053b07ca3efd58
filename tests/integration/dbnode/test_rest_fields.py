"""Fields that clients of vLLM send: what they do to prompt and answer, and that no worker misses one. Over stand-in workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from stratakv.text import decode, encode
from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import MODEL, StandInWorker, expected_tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TALK: list[Any] = [*HELLO, {"role": "assistant", "content": "Well, I"}]
IDS = list(range(100, 140))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[tuple[RunningNode, StandInWorker]]:
    worker = await StandInWorker("w0").start()
    async with running_node(worker) as node:
        yield node, worker
    await worker.stop()


@pytest.fixture
def node(shared: tuple[RunningNode, StandInWorker]) -> RunningNode:
    return shared[0]


@pytest.fixture
def worker(shared: tuple[RunningNode, StandInWorker]) -> StandInWorker:
    """As if it had just started."""
    shared[1].requests.clear()
    shared[1].answer, shared[1].finish_reason = None, "length"
    return shared[1]


def text_of(node: RunningNode, token_ids: list[int], *, skip_special: bool = True) -> str:
    return decode(node.node.inference.tokens.tokenizer, token_ids, skip_special=skip_special)


async def chat(node: RunningNode, messages: list[Any] | None = None, **extra: Any) -> Any:
    return await node.openai.chat.completions.create(
        model=MODEL, messages=messages or HELLO, max_tokens=8, extra_body=extra
    )


async def complete(node: RunningNode, prompt: Any = IDS, **how: Any) -> Any:
    return await node.openai.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 8} | how)


async def test_when_an_answer_may_end_is_told_to_the_worker(node: RunningNode, worker: StandInWorker) -> None:
    told = {"stop_token_ids": [7, 9], "min_tokens": 3, "ignore_eos": True, "include_stop_str_in_output": True}
    for ask in (chat(node, **told), complete(node, extra_body=told)):
        await ask
        assert {name: worker.requests[-1][name] for name in told} == told
    assert "skip_special_tokens" not in worker.requests[-1]


async def test_a_stop_string_is_shown_where_that_is_wanted(node: RunningNode, worker: StandInWorker) -> None:
    whole = text_of(node, expected_tokens(IDS, 8))
    stop = whole[9:12]
    cut = await complete(node, stop=stop)
    shown = await complete(node, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert [cut.choices[0].text, shown.choices[0].text] == [
        whole[: whole.index(stop)],
        whole[: whole.index(stop) + len(stop)],
    ]
    late = await complete(node, stop=stop, extra_body={"min_tokens": 8})
    assert (late.choices[0].text, late.choices[0].finish_reason) == (whole, "length")


async def test_special_tokens_are_shown_where_that_is_wanted(node: RunningNode, worker: StandInWorker) -> None:
    worker.answer = encode(node.node.inference.tokens.tokenizer, "a<|im_end|>b", special=False)
    assert (await chat(node)).choices[0].message.content == "ab"
    assert (await chat(node, skip_special_tokens=False)).choices[0].message.content == "a<|im_end|>b"


async def test_an_answer_may_go_on_with_the_last_message(node: RunningNode, worker: StandInWorker) -> None:
    await chat(node, TALK, continue_final_message=True)
    assert text_of(node, worker.requests[-1]["prompt"], skip_special=False).endswith("<|im_start|>assistant\nWell, I")
    await chat(node, TALK, add_generation_prompt=False)
    assert text_of(node, worker.requests[-1]["prompt"], skip_special=False).endswith("Well, I<|im_end|>\n")
    async with node.http.post("/tokenize", json={"messages": TALK, "continue_final_message": True}) as response:
        told = await response.json()
    assert text_of(node, told["tokens"]).endswith("Well, I")


async def test_of_a_long_prompt_the_last_tokens_are_used(node: RunningNode, worker: StandInWorker) -> None:
    for wanted, kept in ((5, IDS[-5:]), (500, IDS), (-1, IDS)):
        answer = await complete(node, extra_body={"truncate_prompt_tokens": wanted})
        assert worker.requests[-1]["prompt"] == kept
        assert answer.usage.prompt_tokens == len(kept)
    long = [7, *range(100, 4196)]
    await complete(node, long, extra_body={"truncate_prompt_tokens": -1})
    assert worker.requests[-1]["prompt"] == long[-4088:]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_answer_begins_with_its_prompt_where_that_is_wanted(
    node: RunningNode, worker: StandInWorker, stream: bool
) -> None:
    prompts = ["Once upon", "Twice, "]
    answer = await complete(node, prompts, echo=True, n=2, stream=stream, max_tokens=3)
    texts = [""] * 4
    if stream:
        async for event in answer:
            texts[event.choices[0].index] += event.choices[0].text
    else:
        texts = [choice.text for choice in answer.choices]
    for index, text in enumerate(texts):
        ids = encode(node.node.inference.tokens.tokenizer, prompts[index // 2])
        assert text == prompts[index // 2] + text_of(node, expected_tokens(ids, 3))
    by_ids = await complete(node, IDS, echo=True, max_tokens=1)
    assert by_ids.choices[0].text.startswith(text_of(node, IDS, skip_special=False))


@pytest.mark.parametrize("form", [{"regex": "[0-9]+"}, {"choice": ["yes", "no"]}, {"json": {"type": "object"}}])
async def test_forms_may_be_given_in_vllms_words(node: RunningNode, worker: StandInWorker, form: Any) -> None:
    await chat(node, structured_outputs=form)
    assert worker.requests[-1]["structured_outputs"] == form


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"stop_token_ids": "7"}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [1.0]}, "stop_token_ids"),
    ({"stop_token_ids": [7] * 129}, "stop_token_ids"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9}, "min_tokens"),
    ({"min_tokens": 1, "response_format": {"type": "json_object"}}, "min_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs"),
    ({"structured_outputs": {"json": "{}"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"regex": "x"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
    ({"echo": True}, "echo"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"guided_json": {}}, "guided_json"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
async def test_what_is_wrong_is_refused_by_name(node: RunningNode, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await chat(node, **fields)
    assert caught.value.param == param
    assert param.split(".")[0] in caught.value.message


async def test_an_echo_has_no_log_probabilities(node: RunningNode) -> None:
    with pytest.raises(openai.BadRequestError, match="log-probabilities of a prompt") as caught:
        await complete(node, echo=True, logprobs=1)
    assert caught.value.param == "echo"


async def test_a_field_that_is_not_supported_is_refused_with_what_helps(node: RunningNode) -> None:
    with pytest.raises(openai.BadRequestError, match="Use response_format or structured_outputs"):
        await chat(node, guided_regex="x")
