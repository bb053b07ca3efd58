"""What a worker tells of its blocks becomes what the router believes, in order, and only with keys like ours."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.kv_events.feed import FeedState, KvFeed, Step
from dbnode.kv_events.wire import EventBatch, read_batch
from dbnode.scheduler.index import BlockIndex
from stratakv.keys import block_keys
from tests.kv_event_publisher import frames, removed, stored

SIZE = 16
PROMPT = list(range(160))
KEYS = block_keys(PROMPT, SIZE)
CLEARED = {"type": "AllBlocksCleared"}


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Fed:
    """An index that is fed."""

    def __init__(self, blocks_max: int = 1000) -> None:
        self.clock = Clock()
        self.index = BlockIndex(blocks_max, self.clock)
        self.feed = KvFeed(self.index, SIZE)

    def take(self, sequence: int, *events: Any, at_unix_s: float | None = None) -> Step:
        return self.feed.take(batch(sequence, *events, at_unix_s=at_unix_s))


def batch(sequence: int, *events: Any, at_unix_s: float | None = None) -> EventBatch:
    found = read_batch(frames(sequence, 1000.0 + sequence if at_unix_s is None else at_unix_s, *events))
    assert found is not None
    return found


def test_blocks_are_held_from_the_event_that_tells_until_the_one_that_takes_it_back() -> None:
    fed = Fed()
    assert fed.take(0, stored(PROMPT, SIZE)) is Step.APPLIED
    assert fed.feed.status.state is FeedState.LIVE
    assert fed.index.match(KEYS) == 10
    assert fed.take(1, removed(KEYS[7:])) is Step.APPLIED
    assert fed.index.match(KEYS) == 7
    assert fed.take(2, CLEARED) is Step.APPLIED
    assert fed.index.match(KEYS) == 0


def test_what_was_sent_is_believed_only_until_its_events_must_have_come() -> None:
    fed = Fed()
    fed.take(0, stored(PROMPT[:16], SIZE))
    fed.index.add(KEYS)
    assert fed.index.match(KEYS) == 10
    fed.clock.now_s += 6
    assert fed.index.match(KEYS) == 1


def test_without_an_event_that_shows_its_keys_what_was_sent_counts() -> None:
    fed = Fed()
    fed.take(0, stored(PROMPT, SIZE, parent_block_hash=5))
    assert fed.feed.status.state is FeedState.WAITING
    assert fed.index.match(KEYS) == 0
    fed.index.add(KEYS[:4])
    fed.clock.now_s += 1000
    assert fed.index.match(KEYS) == 4
    fed.take(1, stored(PROMPT[:32], SIZE))
    assert fed.index.match(KEYS) == 10, "what was told before counts too"


def test_a_salted_prompt_shows_the_keys_too() -> None:
    fed = Fed()
    fed.take(0, stored(PROMPT, SIZE, salt="t1"))
    assert fed.feed.status.state is FeedState.LIVE
    assert fed.index.match(KEYS) == 0


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (stored(PROMPT, SIZE) | {"block_hashes": list(range(10))}, "--prefix-caching-hash-algo sha256_cbor"),
        (stored(PROMPT, 32), "blocks of 32 tokens"),
    ],
)
def test_a_worker_whose_keys_are_others_is_routed_to_by_what_was_sent(event: dict[str, Any], why: str) -> None:
    fed = Fed()
    fed.take(0, event)
    assert fed.feed.status.state is FeedState.REFUSED
    assert why in fed.feed.status.detail
    fed.index.add(KEYS)
    fed.clock.now_s += 1000
    assert fed.index.match(KEYS) == 10


def test_an_adapters_keys_show_nothing() -> None:
    fed = Fed()
    fed.take(0, stored(PROMPT, SIZE) | {"block_hashes": list(range(10)), "extra_keys": [["a-lora"]]})
    assert fed.feed.status.state is FeedState.WAITING


def test_gaps_repetitions_and_restarts_are_told_apart() -> None:
    fed = Fed()
    for sequence in range(3):
        fed.take(sequence, stored(PROMPT, SIZE))
    assert fed.take(5) is Step.GAP
    assert fed.take(1) is Step.REPEATED
    assert fed.take(2) is Step.REPEATED
    assert fed.take(0, at_unix_s=2000.0) is Step.RESTARTED
    assert fed.feed.status.sequence == 2
    fed.feed.begin_anew(0)
    assert fed.index.match(KEYS) == 0
    assert fed.take(0, at_unix_s=2000.0) is Step.APPLIED


def test_a_block_in_two_media_is_held_until_both_are_gone() -> None:
    fed = Fed()
    fed.take(0, stored(PROMPT, SIZE), stored(PROMPT, SIZE, medium="CPU"))
    fed.take(1, removed(KEYS[4:]))
    assert (fed.index.match(KEYS), fed.index.match_below(KEYS)) == (4, 10)
    fed.take(2, removed(KEYS[6:], medium="CPU"))
    assert (fed.index.match(KEYS), fed.index.match_below(KEYS)) == (4, 6)


def test_layers_that_keep_a_window_only_say_nothing_of_the_prefix() -> None:
    fed = Fed()
    window = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window"}
    fed.take(0, stored(PROMPT, SIZE), stored(PROMPT, SIZE, **window))
    fed.take(1, removed(KEYS, group_idx=1))
    assert fed.index.match(KEYS) == 10


def test_the_index_is_bounded_and_the_oldest_blocks_leave() -> None:
    fed = Fed(blocks_max=15)
    others = list(range(5000, 5160))
    fed.take(0, stored(PROMPT, SIZE), stored(others, SIZE))
    assert len(fed.index) == 15
    assert fed.index.match(block_keys(others, SIZE)) == 10
    assert fed.index.match(KEYS) == 0


def test_events_that_cannot_be_read_make_what_was_sent_count_again() -> None:
    fed = Fed()
    fed.take(0, stored(PROMPT, SIZE))
    fed.feed.lose("garbage")
    fed.index.add(KEYS[:2])
    fed.clock.now_s += 1000
    assert fed.index.match(KEYS) == 2
    assert fed.feed.status.state is FeedState.WAITING


EVENTS = st.tuples(
    st.sampled_from(["store", "remove", "clear"]), st.sets(st.integers(0, 9)), st.sampled_from(["GPU", "CPU"])
)


@given(st.lists(EVENTS, max_size=30))
def test_the_index_equals_what_a_plain_set_would_say(script: list[tuple[str, set[int], str]]) -> None:
    fed = Fed()
    fed.take(0, stored(PROMPT, SIZE), CLEARED)
    held: dict[str, set[int]] = {"GPU": set(), "CPU": set()}
    for number, (kind, blocks, medium) in enumerate(script, 1):
        keys = [KEYS[block] for block in sorted(blocks)]
        if kind == "store":
            fed.take(number, removed(keys, medium=medium) | {"type": "BlockStored"} | NO_ROOT)
            held[medium] |= blocks
        elif kind == "remove":
            fed.take(number, removed(keys, medium=medium))
            held[medium] -= blocks
        else:
            fed.take(number, CLEARED)
            held = {"GPU": set(), "CPU": set()}
    assert fed.index.match(KEYS) == _leading(held["GPU"])
    assert fed.index.match_below(KEYS) == _leading(held["GPU"] | held["CPU"])
    assert len(fed.index) == len(held["GPU"] | held["CPU"])


NO_ROOT = {"parent_block_hash": 1, "token_ids": [], "block_size": SIZE, "lora_id": None, "lora_name": None}


def _leading(blocks: set[int]) -> int:
    return next(n for n in range(11) if n not in blocks)
