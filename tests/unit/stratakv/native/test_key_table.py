"""Both forms of the key table do as a dictionary does, also with keys that share their hash and tables that grow."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratakv import _native
from stratakv._native.key_table import KeyTable, PythonKeyTable

Make = Callable[[int, int, int], KeyTable]
MAKERS: list[object] = [pytest.param(PythonKeyTable, id="python")]
if _native.is_built():
    MAKERS.append(pytest.param(_native.make_key_table, id="native"))
either = pytest.mark.parametrize("make", MAKERS)
KEYS = 24
ROWS = 64


def keys_of(width: int) -> np.ndarray:
    """Keys of which many share their first word, where they have more than one."""
    first = np.arange(KEYS, dtype=np.uint64) // (3 if width > 1 else 1)
    rest = np.random.default_rng(1).integers(0, 2**63, (KEYS, width - 1), np.uint64)
    return np.concatenate([first[:, None], rest], axis=1)


@either
@settings(max_examples=200)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, KEYS - 1)), max_size=80),
    where=st.sampled_from([(0, 4), (3, 1)]),
)
def test_it_does_as_a_dictionary(make: Make, steps: list[tuple[bool, int]], where: tuple[int, int]) -> None:
    first, width = where
    keys, rows = keys_of(width), np.zeros((ROWS, 4), np.uint64)
    table, expected, free = make(4, first, width), dict[int, int](), list(range(ROWS))
    for is_entered, key in steps:
        number = free[0] if is_entered else expected.get(key, free[0])
        rows[number, first : first + width] = keys[key]
        if is_entered:
            assert table.enter(np.array([number]), rows) == bytes([key not in expected])
            if expected.setdefault(key, number) == number:
                free.remove(number)
        else:
            table.leave(np.array([number]), rows)
            if key in expected:
                free.append(expected.pop(key))
        found = np.empty(KEYS, np.int64)
        table.find(np.ascontiguousarray(keys), rows, found)
        assert found.tolist() == [expected.get(i, -1) for i in range(KEYS)]
        assert len(table) == len(expected)


@either
def test_a_large_table_keeps_all_its_keys_while_others_come_and_go(make: Make) -> None:
    count, rng = 20_000, random.Random(0)
    rows = np.random.default_rng(0).integers(0, 2**63, (count, 4), np.uint64)
    table, found = make(4, 0, 4), np.empty(count, np.int64)
    assert table.enter(np.arange(count), rows) == b"\1" * count
    gone = np.array(rng.sample(range(count), count // 2))
    table.leave(gone, rows)
    table.find(rows, rows, found)
    assert set(np.flatnonzero(found == -1).tolist()) == set(gone.tolist())
    assert table.enter(gone, rows) == b"\1" * len(gone)
    table.find(rows.tobytes(), rows, found)
    assert found.tolist() == list(range(count))
    assert table.size_bytes / count < 250


@either
def test_what_does_not_fit_is_refused(make: Make) -> None:
    rows = np.zeros((4, 4), np.uint64)
    for shape in ((4, 4, 1), (4, -1, 1), (4, 0, 0)):
        with pytest.raises(ValueError, match="within its row"):
            make(*shape)
    for number in (-1, 4):
        with pytest.raises(ValueError, match="no such row"):
            make(4, 0, 4).enter(np.array([number]), rows)
    for keys in (b"short", bytes(64)):
        with pytest.raises(ValueError):  # noqa: PT011 - each form says it in its words
            make(4, 0, 4).find(keys, rows, np.empty(1, np.int64))
