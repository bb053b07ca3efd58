"""What the router counts of a worker as requests come and go is what counting them anew would find."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from dbnode.scheduler.fleet import Sent, WorkerRecord
from dbnode.scheduler.index import BlockIndex
from dbnode.worker_messages import Engine, WorkerFacts
from stratakv.wire import WorkerLoad, WorkerRole

FACTS = WorkerFacts("w", "e1", WorkerRole.BOTH, "m", "00" * 16, 16, 4096)

events = st.lists(
    st.tuples(st.sampled_from(["send", "prefilled", "ended", "reported", "tick"]), st.integers(0, 100)), max_size=60
)


class Counted:
    """A worker's record, and all that happened to it."""

    def __init__(self, engine: Engine) -> None:
        self.record = WorkerRecord("http://w", BlockIndex(10), msgspec.structs.replace(FACTS, engine=engine))
        self.in_hand: list[Sent] = []
        self.prefilled_reported = self.ended_reported = 0
        self.now_s = 0.0

    def happen(self, what: str, number: int) -> None:
        record, now_s = self.record, self.now_s
        if what == "tick":
            self.now_s += 1.0
        elif what == "send":
            self.in_hand.append(Sent(now_s, number, 2 * number))
            record.send(self.in_hand[-1])
        elif what == "reported":
            self.prefilled_reported = self.ended_reported = 0
            record.reported(WorkerLoad(waiting_tokens=number, running=number, waiting=1), now_s - 0.5)
        elif self.in_hand:
            sent = self.in_hand[number % len(self.in_hand)]
            self._progress(sent, is_end=what == "ended")

    def _progress(self, sent: Sent, *, is_end: bool) -> None:
        is_reported = sent.at_s <= self.record.load_at_s
        if not sent.prefilled:
            self.record.prefilled(sent, self.now_s)
            self.prefilled_reported += sent.num_tokens if is_reported else 0
        if is_end:
            self.record.ended(sent)
            self.in_hand.remove(sent)
            self.ended_reported += is_reported

    def check(self) -> None:
        record, load = self.record, self.record.load
        unreported = [sent for sent in self.in_hand if sent.at_s > record.load_at_s]
        told_tokens, uncounted = max(0, load.waiting_tokens - self.prefilled_reported), unreported
        if record.facts is not None and record.facts.engine is Engine.VLLM:
            told_tokens, uncounted = load.waiting_tokens, self.in_hand
        found = record.candidate(0, 0)
        assert found.queued_tokens == told_tokens + sum(sent.num_tokens for sent in uncounted if not sent.prefilled)
        assert found.running == max(0, load.running + load.waiting - self.ended_reported) + len(unreported)
        assert found.held_tokens == sum(sent.prompt_tokens for sent in self.in_hand)
        assert list(record.sent) == self.in_hand


@given(events, st.sampled_from(Engine))
def test_what_is_counted_on_the_way_is_what_there_is(happened: list[tuple[str, int]], engine: Engine) -> None:
    counted = Counted(engine)
    for what, number in happened:
        counted.happen(what, number)
        counted.check()
