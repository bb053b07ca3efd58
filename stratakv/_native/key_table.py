"""Which row of a table has a key: the interface, and the form in Python for where the C++ module was not built.

A row is `row_words` 64-bit words; its key are the `num_words` of them from `first_word` on. The table holds no keys, only row
numbers; whole keys are compared with the rows on every hit. Used by the meta server's index.
"""

from __future__ import annotations

import sys
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stratakv._native.base import Buffer, Int64s, UInt64s

ABSENT = -1
_FINGERPRINT_SHIFT = np.uint64(4)
"""60 bits make the smallest two-digit Python int."""


class KeyTable(Protocol):
    """Rows by their keys. Numbers and rows are contiguous; `rows` is the whole table, [rows, row_words]."""

    def __len__(self) -> int: ...

    @property
    def size_bytes(self) -> int:
        """Memory of the table."""

    def find(self, wanted: Buffer | UInt64s, rows: UInt64s, found: Int64s, /) -> None:
        """Of each wanted key (packed), the number of its row into `found`; ABSENT if there is none."""

    def enter(self, numbers: Int64s, rows: UInt64s, /) -> bytes:
        """Enter these rows; a byte for each, 0 where the key was there already and the older row stays."""

    def leave(self, numbers: Int64s, rows: UInt64s, /) -> None:
        """Take these rows out, whose keys are still there. Those that had not been entered are passed over."""


class PythonKeyTable:
    """A dictionary of 60 bits of each key; those that share them are in a small one of their own."""

    def __init__(self, row_words: int, first_word: int, num_words: int, /) -> None:
        if first_word < 0 or num_words < 1 or first_word > row_words - num_words:
            raise ValueError("a key must lie within its row")
        self._words = slice(first_word, first_word + num_words)
        self._num_words = num_words
        self._by_fingerprint: dict[int, int] = {}
        self._collided: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._by_fingerprint) + len(self._collided)

    @property
    def size_bytes(self) -> int:
        numbers = len(self) * 2 * sys.getsizeof(1 << 59)
        return sys.getsizeof(self._by_fingerprint) + sys.getsizeof(self._collided) + numbers

    def find(self, wanted: Buffer | UInt64s, rows: UInt64s, found: Int64s, /) -> None:
        keys: UInt64s = np.frombuffer(wanted, np.uint64).reshape(-1, self._num_words)
        lookup = self._by_fingerprint.get
        found[:] = [lookup(fingerprint, ABSENT) for fingerprint in _fingerprints(keys)]
        hits = np.flatnonzero(found != ABSENT)
        found[hits[(rows[found[hits], self._words] != keys[hits]).any(axis=1)]] = ABSENT
        if self._collided:
            for i in np.flatnonzero(found == ABSENT).tolist():
                found[i] = self._collided.get(keys[i].tobytes(), ABSENT)

    def enter(self, numbers: Int64s, rows: UInt64s, /) -> bytes:
        keys = self._keys(numbers, rows)
        pairs = zip(numbers.tolist(), _fingerprints(keys), keys, strict=True)
        return bytes(self._enter(number, fingerprint, key, rows) for number, fingerprint, key in pairs)

    def leave(self, numbers: Int64s, rows: UInt64s, /) -> None:
        keys = self._keys(numbers, rows)
        for number, fingerprint, key in zip(numbers.tolist(), _fingerprints(keys), keys, strict=True):
            if self._by_fingerprint.get(fingerprint) == number:
                del self._by_fingerprint[fingerprint]
            elif self._collided.get(key.tobytes()) == number:
                del self._collided[key.tobytes()]

    def _enter(self, number: int, fingerprint: int, key: UInt64s, rows: UInt64s) -> bool:
        holder = self._by_fingerprint.get(fingerprint)
        packed = key.tobytes()
        if packed in self._collided or (holder is not None and (rows[holder, self._words] == key).all()):
            return False
        if holder is None:
            self._by_fingerprint[fingerprint] = number
        else:
            self._collided[packed] = number
        return True

    def _keys(self, numbers: Int64s, rows: UInt64s) -> npt.NDArray[np.uint64]:
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(rows):
            raise ValueError("there is no such row")
        return rows[numbers, self._words]


def _fingerprints(keys: UInt64s) -> list[int]:
    fingerprints: list[int] = (keys[:, 0] >> _FINGERPRINT_SHIFT).tolist()
    return fingerprints
