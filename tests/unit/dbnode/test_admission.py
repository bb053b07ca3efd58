"""The queue in front of the workers."""

from __future__ import annotations

import asyncio

import pytest

from dbnode.admission import Admission
from dbnode.generate import Source
from stratakv.errors import DeadlineExceeded, Overloaded
from stratakv.tenancy.values import Tenant
from tests.support import eventually_async

WAITING_MAX = {Source.REST: 2, Source.SQL: 100}


def soon(timeout_s: float = 30.0) -> float:
    return asyncio.get_running_loop().time() + timeout_s


async def hold(admission: Admission, source: Source, release: asyncio.Event, order: list[Source]) -> None:
    async with admission.slot(source, soon()):
        order.append(source)
        await release.wait()


async def test_more_than_the_queue_holds_are_refused_and_nothing_leaks() -> None:
    admission, release, order = Admission(lambda: 1, WAITING_MAX), asyncio.Event(), list[Source]()
    tasks = [asyncio.create_task(hold(admission, Source.REST, release, order)) for _ in range(3)]
    await eventually_async(lambda: admission.waiting == 2)
    with pytest.raises(Overloaded):
        await hold(admission, Source.REST, release, order)
    release.set()
    await asyncio.gather(*tasks)
    assert (admission.running, admission.waiting) == (0, 0)


async def test_a_long_sql_queue_does_not_keep_rest_out() -> None:
    admission, release, order = Admission(lambda: 1, WAITING_MAX), asyncio.Event(), list[Source]()
    tasks = [asyncio.create_task(hold(admission, Source.SQL, release, order)) for _ in range(50)]
    await eventually_async(lambda: admission.waiting == 49)
    tasks.append(asyncio.create_task(hold(admission, Source.REST, release, order)))
    await eventually_async(lambda: admission.waiting == 50)
    release.set()
    await asyncio.gather(*tasks)
    assert order.index(Source.REST) <= 2


async def test_lower_priorities_go_first_and_equal_ones_in_turn() -> None:
    admission, order = Admission(lambda: 1, WAITING_MAX), list[tuple[int, int]]()

    async def run(priority: int, number: int) -> None:
        async with admission.slot(Source.SQL, soon(), priority):
            order.append((priority, number))

    async with admission.slot(Source.SQL, soon()):
        wanted = [(5, 0), (0, 1), (-5, 2), (0, 3), (-5, 4)]
        tasks = [asyncio.create_task(run(*one)) for one in wanted]
        await eventually_async(lambda: admission.waiting == len(wanted))
        tasks[3].cancel()
        await eventually_async(lambda: admission.waiting == len(wanted) - 1)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [(-5, 2), (-5, 4), (0, 1), (5, 0)]


async def test_giving_up_while_waiting_frees_the_place_in_the_queue() -> None:
    admission, release, order = Admission(lambda: 1, WAITING_MAX), asyncio.Event(), list[Source]()
    holder = asyncio.create_task(hold(admission, Source.SQL, release, order))
    await eventually_async(lambda: admission.running == 1)
    waiting = asyncio.create_task(hold(admission, Source.SQL, release, order))
    await eventually_async(lambda: admission.waiting == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert admission.waiting == 0
    with pytest.raises(DeadlineExceeded):
        async with admission.slot(Source.REST, soon(0.01)):
            pass
    release.set()
    await holder
    assert (admission.running, admission.waiting) == (0, 0)


async def test_one_that_is_let_in_and_gives_up_at_once_passes_its_slot_on() -> None:
    admission, release, order = Admission(lambda: 1, WAITING_MAX), asyncio.Event(), list[Source]()
    holder = asyncio.create_task(hold(admission, Source.SQL, release, order))
    await eventually_async(lambda: admission.running == 1)
    first, second = (asyncio.create_task(hold(admission, Source.SQL, release, order)) for _ in range(2))
    await eventually_async(lambda: admission.waiting == 2)
    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    release.set()
    await second
    assert (admission.running, admission.waiting) == (0, 0)


async def test_new_workers_let_more_in() -> None:
    slots, release, order = [1], asyncio.Event(), list[Source]()
    admission = Admission(lambda: slots[0], WAITING_MAX)
    tasks = [asyncio.create_task(hold(admission, Source.SQL, release, order)) for _ in range(3)]
    await eventually_async(lambda: admission.waiting == 2)
    slots[0] = 3
    admission.wake()
    await eventually_async(lambda: admission.running == 3)
    release.set()
    await asyncio.gather(*tasks)


async def test_tenants_take_turns_by_weight_and_priority_is_among_ones_own() -> None:
    admission, order = Admission(lambda: 1, WAITING_MAX), list[str]()
    loud, light, heavy = (Tenant(n, name, weight=w) for n, name, w in ((1, "a", 100), (2, "b", 100), (3, "c", 300)))

    async def run(tenant: Tenant, priority: int) -> None:
        async with admission.slot(Source.SQL, soon(), priority, tenant=tenant, cost_tokens=10):
            order.append(tenant.name)

    async with admission.slot(Source.REST, soon()):
        tasks = [asyncio.create_task(run(loud, -1000)) for _ in range(40)]
        await eventually_async(lambda: admission.waiting == 40)
        tasks += [asyncio.create_task(run(tenant, 1000)) for _ in range(15) for tenant in (light, heavy)]
        await eventually_async(lambda: admission.waiting == 70)
    await asyncio.gather(*tasks)
    first = order[:25]
    assert [first.count(name) for name in "abc"] == [5, 5, 15]


async def test_a_full_queue_has_room_for_a_tenant_with_less_in_it() -> None:
    admission, release, order = Admission(lambda: 1, WAITING_MAX), asyncio.Event(), list[Source]()

    async def hold_for(tenant: Tenant) -> None:
        async with admission.slot(Source.REST, soon(), tenant=tenant):
            await release.wait()

    holder = asyncio.create_task(hold(admission, Source.SQL, release, order))
    await eventually_async(lambda: admission.running == 1)
    loud = [asyncio.create_task(hold_for(Tenant(1, "loud"))) for _ in range(2)]
    await eventually_async(lambda: admission.waiting == 2)
    other = asyncio.create_task(hold_for(Tenant(2, "other")))
    with pytest.raises(Overloaded):
        await loud[1]
    assert admission.waiting == 2
    with pytest.raises(Overloaded):
        await hold_for(Tenant(2, "other"))
    release.set()
    await asyncio.gather(holder, loud[0], other)
    assert (admission.running, admission.waiting) == (0, 0)
