"""What both faces do with conversations: keep them, and take turns in them.

A turn is added whole, with its answer, or not at all: a client that goes away or an error leaves the conversation as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

from msgspec.structs import replace

from dbnode.conversations.history import Beginning, History
from dbnode.conversations.metrics import ConversationMetrics, TurnOutcome
from dbnode.conversations.store import SWEPT_MAX, ConversationStore
from dbnode.conversations.values import ROLES, Message, Turn
from dbnode.generate import Answer, Chunk, FinishReason, GenerateRequest
from dbnode.inference import InferenceService
from stratakv.errors import InvalidRequest, StrataError
from stratakv.log import EventLogger
from stratakv.text import REPLACEMENT, chat_text

log = EventLogger("dbnode.conversations")

TURN_MARGIN_S = 30.0
"""A turn that its DB node has not ended counts as over so long after its request's deadline."""
SWEEP_S = 60.0
SWEEP_RETRY_S = 30.0
GIVE_UP_TIMEOUT_S = 5.0


class Conversations:
    """`run` clears away what has ended."""

    def __init__(
        self,
        store: ConversationStore,
        inference: InferenceService,
        request_timeout_s: float,
        metrics: ConversationMetrics,
    ) -> None:
        self.store = store
        self._inference = inference
        self._tokens = inference.tokens
        self._history = History(inference.tokens.tokenizer)
        self._request_timeout_s = request_timeout_s
        self._metrics = metrics

    async def turn(
        self, conversation_id: str, request: GenerateRequest, turn_id: str, version: int | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """The answer to the messages of the request, piece by piece, after those that are there.

        All is kept before the last piece is told. With the id of the last turn its answer is told again. Raises as `generate`
        does, and ConversationNotFound, ConversationBusy, ConversationChanged, ConversationFull.
        """
        outcome, error, turn = TurnOutcome.CANCELLED, None, None
        try:
            self._inference.check_allowed(request)
            new = checked_messages(request.messages or ())
            turn = await self._begin(conversation_id, request, turn_id, version)
            if turn.answer is not None:
                outcome = TurnOutcome.REPEATED
                yield Chunk(turn.answer, (), FinishReason.STOP)
                return
            async with aclosing(self._answer(turn, request, new)) as chunks:
                async for chunk in chunks:
                    if chunk.finish_reason is not None:
                        outcome = TurnOutcome.COMPLETED
                    yield chunk
        except StrataError as raised:
            outcome, error = TurnOutcome.FAILED, raised
            raise
        finally:
            self._metrics.turn_ended(request.source, outcome, error)
            if turn is not None and outcome in (TurnOutcome.CANCELLED, TurnOutcome.FAILED):
                await self._give_up(turn)

    async def _begin(self, conversation_id: str, request: GenerateRequest, turn_id: str, version: int | None) -> Turn:
        lasts_s = self._request_timeout_s + TURN_MARGIN_S
        return await self.store.begin_turn(request.caller.tenant.id, conversation_id, turn_id, lasts_s, version)

    async def _answer(self, turn: Turn, request: GenerateRequest, new: list[Message]) -> AsyncGenerator[Chunk, None]:
        """The model's; what was said is added before the last piece."""
        self.store.check_room(turn.conversation, new, num_more=1)
        chat = _as_chat([*(item.message for item in turn.items), *new])
        text = await self._tokens.aside(partial(chat_text, self._tokens.tokenizer, chat, style=request.style))
        begin = self._history.beginning(turn.items, text)
        rest = await self._tokens.of_chat_text(text[begin.end_chars :], request.caller.tenant.salt)
        prompt = (*begin.token_ids, *rest)
        asked = replace(request, messages=None, tools=(), prompt=prompt)
        answer = Answer()
        async with aclosing(self._inference.generate(asked)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
                if chunk.finish_reason is not None:
                    last = self._answer_message(begin, text, prompt, answer)
                    await self.store.end_turn(request.caller.tenant.id, turn, [*new, last])
                yield chunk

    def _answer_message(self, begin: Beginning, text: str, prompt: tuple[int, ...], answer: Answer) -> Message:
        said = "".join(answer.text)
        kept = self._history.kept(begin, text, prompt, said, answer.token_ids)
        if "\0" in said:  # PostgreSQL cannot hold it
            return Message("assistant", said.replace("\0", REPLACEMENT))
        return Message("assistant", said, kept)

    async def _give_up(self, turn: Turn) -> None:
        """Let others in now, also if the client has gone; else they wait until the turn has lasted too long."""
        work = asyncio.ensure_future(self.store.give_up_turn(turn))
        with contextlib.suppress(StrataError, TimeoutError):
            await asyncio.wait_for(asyncio.shield(work), GIVE_UP_TIMEOUT_S)

    async def run(self) -> None:
        """Until cancelled."""
        while self.store.is_there:
            try:
                swept = await self.store.sweep()
                self._metrics.swept(swept, await self.store.count_open())
            except StrataError:
                await asyncio.sleep(SWEEP_RETRY_S)
                continue
            if swept:
                log.info("conversations_ended", conversations=swept)
            if swept < SWEPT_MAX:
                await asyncio.sleep(SWEEP_S)


def checked_messages(messages: tuple[object, ...], field_name: str = "messages") -> list[Message]:
    """Plain text messages. Raises InvalidRequest that names the field."""
    found = []
    for place, one in enumerate(messages):
        name = f"{field_name}[{place}]"
        if not isinstance(one, dict):
            raise InvalidRequest(f"{name} must be an object", param=name)
        for field in one.keys() - {"role", "content"}:
            raise InvalidRequest(f"{name}.{field[:64]} is not supported", param=f"{name}.{field[:64]}")
        if one.get("role") not in ROLES:
            raise InvalidRequest(f"{name}.role must be one of {', '.join(ROLES)}", param=f"{name}.role")
        found.append(Message(one["role"], _text(f"{name}.content", one.get("content"))))
    return found


def _text(place: str, content: object) -> str:
    if isinstance(content, str):
        text = content
    elif isinstance(content, list) and content:
        text = "".join(_part(f"{place}[{number}]", part) for number, part in enumerate(content))
    else:
        raise InvalidRequest(f"{place} must be a string or a list of text parts", param=place)
    if "\0" in text:
        raise InvalidRequest(f"{place} must not contain a NUL character", param=place)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{place} has half of a surrogate pair", param=place) from None
    return text


def _part(place: str, part: object) -> str:
    kinds = ("text", "input_text", "output_text")
    if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{place} must be a text part", param=place)
    text: str = part["text"]
    return text


def _as_chat(messages: Sequence[Message]) -> tuple[dict[str, str], ...]:
    return tuple({"role": message.role, "content": message.content} for message in messages)
