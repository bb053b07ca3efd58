"""How long a prefix can be restored when several pools have a say: SGLang's hit policies."""

from __future__ import annotations

import enum
from collections.abc import Sequence


class Policy(enum.Enum):
    """Which pages of a pool a prefix needs; SGLang's names."""

    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"


def restorable(policy: Policy, present: Sequence[bool], window: int) -> set[int]:
    """Lengths in pages of the prefixes that one pool can restore.

    `present[i]` says whether it has page i. With TRAILING_PAGES only the last `window` pages of a prefix count (all of a
    shorter one), so that there may be gaps between lengths.
    """
    if policy is Policy.ALL_PAGES:
        whole = next((index for index, there in enumerate(present) if not there), len(present))
        return set(range(1, whole + 1))
    lengths, run = set(), 0
    for length, there in enumerate(present, 1):
        run = run + 1 if there else 0
        if run >= min(max(window, 1), length):
            lengths.add(length)
    return lengths
