"""From prompts to tokens and back, without holding up other requests: short texts at once, long ones on a thread.

Owned by `dbnode.inference`, which all faces use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from dbnode.generate import GenerateRequest
from stratakv.errors import InvalidRequest
from stratakv.text import chat_text, decode, encode
from stratakv.text_cache import CachingEncoder
from stratakv.token_text import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INLINE_CHARS_MAX = 4096
"""Longer texts are tokenised off the event loop."""
KNOWN_CHARS_MAX = 256 * 1024
"""Longer ones even if most of their tokens are remembered: to look for them takes its time too."""
INLINE_MESSAGES_MAX = 64
"""More messages than this are written off the event loop."""
THREADS = 2

Made = TypeVar("Made")


class PromptTokens:
    """One model's tokenizer for all requests."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer)
        self.vocab_size: int = tokenizer.backend_tokenizer.get_vocab_size()
        self._encoder = CachingEncoder(tokenizer)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def aside(self, make: Callable[[], Made]) -> Made:
        """What takes its time, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, make)

    async def of(self, request: GenerateRequest) -> list[int]:
        """The prompt's tokens. Raises InvalidRequest."""
        if isinstance(request.prompt, tuple):
            token_ids = self.checked(request.prompt, "prompt")
        elif request.messages is not None:
            make = partial(chat_text, self.tokenizer, request.messages, request.tools, request.style)
            text = make() if len(request.messages) <= INLINE_MESSAGES_MAX else await self.aside(make)
            token_ids = await self.of_chat_text(text, request.caller.tenant.salt)
        else:
            token_ids = await self.of_text(request.prompt or "", special=True)
        if not token_ids:
            raise InvalidRequest("the prompt must not be empty", param="prompt")
        return token_ids

    async def of_chat_text(self, text: str, owner: str) -> list[int]:
        """Of what a chat template has written, or of its end from a special token on; `owner` as the cache's."""
        make = partial(self._encoder.encode, text, owner)
        is_short = len(text) <= KNOWN_CHARS_MAX and self._encoder.is_mostly_known(text, INLINE_CHARS_MAX, owner)
        return make() if is_short else await self.aside(make)

    def of_chat(self, request: GenerateRequest) -> list[int]:
        """Of a prompt of messages; may be called on any thread. Raises InvalidRequest."""
        text = chat_text(self.tokenizer, request.messages or (), request.tools, request.style)
        return self._encoder.encode(text, request.caller.tenant.salt)

    async def of_text(self, text: str, *, special: bool) -> list[int]:
        """`special` adds what the model's tokenizer puts around a text."""
        make = partial(encode, self.tokenizer, text, special=special)
        return make() if len(text) <= INLINE_CHARS_MAX else await self.aside(make)

    async def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of known tokens, special ones too."""
        make = partial(decode, self.tokenizer, token_ids, skip_special=False)
        return make() if len(token_ids) <= INLINE_CHARS_MAX else await self.aside(make)

    async def prompt_text(self, request: GenerateRequest) -> str:
        """Of a prompt that is no chat. Raises InvalidRequest."""
        prompt = request.prompt or ""
        return prompt if isinstance(prompt, str) else await self.text_of(self.checked(prompt, "prompt"))

    async def count_each(self, texts: Sequence[str]) -> list[int]:
        """Tokens of the texts themselves, without what a chat puts around them."""
        return await self.aside(lambda: [len(encode(self.tokenizer, text, special=False)) for text in texts])

    def checked(self, token_ids: Sequence[int], field: str) -> list[int]:
        """Raises InvalidRequest that names the field where there are others than the model's."""
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            raise InvalidRequest(f"{field}: token ids go from 0 to {self.vocab_size - 1}", param=field)
        return list(token_ids)
