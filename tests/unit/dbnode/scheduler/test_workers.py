"""What the directory makes of what workers say of themselves, and of what was sent since."""

from __future__ import annotations

import msgspec
import pytest

from dbnode.scheduler.fleet import WorkerRecord
from dbnode.scheduler.index import EVENTS_LAG_S
from dbnode.scheduler.planner import PromptKeys
from dbnode.scheduler.pool_view import PoolView
from dbnode.scheduler.scheduler import Scheduler
from dbnode.scheduler.workers import WorkerDirectory
from dbnode.worker_client import WorkerClient
from dbnode.worker_messages import Engine, WorkerFacts
from stratakv.settings import RouterSettings
from stratakv.wire import WorkerLoad, WorkerRole

FACTS = WorkerFacts("w", "e1", WorkerRole.BOTH, "m", "00" * 16, 16, 4096)
KEYS = PromptKeys(list(range(800)))


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Fixture:
    """A directory and scheduler over one record, without a network."""

    def __init__(self) -> None:
        from dbnode.scheduler.index import BlockIndex

        self.clock = Clock()
        client = WorkerClient()
        self.client = client
        pool = PoolView(None)
        self.directory = WorkerDirectory(RouterSettings(), client, pool, lambda: None, self.clock)
        self.scheduler = Scheduler(RouterSettings(), self.directory, pool, 1000, clock=self.clock)
        self.record = WorkerRecord("http://w", BlockIndex(1000, self.clock))

    def hears(self, load: WorkerLoad, facts: WorkerFacts = FACTS) -> None:
        self.clock.now_s += 1
        self.directory.heard(self.record, facts, load, self.clock.now_s)


@pytest.fixture
async def fixture() -> Fixture:
    return Fixture()


async def test_requests_just_sent_count_before_they_are_reported(fixture: Fixture) -> None:
    fixture.hears(WorkerLoad(waiting_tokens=100, running=1))
    fixture.clock.now_s += 0.1
    with fixture.scheduler.sent(fixture.record, KEYS, 800) as sent:
        seen = fixture.record.candidate(0, 0)
        assert (seen.queued_tokens, seen.running) == (900, 2)
        fixture.scheduler.prefilled(fixture.record, sent)
        assert fixture.record.candidate(0, 0).queued_tokens == 100
    assert fixture.record.candidate(0, 0).running == 1
    await fixture.client.close()


async def test_what_a_report_counted_and_has_ended_since_counts_no_more(fixture: Fixture) -> None:
    fixture.hears(WorkerLoad())
    with fixture.scheduler.sent(fixture.record, KEYS, 800):
        fixture.hears(WorkerLoad(waiting_tokens=800, waiting=1))
        seen = fixture.record.candidate(0, 0)
        assert (seen.queued_tokens, seen.running) == (800, 1)
    seen = fixture.record.candidate(0, 0)
    assert (seen.queued_tokens, seen.running) == (0, 0)
    await fixture.client.close()


async def test_siblings_of_a_request_just_sent_are_believed_to_hit(fixture: Fixture) -> None:
    fixture.hears(WorkerLoad())
    with fixture.scheduler.sent(fixture.record, KEYS, 800):
        assert fixture.record.index.match(KEYS.of_size(16)) == 50
    await fixture.client.close()


async def test_a_worker_that_tells_is_believed_to_hold_what_was_sent_until_its_events_must_have_come(
    fixture: Fixture,
) -> None:
    fixture.hears(WorkerLoad())
    fixture.record.index.believe()
    with fixture.scheduler.sent(fixture.record, KEYS, 800) as sent:
        fixture.clock.now_s += 100  # it waits long for its turn
        assert fixture.record.index.match(KEYS.of_size(16)) == 50
        fixture.scheduler.prefilled(fixture.record, sent)
        fixture.clock.now_s += EVENTS_LAG_S - 1
        assert fixture.record.index.match(KEYS.of_size(16)) == 50
        fixture.clock.now_s += 2
        assert fixture.record.index.match(KEYS.of_size(16)) == 0
    await fixture.client.close()


VLLM = msgspec.structs.replace(FACTS, engine=Engine.VLLM)


async def test_a_vllm_servers_prompts_are_counted_here_since_it_counts_requests_only(fixture: Fixture) -> None:
    fixture.hears(WorkerLoad(), VLLM)
    with fixture.scheduler.sent(fixture.record, KEYS, 800) as sent:
        fixture.hears(WorkerLoad(waiting=1, waiting_tokens=70), VLLM)
        assert fixture.record.candidate(0, 0).queued_tokens == 870
        fixture.scheduler.prefilled(fixture.record, sent)
        assert fixture.record.candidate(0, 0).queued_tokens == 70
    await fixture.client.close()


async def test_a_vllm_servers_idle_cache_is_not_taken_for_a_dropped_one(fixture: Fixture) -> None:
    fixture.hears(WorkerLoad(l1_blocks_total=1000, l1_blocks_free=500), VLLM)
    fixture.record.index.add(KEYS.of_size(16))
    fixture.hears(WorkerLoad(l1_blocks_total=1000, l1_blocks_free=1000), VLLM)
    assert len(fixture.record.index) == 50
    assert fixture.record.candidate(0, 0).free_tokens == 16_000
    await fixture.client.close()


async def test_after_an_answer_the_next_turns_prefix_is_believed_held(fixture: Fixture) -> None:
    fixture.hears(WorkerLoad())
    prompt, output = list(range(100)), list(range(500, 540))
    fixture.scheduler.answered(fixture.record, PromptKeys(prompt), output)
    assert fixture.record.index.match(PromptKeys([*prompt, *output, 7]).of_size(16)) == 139 // 16
    await fixture.client.close()


async def test_a_new_epoch_or_a_dropped_cache_empties_the_belief(fixture: Fixture) -> None:
    fixture.hears(WorkerLoad(l1_blocks_total=1000, l1_blocks_free=500))
    fixture.record.index.add(KEYS.of_size(16))
    fixture.hears(WorkerLoad(l1_blocks_total=1000, l1_blocks_free=480))
    assert len(fixture.record.index) == 50
    fixture.hears(WorkerLoad(l1_blocks_total=1000, l1_blocks_free=1000))
    assert len(fixture.record.index) == 0
    fixture.record.index.add(KEYS.of_size(16))
    fixture.hears(WorkerLoad(), msgspec.structs.replace(FACTS, epoch="e2"))
    assert len(fixture.record.index) == 0
    await fixture.client.close()


async def test_a_draining_or_silent_worker_is_not_usable(fixture: Fixture) -> None:
    fixture.hears(WorkerLoad())
    assert fixture.record.usable
    fixture.hears(WorkerLoad(draining=True))
    assert not fixture.record.usable
    fixture.hears(WorkerLoad())
    fixture.directory.mark_dead(fixture.record)
    assert not fixture.record.usable
    await fixture.client.close()
