"""Events are read from the bytes that vLLM sends, in both of its spellings, and nothing else is."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.kv_events.wire import AllBlocksCleared, BlocksRemoved, BlocksStored, MalformedEvents, read_batch
from dbnode.scheduler.index import Medium, tails
from stratakv.keys import block_keys, salt_extra
from tests.kv_event_publisher import (
    RECORDED_SALTED,
    RECORDED_STORED,
    RECORDED_TOKENS,
    frames,
    low_bits,
    removed,
    stored,
)

KEYS = block_keys(RECORDED_TOKENS, 128)
SEVEN = (7).to_bytes(8, "big")


def test_recorded_events_of_vllm_are_read() -> None:
    batch = read_batch([b"", SEVEN, RECORDED_STORED])
    assert batch is not None
    assert (batch.sequence, batch.at_unix_s) == (7, pytest.approx(1795368630.5, abs=0.1))
    (event,) = batch.events
    assert isinstance(event, BlocksStored)
    assert event.tails == tuple(tails(KEYS))
    assert (event.token_ids, event.block_size, event.medium) == (RECORDED_TOKENS, 128, Medium.DEVICE)
    assert event.is_root
    assert event.is_whole_prefix
    assert event.first_extra is None


def test_a_recorded_salt_enters_the_key_of_the_first_block() -> None:
    batch = read_batch([b"", SEVEN, RECORDED_SALTED])
    assert batch is not None
    (event,) = batch.events
    assert isinstance(event, BlocksStored)
    assert event.first_extra == ("t1",)
    assert event.tails == tuple(tails(block_keys(RECORDED_TOKENS, 128, first_block_extra=salt_extra("t1"))))


def test_the_older_spelling_as_arrays_says_the_same() -> None:
    hashes = [low_bits(key) for key in KEYS]
    old = ["BlockStored", hashes, None, RECORDED_TOKENS, 128, None, "GPU"]
    newer, older = (read_batch(frames(0, 1.0, event)) for event in (stored(RECORDED_TOKENS, 128, group_idx=None), old))
    assert newer == older
    assert read_batch(frames(0, 1.0, ["BlockRemoved", hashes], ["AllBlocksCleared"])) == read_batch(
        frames(0, 1.0, removed(KEYS, medium=None), {"type": "AllBlocksCleared"})
    )


def test_whole_hashes_are_taken_by_their_ends() -> None:
    batch = read_batch(frames(0, 1.0, removed(KEYS) | {"block_hashes": list(KEYS)}))
    assert batch is not None
    assert batch.events == (BlocksRemoved(tuple(tails(KEYS)), Medium.DEVICE, None),)


def test_the_medium_is_kept_and_an_unknown_one_passed_over() -> None:
    events = [removed(KEYS, medium=medium) for medium in (None, "GPU", "CPU", "STORAGE", "TAPE")]
    batch = read_batch(frames(0, 1.0, *events))
    assert batch is not None
    media = [event.medium for event in batch.events if isinstance(event, BlocksRemoved)]
    assert media == [Medium.DEVICE, Medium.DEVICE, Medium.HOST, Medium.STORAGE]


def test_events_that_newer_versions_may_add_are_passed_over() -> None:
    batch = read_batch(frames(0, 1.0, {"type": "BlockAdmired"}, {"type": "AllBlocksCleared"}))
    assert batch is not None
    assert batch.events == (AllBlocksCleared(),)


def test_the_end_of_a_replay_is_no_batch() -> None:
    assert read_batch([b"", b"", b"\xff" * 8, b""]) is None


@pytest.mark.parametrize(
    "message",
    [
        [],
        [b"", b"", b""],
        [b"", SEVEN, b""],
        [b"", SEVEN, b"\x90"],
        [b"", SEVEN, msgspec.msgpack.encode([1.0, [{}]])],
        [b"", SEVEN, msgspec.msgpack.encode([1.0, [7]])],
        [b"", SEVEN, msgspec.msgpack.encode([1.0, [removed(KEYS) | {"block_hashes": ["x"]}]])],
        [b"", SEVEN, msgspec.msgpack.encode([1.0, [stored([1, 2], 2) | {"block_size": 0}]])],
    ],
)
def test_anything_else_is_malformed(message: list[bytes]) -> None:
    with pytest.raises(MalformedEvents):
        read_batch(message)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(payload: bytes) -> None:
    try:
        read_batch([b"", SEVEN, payload])
    except MalformedEvents:
        return
