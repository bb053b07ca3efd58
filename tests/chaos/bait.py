"""Puts that only a frozen leader is asked to end: what it says when it wakes up must hold for its successor too."""

from __future__ import annotations

import asyncio

from stratakv.errors import StrataError, Unavailable
from stratakv.pool.meta_errors import PutRefused
from stratakv.pool.meta_link import MetaLink
from stratakv.wire import Done, PutEnd
from tests.chaos.history import Kind
from tests.chaos.writers import TIMEOUT_S, Open, Writers

BAITS = 3


async def lay(writers: Writers) -> list[tuple[Open, PutEnd]]:
    """Some puts, granted by the present leader."""
    baits = []
    for _ in range(BAITS):
        try:
            started = await writers.start_native(TIMEOUT_S)
        except Unavailable:
            continue
        if started is not None:
            baits.append(started)
    return baits


async def ask(writers: Writers, endpoint: str, baits: list[tuple[Open, PutEnd]]) -> None:
    """Have this server end them, however long it takes to answer; what it does not decide is left for the leader."""
    link = MetaLink(endpoint, None)
    await asyncio.gather(*(_end(writers, link, write, end) for write, end in baits))
    link.close("all asked")


async def _end(writers: Writers, link: MetaLink, write: Open, end: PutEnd) -> None:
    writers.history.add(Kind.ENDING, write.name)
    try:
        await link.exchange(end, Done, TIMEOUT_S)
    except PutRefused:
        writers.history.add(Kind.REFUSED, write.name)
    except StrataError:
        writers.opened[write.name] = write
    else:
        writers.history.add(Kind.ENDED, write.name)
