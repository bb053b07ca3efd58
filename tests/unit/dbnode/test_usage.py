"""Usage events: each request once, and a database that is away never stops serving."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from msgspec.structs import replace

from dbnode import usage as usage_module
from dbnode.charge import Charge
from dbnode.generate import GenerateRequest, Outcome, PromptTiers, Settled, Source, Timings, Usage
from dbnode.usage import UsageWriter
from stratakv import migrate
from stratakv.settings import DatabaseSettings, Secret

USAGE = Usage(100, 11, PromptTiers(36, 32, 16, 16, 0), Timings(ttft_ms=50.0, queue_ms=5.0, e2e_ms=150.0))


def event(request_id: str) -> Settled:
    request = GenerateRequest(request_id=request_id, source=Source.REST, arrived_s=0.0)
    return Settled(request, "m", Outcome.COMPLETED, None, USAGE)


async def rows(url: str) -> list[tuple[object, ...]]:
    connection = await asyncpg.connect(url)
    try:
        found = await connection.fetch(
            "SELECT request_id, prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens, generated_tokens,"
            " outcome, queue_ms, ttft_ms, generation_ms, mean_itl_ms FROM stratakv.usage_events ORDER BY request_id"
        )
        return [tuple(row) for row in found]
    finally:
        await connection.close()


async def test_every_request_is_written_once_however_often_it_is_reported(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_module, "BATCH_EVENTS_MAX", 2)
    await asyncio.to_thread(migrate.upgrade, postgres_url)
    writer = UsageWriter(DatabaseSettings(url=Secret(postgres_url)), lambda: None)
    for request_id in ("a", "b", "a", "c", "b"):
        writer.settled(event(request_id))
    failed = replace(event("d"), outcome=Outcome.FAILED, error_code="overloaded")
    writer.settled(replace(failed, usage=Usage(0, 0, PromptTiers(), Timings(0.0, 1.0, 1.0))))
    await writer.close()
    written = await rows(postgres_url)
    assert [row[0] for row in written] == ["a", "b", "c", "d"]
    assert written[0] == ("a", 100, 32, 16, 16, 11, "completed", 5.0, 50.0, 100.0, 10.0)
    assert written[3] == ("d", 0, 0, 0, 0, 0, "overloaded", 1.0, None, None, None)


async def test_without_a_database_the_oldest_events_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "EVENTS_WAITING_MAX", 3)
    dropped: list[int] = []
    away = DatabaseSettings(url=Secret("postgresql://u@127.0.0.1:1/none"))
    writer = UsageWriter(away, lambda: dropped.append(1))
    for number in range(5):
        writer.settled(event(str(number)))
    assert len(dropped) == 2
    await writer.close()


async def test_what_was_made_ahead_is_written_when_its_charge_is_decided(postgres_url: str) -> None:
    await asyncio.to_thread(migrate.upgrade, postgres_url)
    writer = UsageWriter(DatabaseSettings(url=Secret(postgres_url)), lambda: None)
    due, vain, open_ = Charge(), Charge(), Charge()
    for request_id, charge in (("due", due), ("vain", vain), ("open", open_)):
        settled = event(request_id)
        writer.settled(replace(settled, request=replace(settled.request, charge=charge)))
    due.decide(True)
    vain.decide(False)
    await writer.close()
    assert [(row[0], row[6]) for row in await rows(postgres_url)] == [("due", "completed"), ("vain", "unused")]
