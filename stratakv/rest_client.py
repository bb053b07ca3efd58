"""A small blocking client of the DB node's REST API that measures time to first token.

Used by `stratakv chat`, the demo and the benchmarks; applications use the `openai` package.
"""

from __future__ import annotations

import http.client
import json
import select
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stratakv.errors import StrataError, Unavailable

Messages = Sequence[dict[str, str]]
LINE_BYTES_MAX = 1024 * 1024


class RequestFailed(StrataError):
    """The server answered with an error."""

    code = "request_failed"


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer and what it took."""

    text: str
    ttft_s: float
    """Sending the request to the arrival of the first token."""
    total_s: float
    usage: dict[str, Any]

    def tokens_by_tier(self) -> dict[str, int]:
        """Prompt tokens by where their KV came from: computed, l1, l2, pool."""
        tiers = self.usage.get("stratakv", {})
        return {name: int(tiers.get(name, 0)) for name in ("computed", "l1", "l2", "pool", "disk")}


class RestClient:
    """One keep-alive connection; not safe for several threads at once."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(
            parts.hostname or "127.0.0.1", parts.port or 80, timeout=timeout_s
        )
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def close(self) -> None:
        self._connection.close()

    def get(self, path: str) -> Any:
        """Raises RequestFailed, Unavailable."""
        return self._json("GET", path, None)

    def post(self, path: str, body: object) -> Any:
        """Raises RequestFailed, Unavailable."""
        return self._json("POST", path, body)

    def chat(
        self,
        messages: Messages,
        *,
        model: str,
        max_tokens: int,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Stream one chat completion. Raises RequestFailed, Unavailable."""
        body = {"messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
        return self._stream("/v1/chat/completions", body | {"model": model}, on_text)

    def complete(
        self, prompt: str, *, model: str, max_tokens: int, temperature: float = 0.0, ignore_eos: bool = False
    ) -> Answer:
        """Stream one completion of a text. Raises RequestFailed, Unavailable."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "ignore_eos": ignore_eos}
        return self._stream("/v1/completions", body | {"model": model}, None)

    def _stream(self, path: str, body: dict[str, Any], on_text: Callable[[str], None] | None) -> Answer:
        started = time.perf_counter()
        response = self._request("POST", path, body | {"stream": True, "stream_options": {"include_usage": True}})
        pieces: list[str] = []
        usage: dict[str, Any] = {}
        ttft_s = 0.0
        for event in _events(response):
            if "error" in event:
                raise RequestFailed(event["error"]["message"])
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                text = choice["delta"].get("content") if "delta" in choice else choice["text"]
                if not text:
                    continue
                ttft_s = ttft_s or time.perf_counter() - started
                pieces.append(text)
                if on_text is not None:
                    on_text(text)
        return Answer("".join(pieces), ttft_s, time.perf_counter() - started, usage)

    def _json(self, method: str, path: str, body: object) -> Any:
        return json.loads(self._request(method, path, body).read())

    def _request(self, method: str, path: str, body: object) -> http.client.HTTPResponse:
        payload = None if body is None else json.dumps(body).encode()
        self._leave_if_closed()
        try:
            self._connection.request(method, path, payload, self._headers)
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Unavailable(f"no answer from {self._connection.host}:{self._connection.port}: {error}") from None
        if response.status >= 400:
            raise RequestFailed(_error_message(response.status, response.read()))
        return response

    def _leave_if_closed(self) -> None:
        """A server closes connections that are idle for long; then the next request takes a new one."""
        if self._connection.sock is not None and select.select([self._connection.sock], [], [], 0)[0]:
            self._connection.close()


def _error_message(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {status}"


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline(LINE_BYTES_MAX):
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])
