"""One run: rounds of faults while writers write, then rest, then the verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from stratakv.pool.fence import TermFence
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import GetStats, Stats
from tests.chaos.history import History, Kind
from tests.chaos.nemesis import Nemesis, Plan, plans
from tests.chaos.world import LEASE_S, PAGE_BYTES, Daemon, World, running_world
from tests.chaos.writers import INSTANCE, SHORT_TIMEOUT_S, TIMEOUT_S, Writers
from tests.support import eventually_async

NATIVE_WRITERS = 3
KVCM_WRITERS = 2
READERS = 2
PROGRESS_TIMEOUT_S = 40.0
"""After a fault, writes are acknowledged again by then."""
SLACK_S = 2 * LEASE_S + 2.0
"""A deadline that passes while nobody leads, or while PostgreSQL is away, is noticed by then."""


@dataclass(frozen=True, slots=True)
class Verdict:
    violations: list[str]
    history: History
    rounds: int


async def run(directory: Path, seed: int, chosen: Iterable[Plan] | None = None, *, minutes: float) -> Verdict:
    """Rounds until all that were chosen are over, or the time is, or something is wrong; without a choice all, endlessly."""
    source, history = random.Random(seed), History()
    until = time.monotonic() + minutes * 60
    rounds = 0
    async with running_world(directory) as world, _members(world, history, source) as (writers, nemesis):
        async with _working(writers):
            for plan in chosen or _endless(source):
                if time.monotonic() > until or history.violations(SLACK_S):
                    break
                rounds += 1
                await _round(nemesis, writers, plan)
        violations = await _at_rest(world, writers)
    return Verdict(history.violations(SLACK_S) + violations, history, rounds)


def _endless(source: random.Random) -> Iterator[Plan]:
    while True:
        yield from plans(source)


@asynccontextmanager
async def _members(world: World, history: History, source: random.Random) -> AsyncIterator[tuple[Writers, Nemesis]]:
    nemesis, fence = Nemesis(world, history, source), TermFence()
    async with MetaClient(world.settings, fence=fence) as its, MetaClient(world.settings) as ours:
        daemon = Daemon(its, fence)
        writers = Writers(world, history, daemon, ours, source, nemesis.at_step)
        reporting = asyncio.create_task(daemon.run())
        spec = [{"name": "tp0", "size": 64}]
        registered = {"instance_group": "default", "block_size": 4, "location_spec_infos": spec}
        await writers.call_kvcm("RegisterInstance", instance_id=INSTANCE, **registered)
        try:
            yield writers, nemesis
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)


@asynccontextmanager
async def _working(writers: Writers) -> AsyncIterator[None]:
    kinds = [writers.native] * NATIVE_WRITERS + [writers.kvcm] * KVCM_WRITERS + [writers.read] * READERS
    tasks = [asyncio.create_task(work()) for work in kinds]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError) and isinstance(result, BaseException):
                raise result


async def _round(nemesis: Nemesis, writers: Writers, plan: Plan) -> None:
    async with asyncio.timeout(PROGRESS_TIMEOUT_S):
        await nemesis.carry_out(plan, writers)
    history = writers.history
    seen = len(history.events)

    def both_go_on() -> bool:
        ended = {event.write.partition("-")[0] for event in history.events[seen:] if event.kind is Kind.ENDED}
        return ended == {"native", "kvcm"}

    await eventually_async(both_go_on, timeout_s=PROGRESS_TIMEOUT_S, what=f"writes are acknowledged after: {plan}")


async def _at_rest(world: World, writers: Writers) -> list[str]:
    """Decide what is open, look at everything once more, and count what is left over."""
    await eventually_async(world.has_leader, timeout_s=PROGRESS_TIMEOUT_S, what="a meta server leads")

    async def all_decided() -> bool:
        for write in list(writers.opened.values()):
            writers.history.add(Kind.ENDING, write.name)
            await writers.end_once(write)
        return not writers.opened

    await eventually_async(all_decided, timeout_s=PROGRESS_TIMEOUT_S, what="every end is decided")
    await eventually_async(writers.daemon.report, timeout_s=PROGRESS_TIMEOUT_S, what="the daemon is known")
    for name in writers.lookups:
        await eventually_async(lambda name=name: _final(writers, name), what=f"a lookup of {name} is answered")
    return [what async for what in _left_over(writers)]


async def _final(writers: Writers, name: str) -> bool:
    return await writers.look(name, Kind.FINAL) is not None


async def _left_over(writers: Writers) -> AsyncIterator[str]:
    """Nothing is stranded: each put is decided, and the daemon holds what can be found and nothing else."""
    stats = await writers.client.call(GetStats(), Stats)

    async def nothing_pends() -> bool:
        nonlocal stats
        await writers.daemon.report()
        stats = await writers.client.call(GetStats(), Stats)
        return stats.puts_pending == 0 and not writers.daemon.open

    try:
        await eventually_async(nothing_pends, timeout_s=TIMEOUT_S + SHORT_TIMEOUT_S + SLACK_S)
    except AssertionError:
        yield f"{stats.puts_pending} puts are never decided, {len(writers.daemon.open)} of them known to the daemon"
    held = sum(map(len, writers.daemon.committed.values())) * PAGE_BYTES
    if held != stats.bytes_committed:
        yield f"the daemon holds {held} bytes of pages, {stats.bytes_committed} can be found"
