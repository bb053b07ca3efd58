"""Who may write where: both implementations answer alike, and nothing is let in beside its grant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv import _native
from stratakv._native import Entered, Grants, fallback

PUTS = [bytes([n]) * 16 for n in range(3)]
UNITS = st.integers(0, 12)
RANGES = st.lists(st.tuples(UNITS, st.integers(1, 4)), min_size=1, max_size=3)
RUNS = st.lists(st.integers(0, 12), unique=True, max_size=6).map(sorted).map(lambda ends: ends[: len(ends) // 2 * 2])
STEPS = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(PUTS), RUNS, st.integers(0, 5)),
    st.tuples(st.just("close"), st.sampled_from(PUTS)),
    st.tuples(st.just("enter"), st.sampled_from(PUTS), RANGES, st.integers(0, 5)),
    st.tuples(st.just("leave"), st.sampled_from(PUTS)),
)


def enter(grants: Grants, put_id: bytes, ranges: Sequence[tuple[int, int]], now: float) -> int:
    offsets, sizes = zip(*ranges, strict=True)
    return grants.enter(put_id, np.array(offsets, np.uint64), np.array(sizes, np.uint32), now)


def answer(grants: Grants, step: tuple[object, ...]) -> object:
    match step:
        case ("open", bytes(put_id), list(ends), int(deadline)):
            bounds = np.array(ends, np.uint64)
            return grants.open(put_id, bounds[::2].copy(), bounds[1::2].copy(), float(deadline))
        case ("close", bytes(put_id)):
            return grants.close(put_id)
        case ("enter", bytes(put_id), list(ranges), int(now)):
            return enter(grants, put_id, ranges, float(now))
        case ("leave", bytes(put_id)):
            return grants.leave(put_id)
    raise AssertionError(step)


@pytest.mark.skipif(not _native.is_built(), reason="the C++ module was not built")
@given(steps=st.lists(STEPS, max_size=30))
def test_both_implementations_answer_alike(steps: list[tuple[object, ...]]) -> None:
    native, python = _native.make_grants(), fallback.Grants()
    for step in steps:
        assert answer(native, step) == answer(python, step), step


@pytest.fixture(params=["native", "python"])
def grants(request: pytest.FixtureRequest) -> Grants:
    if request.param == "python":
        return fallback.Grants()
    if not _native.is_built():
        pytest.skip("the C++ module was not built")
    return _native.make_grants()


def test_a_closed_grant_lets_nobody_in_and_tells_who_is_still_writing(grants: Grants) -> None:
    bounds = np.array([0, 8], np.uint64)
    grants.open(PUTS[0], bounds[:1], bounds[1:], 1.0)
    assert enter(grants, PUTS[0], [(0, 8)], 1.0) == Entered.YES
    assert not grants.close(PUTS[0])
    assert enter(grants, PUTS[0], [(0, 8)], 1.0) == Entered.REFUSED
    grants.leave(PUTS[0])
    assert grants.close(PUTS[0])


@pytest.mark.parametrize("sizes", [b"", b"123", bytes(8)])
def test_ranges_that_are_none_raise(sizes: bytes) -> None:
    if not _native.is_built():
        pytest.skip("the C++ module was not built")
    with pytest.raises(ValueError, match="sizes"):
        _native.make_grants().enter(PUTS[0], np.zeros(1, np.uint64), np.frombuffer(sizes, np.uint8), 0.0)  # type: ignore[arg-type]
