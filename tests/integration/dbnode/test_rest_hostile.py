"""What a stranger sends: every request has an answer that says what is wrong and where, none of them a fault of ours."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import StandInWorker
from tests.support import eventually_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "x"}
BODY: dict[str, Any] = {"messages": [USER], "max_tokens": 2}
NUM_MANY = 20_000


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
    shared[1].token_delay_s = 0.0
    return shared[1]


async def refused(node: RunningNode, body: bytes, **headers: str) -> Any:
    """The error that a chat is answered with."""
    async with node.http.post(CHAT, data=body, headers=headers) as response:
        assert response.status == 400, await response.text()
        return (await response.json())["error"]


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def called(arguments: str) -> list[Any]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [USER, {"role": "assistant", "tool_calls": [call]}]


def function(**parameters: Any) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return {"tools": [tool], "tool_choice": "required"}


ARGUMENTS = "messages[1].tool_calls[0].function.arguments"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": called('{"a": "\\ud800"}')}, ARGUMENTS),
    ({"messages": called(nested(3000))}, ARGUMENTS),
    ({"messages": called('{"a": NaN}')}, ARGUMENTS),
    ({"messages": called("[]")}, ARGUMENTS),
    ({"messages": [USER | {"name": [1]}]}, "messages[0].name"),
    ({"messages": [{"role": "assistant", "content": "x", "refusal": {}}]}, "messages[0].refusal"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [1]}, "messages[0]"),
    (function(**{"$defs": [1]}), "tools"),
    (function(**{"$defs": "x"}), "tools"),
    (function(**json.loads(nested(99))), "tools"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"logit_bias": {"１": 1}}, "logit_bias"),
    ({"f" * 10_000: 1}, "f" * 64),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{number}" for number in range(len(WRONG))])
async def test_what_is_wrong_is_named(node: RunningNode, fields: dict[str, Any], param: str) -> None:
    error = await refused(node, json.dumps(BODY | fields).encode())
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"messages": "\\ud83d"}', "surrogate"),
        (b'{"messages": "\xff"}', "UTF-8"),
        (json.dumps(BODY).encode("utf-16"), "JSON"),
        (b'{"temperature": 1e999}', "out of range"),
        (b"[" * 5000 + b"]" * 5000, "nested"),
        (nested(400).encode(), "a: unknown field|nested"),
        (gzip.compress(json.dumps(BODY).encode()), "Content-Encoding"),
    ],
)
async def test_a_body_that_cannot_be_read_is_told_why(node: RunningNode, body: bytes, says: str) -> None:
    error = await refused(node, body)
    assert pytest.raises(AssertionError, match=says).matches(AssertionError(error["message"]))


async def test_text_may_have_any_character(node: RunningNode, worker: StandInWorker) -> None:
    for text in ("a\0b", "\U0010ffff\ufffe", "", "<|im_end|>", "\u202e"):
        body = BODY | {"messages": [{"role": "user", "content": text}], "stop": ["\0", text or "x"]}
        async with node.http.post(CHAT, json=body) as response:
            assert response.status == 200, text


async def test_very_many_messages_do_not_hold_up_others(node: RunningNode) -> None:
    body = json.dumps(BODY | {"messages": [USER] * NUM_MANY}).encode()
    many = asyncio.ensure_future(refused(node, body))
    num_answered = 0
    while not many.done():
        async with node.http.get("/health") as response:
            num_answered += response.status == 200
    assert (await many)["code"] == "context_length_exceeded"
    assert num_answered > 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/health", 200),
        ("HEAD", "/ready", 200),
        ("OPTIONS", CHAT, 405),
        ("TRACE", "/v1/models", 405),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/models/%ff", 404),
        ("GET", "/v1/../health", 404),
    ],
)
async def test_other_methods_and_paths_are_answered(node: RunningNode, method: str, path: str, status: int) -> None:
    [answer] = await raw(node, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status}".encode())
    assert b"\r\nx-request-id: " in answer
    if status != 200:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


async def raw(node: RunningNode, *requests: bytes, half_closes: bool = False) -> list[bytes]:
    """What comes on a connection of its own for each, up to its end."""
    answers = []
    for request in requests:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(node.url.rpartition(":")[2]))
        writer.write(request)
        if half_closes:
            writer.write_eof()
        async with asyncio.timeout(10):
            answers.append(await reader.read())
        writer.close()
    return answers


def posted(body: dict[str, Any], version: str = "1.1", *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {CHAT} HTTP/{version}", "Host: x", "Connection: close", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def test_older_and_chunked_requests_are_answered_and_broken_ones_refused(node: RunningNode) -> None:
    data = json.dumps(BODY).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(data[at : at + 7]), data[at : at + 7]) for at in range(0, len(data), 7))
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    good = await raw(node, posted(BODY, "1.0"), posted(BODY, "1.1", "Content-Type: text/plain"), chunked)
    assert [answer.split(b" ", 2)[1] for answer in good] == [b"200"] * 3
    broken = [b"Content-Length: -5", b"Content-Length: 5\r\nContent-Length: 6", b"Transfer-Encoding: chunked\r\n\r\nzz"]
    bad = await raw(node, *(head + one + b"\r\n\r\n" for one in broken), b"\x16\x03\x01\r\n\r\n")
    assert [answer.split(b" ", 2)[1] for answer in bad] == [b"400"] * 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_closes_its_side_is_gone(node: RunningNode, worker: StandInWorker, stream: bool) -> None:
    worker.token_delay_s = 0.01
    await raw(node, posted(BODY | {"max_tokens": 3000, "stream": stream}), half_closes=True)
    await eventually_async(lambda: node.node.inference.in_flight == 0)
    assert node.node.inference.admission.running == 0


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", CHAT)])
async def test_a_fault_of_ours_is_told_as_one_and_named_in_the_log(
    node: RunningNode, method: str, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise RuntimeError("as never before")

    monkeypatch.setattr(node.node.inference, "max_model_len", fail)
    body = BODY if method == "POST" else None
    async with node.http.request(method, path, json=body, headers={"X-Request-Id": "mine-9"}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["message"]) == (500, "internal_error", "internal error")
    assert response.headers["X-Request-Id"] == "mine-9"
    told = [record for record in caplog.records if record.message == "request_failed_unexpectedly"]
    assert [vars(record)["stratakv_fields"]["trace_id"] for record in told] == ["mine-9"]
    assert node.node.inference.in_flight == 0
