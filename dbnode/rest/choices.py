"""The answers to one request, all at once: several to each prompt (`n`), and several prompts.

The answers to one prompt share its KV: the others wait until the first one's prompt is computed, and then find it where that was.
Each is a request of its own to the DB node, so that each may be continued elsewhere; the first one's usage has the prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from msgspec.structs import replace

from dbnode.generate import Chunk, GenerateRequest
from dbnode.rest.parse import Parsed

CHUNKS_WAITING_MAX = 256
"""Of all answers together; those that are ahead of the client wait."""

Generate = Callable[[GenerateRequest], AsyncGenerator[Chunk, None]]
_Told = Chunk | BaseException


def answers(generate: Generate, parsed: Parsed) -> AsyncGenerator[Chunk, None]:
    """Chunks of all answers, as they come. Closing it cancels all; what one of them raises ends all."""
    return generate(parsed.request) if parsed.num_choices == 1 else _several(generate, parsed)


async def _several(generate: Generate, parsed: Parsed) -> AsyncGenerator[Chunk, None]:
    queue: asyncio.Queue[_Told] = asyncio.Queue(CHUNKS_WAITING_MAX)
    tasks = _start(generate, parsed, queue)
    try:
        num_left = len(tasks)
        while num_left:
            told = await queue.get()
            if isinstance(told, BaseException):
                raise told
            num_left -= told.finish_reason is not None
            yield told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _start(generate: Generate, parsed: Parsed, queue: asyncio.Queue[_Told]) -> list[asyncio.Task[None]]:
    """One task for each answer."""
    tasks = []
    for number, prompt in enumerate(parsed.prompts):
        is_computed = asyncio.Event()
        for sibling in range(parsed.num_answers):
            index = number * parsed.num_answers + sibling
            work = _answer(generate, sibling_of(prompt, sibling), sibling, index, is_computed, queue)
            tasks.append(asyncio.create_task(work, name=f"answer-{index}"))
    return tasks


async def _answer(
    generate: Generate,
    request: GenerateRequest,
    sibling: int,
    index: int,
    is_computed: asyncio.Event,
    queue: asyncio.Queue[_Told],
) -> None:
    try:
        if sibling:
            await is_computed.wait()
        async with aclosing(generate(request)) as chunks:
            async for chunk in chunks:
                is_computed.set()
                await queue.put(replace(chunk, index=index))
    except Exception as error:  # told to whoever reads the queue
        await queue.put(error)


def sibling_of(request: GenerateRequest, number: int) -> GenerateRequest:
    """The request for one more answer to the same prompt. A seed gives each its own, by its number."""
    if not number:
        return request
    sampling = request.sampling
    if sampling.seed is not None:
        digest = hashlib.blake2b(f"{sampling.seed}:{number}".encode(), digest_size=8).digest()
        sampling = replace(sampling, seed=int.from_bytes(digest) >> 1)
    return replace(request, request_id=f"{request.request_id}.{number}", sampling=sampling, is_sibling=True)
