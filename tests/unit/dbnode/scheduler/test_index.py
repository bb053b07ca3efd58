"""The router's belief about a worker's cache."""

from __future__ import annotations

from dbnode.scheduler.index import BlockIndex
from stratakv.keys import block_keys

KEYS = block_keys(list(range(160)), 16)
OTHERS = block_keys(list(range(5000, 5160)), 16)


def test_only_a_leading_run_of_blocks_matches() -> None:
    index = BlockIndex(100)
    index.add(KEYS[:3])
    index.add(KEYS[5:])
    assert index.match(KEYS) == 3
    assert index.match(OTHERS) == 0


def test_the_least_recently_used_leave_first_and_the_ends_of_prefixes_before_their_beginnings() -> None:
    index = BlockIndex(12)
    index.add(KEYS)
    index.add(OTHERS[:5])
    assert len(index) == 12
    assert index.match(KEYS) == 7
    assert index.match(OTHERS) == 5


def test_a_worker_that_starts_anew_holds_nothing() -> None:
    index = BlockIndex(100)
    index.add(KEYS)
    index.clear()
    assert index.match(KEYS) == 0
