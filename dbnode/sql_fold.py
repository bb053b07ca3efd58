"""infer_agg(): one answer about more texts than fit a context. Free of I/O: counting and answering are handed in.

Texts are packed, in their order, into as few groups as fit; each group is one prompt, the instruction before it. The answers
are packed again, until one is left. Groups of a level run at once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from stratakv.errors import ContextTooLong, InvalidRequest

FOLD = "@fold"
"""Option that marks a call whose prompt is `{"instruction": …, "pieces": [text, …]}`."""
GROUPS_RUNNING_MAX = 16
"""Of one call, at a time."""
_SEPARATOR = "\n\n"
_SEPARATOR_TOKENS = 2
"""What a separator adds to the tokens of a piece, about; each group is counted as a whole before it is sent."""


@dataclass(frozen=True, slots=True)
class FoldPrompt:
    """What is asked about which texts."""

    instruction: str = field(repr=False)
    pieces: tuple[str, ...] = field(repr=False)


def parse_fold(text: str) -> FoldPrompt:
    """Raises InvalidRequest."""
    try:
        content = json.loads(text)
        instruction, pieces = content["instruction"], content["pieces"]
        if isinstance(instruction, str) and pieces and all(isinstance(piece, str) for piece in pieces):
            return FoldPrompt(instruction, tuple(pieces))
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise InvalidRequest(f"infer: unknown option {FOLD}", hint="Call infer_agg.", param=FOLD)


@dataclass(frozen=True, slots=True)
class Fold:
    """How one call is folded."""

    instruction: str = field(repr=False)
    room_tokens: int
    """For a whole prompt, the chat template's part included."""
    answer_tokens_max: int
    count: Callable[[Sequence[str]], Awaitable[list[int]]]
    """Tokens of texts."""
    count_prompt: Callable[[str], Awaitable[int]]
    """Tokens of a prompt, the chat template's part included."""
    answer: Callable[[str], Awaitable[str]]

    async def run(self, pieces: Sequence[str]) -> str:
        """The last answer. Raises ContextTooLong before the model is asked anything, and what `answer` raises."""
        frame_tokens = await self.count_prompt(self._prompt([]))
        groups = await self._pack(await self._split(pieces, frame_tokens), frame_tokens)
        least_tokens = frame_tokens + 2 * (self.answer_tokens_max + _SEPARATOR_TOKENS)
        if len(groups) > 1 and least_tokens > self.room_tokens:
            raise self._too_long("two answers do not fit one prompt")
        while len(groups) > 1:
            answers = await self._answers(groups)
            groups = await self._pack(await self._split(answers, frame_tokens), frame_tokens)
            if len(groups) >= len(answers):
                raise self._too_long("the answers are too long to be folded")
        return (await self._answers(groups))[0]

    async def _answers(self, groups: Sequence[Sequence[str]]) -> list[str]:
        places = asyncio.Semaphore(GROUPS_RUNNING_MAX)

        async def answer(group: Sequence[str]) -> str:
            async with places:
                return await self.answer(self._prompt(group))

        try:
            async with asyncio.TaskGroup() as running:
                tasks = [running.create_task(answer(group)) for group in groups]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _split(self, pieces: Sequence[str], frame_tokens: int) -> list[tuple[str, int]]:
        """The pieces with their tokens; one that is too long for a prompt becomes several."""
        room = self.room_tokens - frame_tokens - _SEPARATOR_TOKENS
        if room < 1:
            raise self._too_long("the instruction leaves no room for a text")
        found: list[tuple[str, int]] = []
        waiting = list(zip(pieces, await self.count(pieces), strict=True))[::-1]
        while waiting:
            piece, num_tokens = waiting.pop()
            if num_tokens <= room:
                found.append((piece, num_tokens))
            elif len(piece) > 1:
                parts = _parts(piece, num_tokens // room + 1)
                waiting += list(zip(parts, await self.count(parts), strict=True))[::-1]
            else:
                raise self._too_long("the instruction leaves no room for a text")
        return found

    async def _pack(self, pieces: Sequence[tuple[str, int]], frame_tokens: int) -> list[list[str]]:
        """As few groups as the pieces fit into in their order."""
        groups: list[list[str]] = []
        start = 0
        while start < len(pieces):
            left, end = self.room_tokens - frame_tokens, start
            while end < len(pieces) and (end == start or left >= pieces[end][1] + _SEPARATOR_TOKENS):
                left -= pieces[end][1] + _SEPARATOR_TOKENS
                end += 1
            group = [piece for piece, _ in pieces[start:end]]
            while len(group) > 1 and await self.count_prompt(self._prompt(group)) > self.room_tokens:
                group.pop()
            groups.append(group)
            start += len(group)
        return groups

    def _prompt(self, group: Sequence[str]) -> str:
        return _SEPARATOR.join((self.instruction, *group))

    def _too_long(self, what: str) -> ContextTooLong:
        return ContextTooLong(
            f"infer_agg: {what}, which has room for {self.room_tokens} tokens beside an answer of {self.answer_tokens_max}",
            hint="Lower the option max_tokens, or shorten the instruction.",
            param="max_tokens",
        )


def _parts(text: str, num_parts: int) -> list[str]:
    """About equal parts, each cut at the last blank before its end where there is one in its second half."""
    size = max(1, len(text) // num_parts)
    parts, start = [], 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            blank = max(text.rfind(" ", start + size // 2, stop), text.rfind("\n", start + size // 2, stop))
            stop = blank + 1 if blank >= 0 else stop
        parts.append(text[start:stop])
        start = stop
    return parts
