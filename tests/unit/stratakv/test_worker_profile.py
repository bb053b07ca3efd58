"""Curves through what was measured, and files that keep it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.profile_store import VALID_S, ProfileKey, ProfileStore
from stratakv.worker_profile import Curves, DecodePoint, PrefillPoint, WorkerProfile

KEY = ProfileKey("m", "r", "bf16", "a processor", 2, "0.1")
PROFILE = WorkerProfile((PrefillPoint(16, 0, 0.1),), (DecodePoint(1, 128, 0.04),), {"l2": 5e9})


@given(
    base_s=st.floats(0.01, 1.0),
    token_s=st.floats(1e-3, 1e-2),
    pair_s=st.floats(0, 9e-7),
    num_tokens=st.integers(16, 8192),
    num_cached=st.integers(0, 8192),
)
def test_times_that_follow_the_rule_are_told_between_and_behind_the_points(
    base_s: float, token_s: float, pair_s: float, num_tokens: int, num_cached: int
) -> None:
    def seconds(new: int, cached: int) -> float:
        return base_s + token_s * new + pair_s * new * cached

    assert pair_s * 2048 * 2048 / 2 <= seconds(2048, 0)

    shapes = ((16, 0), (512, 0), (2048, 0), (64, 2048))
    curves = Curves(WorkerProfile(tuple(PrefillPoint(*shape, seconds(*shape)) for shape in shapes)))
    beyond = max(0, num_tokens - 2048)  # tokens there have more before them than those that were measured
    expected = seconds(num_tokens, num_cached) + pair_s * beyond * beyond / 2
    assert curves.prefill_s(num_tokens, num_cached) == pytest.approx(expected, rel=1e-3)


@given(
    base_s=st.floats(0.01, 1.0),
    sequence_s=st.floats(0, 0.01),
    context_s=st.floats(0, 1e-6),
    num_sequences=st.integers(1, 64),
    context_tokens=st.integers(1, 8192),
)
def test_steps_that_follow_the_rule_are_told_for_any_batch_and_context(
    base_s: float, sequence_s: float, context_s: float, num_sequences: int, context_tokens: int
) -> None:
    def seconds(number: int, context: int) -> float:
        return base_s + sequence_s * number + context_s * number * context

    shapes = ((1, 128), (1, 2048), (8, 128), (32, 128))
    curves = Curves(WorkerProfile((), tuple(DecodePoint(*shape, seconds(*shape)) for shape in shapes)))
    expected = seconds(num_sequences, context_tokens)
    assert curves.decode_step_s(num_sequences, context_tokens) == pytest.approx(expected, rel=1e-3)


@given(
    st.lists(st.builds(PrefillPoint, st.integers(1, 9000), st.integers(0, 9000), st.floats(0, 100)), max_size=6),
    st.lists(st.builds(DecodePoint, st.integers(1, 64), st.integers(1, 9000), st.floats(0, 100)), max_size=6),
    st.integers(1, 10_000),
    st.integers(0, 10_000),
)
def test_no_measurement_makes_a_time_negative_before_the_last_point(
    prefill: list[PrefillPoint], decode: list[DecodePoint], num_tokens: int, num_cached: int
) -> None:
    profile = WorkerProfile(tuple(prefill), tuple(decode))
    assert Curves(profile).prefill_s(num_tokens, num_cached) >= 0
    assert Curves(profile).decode_step_s(num_tokens % 64 + 1, num_cached) >= 0


def test_two_sizes_say_too_little_to_go_by() -> None:
    curves = Curves(WorkerProfile((PrefillPoint(16, 0, 1.5), PrefillPoint(128, 0, 0.7), PrefillPoint(64, 512, 2.0))))
    assert not curves.is_complete
    assert curves.prefill_s(3000, 100) == 0.0


def test_one_batch_size_says_nothing_of_others() -> None:
    curves = Curves(WorkerProfile((), (DecodePoint(1, 128, 0.05),)))
    assert curves.decode_step_s(8, 512) == 0.05


def test_a_point_that_was_measured_badly_does_not_make_long_prompts_cheap() -> None:
    points = (PrefillPoint(16, 0, 0.1), PrefillPoint(128, 0, 0.9), PrefillPoint(512, 0, 0.8))
    assert Curves(WorkerProfile(points)).prefill_s(5120) >= 4.0


def test_a_profile_is_found_again_by_its_key_only(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    assert store.find(KEY) is None
    store.keep(KEY, PROFILE)
    assert ProfileStore(tmp_path).find(KEY) == PROFILE
    for change in ({"threads": 1}, {"dtype": "fp32"}, {"revision": "other"}, {"device": "another"}, {"kernels": "2"}):
        assert store.find(msgspec.structs.replace(KEY, **change)) is None
    assert [stored.key for stored in store.all()] == [KEY]


def test_an_old_or_damaged_file_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ProfileStore(tmp_path)
    store.keep(KEY, PROFILE)
    (path,) = store.directory.glob("*.json")
    now = time.time()
    monkeypatch.setattr("stratakv.profile_store.time.time", lambda: now + VALID_S)
    assert store.find(KEY) is None
    assert len(store.all()) == 1
    path.write_text("{")
    assert store.find(KEY) is None
    assert store.all() == []


def test_a_directory_that_cannot_be_written_costs_the_profile_only(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("in the way")
    store = ProfileStore(tmp_path)
    with store.turn(1.0):
        store.keep(KEY, PROFILE)
    assert store.find(KEY) is None


def test_who_measures_does_so_alone_but_nobody_waits_for_ever(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with ProfileStore(tmp_path).turn(60.0):
            order.append("second")

    thread = threading.Thread(target=second)
    with ProfileStore(tmp_path).turn(60.0):
        thread.start()
        with ProfileStore(tmp_path).turn(0.2):
            order.append("first")
    thread.join(60.0)
    assert order == ["first", "second"]
