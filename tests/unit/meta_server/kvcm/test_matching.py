"""Masks and matching, against their definitions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meta_server.kvcm.masks import pack, unpack, visible
from meta_server.kvcm.matching import match
from meta_server.kvcm.protocol import meta_service_pb2 as meta

BITS = st.lists(st.booleans(), max_size=40)


def found(bits: list[bool], query_type: int, window: int = 0) -> list[int | None]:
    return match(query_type, range(len(bits)), window, lambda keys: [key if bits[key] else None for key in keys])


@given(BITS)
def test_a_packed_mask_says_the_same(bits: list[bool]) -> None:
    assert unpack(pack(bits), len(bits), "mask") == bits


@given(BITS)
def test_masks_hide_exactly_what_they_mark(bits: list[bool]) -> None:
    shown = visible(pack(bits), list(range(len(bits))))
    assert shown == [i for i, is_hidden in enumerate(bits) if not is_hidden]


@given(BITS)
def test_a_prefix_ends_at_the_first_miss(bits: list[bool]) -> None:
    prefix = found(bits, meta.QT_PREFIX_MATCH)
    assert prefix == list(range(len(prefix)))
    assert all(bits[: len(prefix)])
    assert len(prefix) == len(bits) or not bits[len(prefix)]


@given(BITS, st.integers(1, 5))
def test_the_last_whole_window_is_found(bits: list[bool], window: int) -> None:
    ends = [end for end in range(window, len(bits) + 1) if all(bits[end - window : end])]
    inside = range(ends[-1] - window, ends[-1]) if ends else range(0)
    expected = [i if i in inside else None for i in range(len(bits))]
    assert found(bits, meta.QT_REVERSE_ROLL_SW_MATCH, window) == expected
