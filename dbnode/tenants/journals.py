"""What workers have written down of requests whose DB node is gone: asked of all of them, added up over attempts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dbnode.tenants.recovery import Ended, Journals
from dbnode.worker_base import WorkerDoor
from dbnode.worker_messages import EndedRequest
from stratakv.errors import StrataError
from stratakv.log import EventLogger

log = EventLogger("dbnode.quotas")

TIMEOUT_S = 10.0


async def read_journals(workers: WorkerDoor, urls: Sequence[str], request_ids: Sequence[str]) -> Journals:
    """Of these requests, by the names that DB nodes give them."""
    answers = await asyncio.gather(
        *(workers.ended_requests(url, request_ids, TIMEOUT_S) for url in urls), return_exceptions=True
    )
    found: list[EndedRequest] = []
    are_complete = bool(urls)
    for url, answer in zip(urls, answers, strict=True):
        if isinstance(answer, StrataError):
            log.info("journal_not_read", url=url, error=answer.message)
            are_complete = False
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found += answer
    return Journals(added_up(found, frozenset(request_ids)), are_complete)


def added_up(found: Sequence[EndedRequest], request_ids: frozenset[str]) -> dict[str, Ended]:
    """The prompt counts once, at the attempt that computed most of it; what was generated counts at every one."""
    sums: dict[str, Ended] = {}
    for one in found:
        name = one.request_id.rpartition("-")[0]
        if name not in request_ids:
            continue
        before = sums.get(name, Ended(0, 0, 0))
        first = (
            before.prompt_tokens
            and before.prompt_tokens - before.cached_tokens >= one.prompt_tokens - one.cached_tokens
        )
        prompt, cached = (
            (before.prompt_tokens, before.cached_tokens) if first else (one.prompt_tokens, one.cached_tokens)
        )
        sums[name] = Ended(prompt, cached, before.generated_tokens + one.generated_tokens)
    return sums
