"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import Request

from dbnode.generate import GenerateRequest, Source
from dbnode.inference import InferenceService
from dbnode.rest.door import caller_of
from dbnode.rest.fields import Boolean, Field, Schema, Text, read_fields
from dbnode.rest.parse import Messages
from dbnode.rest.sampling_fields import MODEL
from dbnode.rest.template_fields import TEMPLATE, chat_style
from dbnode.rest.tools import Tools
from stratakv.errors import InvalidRequest
from stratakv.http_body import read_body
from stratakv.settings import RestSettings
from stratakv.text import chat_text, encode

TEXT_CHARS_MAX = 16 * 1024 * 1024
"""More than a body may be by default."""


class TokenIds:
    """A list of token ids, which may be empty."""

    schema: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}  # noqa: RUF012

    def read(self, name: str, value: Any) -> list[int]:
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise InvalidRequest(f"{name}: expected a list of token ids", param=name)
        return value


TOKENIZE: dict[str, Field] = {
    "model": MODEL,
    "prompt": Text(TEXT_CHARS_MAX),
    "messages": Messages(),
    "tools": Tools(),
    "add_special_tokens": Boolean(),
    **TEMPLATE,
    "return_token_strs": Boolean(),
}
DETOKENIZE: dict[str, Field] = {"model": MODEL, "tokens": TokenIds()}


class TokenEndpoints:
    """Both endpoints; nothing of them reaches a worker."""

    def __init__(self, settings: RestSettings, service: InferenceService) -> None:
        self._settings = settings
        self._service = service

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Tokens of a text, or of messages as the model's chat template writes them."""
        given = await self._read(request, TOKENIZE)
        if ("prompt" in given) == ("messages" in given):
            raise InvalidRequest("prompt: expected either a prompt or messages", param="prompt")
        if "prompt" in given:
            for name in given.keys() & {"tools", *TEMPLATE}:
                raise InvalidRequest(f"{name}: only with messages", param=name)
            special = given.get("add_special_tokens", True)
            token_ids = await self._service.tokens.of_text(given["prompt"], special=special)
        else:
            token_ids = await self._service.tokens.aside(partial(self._of_chat, given))
        backend = self._service.tokens.tokenizer.backend_tokenizer
        strings = [backend.id_to_token(token) for token in token_ids] if given.get("return_token_strs") else None
        max_model_len = self._service.max_model_len()
        return {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": strings}

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """The text of tokens."""
        given = await self._read(request, DETOKENIZE)
        if "tokens" not in given:
            raise InvalidRequest("tokens: expected a list of token ids", param="tokens")
        tokens = self._service.tokens
        return {"prompt": await tokens.text_of(tokens.checked(given["tokens"], "tokens"))}

    async def _read(self, request: Request, fields: dict[str, Field]) -> dict[str, Any]:
        given = read_fields(await read_body(request, self._settings.body_bytes_max), fields)
        caller, model = caller_of(request), given.get("model")
        self._service.check_allowed(GenerateRequest("", Source.REST, time.monotonic(), model=model, caller=caller))
        return given

    def _of_chat(self, given: dict[str, Any]) -> list[int]:
        tokenizer = self._service.tokens.tokenizer
        text = chat_text(tokenizer, given["messages"], given.get("tools", ()), chat_style(given))
        return encode(tokenizer, text, special=given.get("add_special_tokens", False))
