"""What a worker measures of itself at its start, and the curves drawn through it.

Measured by `workers.profiling`, kept by `stratakv.profile_store`, told under GET /info. `Curves` are for whoever has to know
how long a worker takes: its own choice between loading and computing, a router, a simulation. Pure.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import msgspec


class PrefillPoint(msgspec.Struct, frozen=True):
    """Computing `num_tokens` of one prompt, behind `num_cached` tokens whose KV was there."""

    num_tokens: int
    num_cached: int
    seconds: float


class DecodePoint(msgspec.Struct, frozen=True):
    """One step of `num_sequences` decoding sequences with `context_tokens` each."""

    num_sequences: int
    context_tokens: int
    step_s: float


class WorkerProfile(msgspec.Struct, frozen=True):
    """Rates of one model on one device; empty where nothing was measured."""

    prefill: tuple[PrefillPoint, ...] = ()
    decode: tuple[DecodePoint, ...] = ()
    load_bytes_per_s: dict[str, float] = {}
    """By tier."""


SIZES_MIN = 3
"""Of prompts; fewer do not tell how their time grows."""
END_SHARE_MIN = 0.5
"""A token behind the longest prompt measured takes at least this share of the mean time of those before."""


class _Line:
    """Straight lines between points; level before the first one, on as between the last two behind them.

    More work never takes less time: a point that says so was measured badly, and is raised.
    """

    def __init__(self, points: Iterable[tuple[float, float]], end_share_min: float = 0.0) -> None:
        ordered = dict(sorted(points))
        self._x = list(ordered)
        self._y = list(accumulate(ordered.values(), max))
        self.end = self._x[-1] if self._x else 0.0
        self._end_share_min = end_share_min

    def __call__(self, x: float) -> float:
        if not self._x or x <= self._x[0]:
            return self._y[0] if self._y else 0.0
        at = bisect_right(self._x, x)
        if at == len(self._x):
            return self._y[-1] + (x - self._x[-1]) * self._end_slope()
        return self._y[at - 1] + (x - self._x[at - 1]) * self._slope(at)

    def _slope(self, at: int) -> float:
        """Up to a point."""
        return (self._y[at] - self._y[at - 1]) / (self._x[at] - self._x[at - 1])

    def _end_slope(self) -> float:
        last = self._slope(len(self._x) - 1) if len(self._x) > 1 else 0.0
        return max(last, self._end_share_min * self._y[-1] / self._x[-1])

    def __len__(self) -> int:
        return len(self._x)


class Curves:
    """A profile as functions; 0 where too little is known.

    Attention is taken to cost the same for every pair of a new token and one before it; everything else depends on the number
    of new tokens, or of sequences, alone.
    """

    def __init__(self, profile: WorkerProfile) -> None:
        fresh = [(p.num_tokens, p.seconds) for p in profile.prefill if not p.num_cached]
        self._prefill = _Line(fresh, END_SHARE_MIN)
        self.is_complete = len(self._prefill) >= SIZES_MIN
        """Whether the profile says enough to go by."""
        if not self.is_complete:
            self._prefill = _Line(())
        behind = [p for p in profile.prefill if p.num_cached]
        pairs = [max(0.0, p.seconds - self._prefill(p.num_tokens)) / (p.num_tokens * p.num_cached) for p in behind]
        # The pairs of a prompt's own tokens take no longer than all of it.
        most_s = min((2 * seconds / num_tokens**2 for num_tokens, seconds in fresh), default=0.0)
        self._pair_s = min(sum(pairs) / len(pairs), most_s) if pairs else 0.0
        self._context_s = _context_s(profile.decode)
        by_sequences: dict[int, list[float]] = {}
        for point in profile.decode:
            attention_s = self._context_s * point.num_sequences * point.context_tokens
            by_sequences.setdefault(point.num_sequences, []).append(max(0.0, point.step_s - attention_s))
        self._step = _Line((number, sum(found) / len(found)) for number, found in by_sequences.items())

    def prefill_s(self, num_tokens: int, num_cached: int = 0) -> float:
        """Computing so many tokens behind so many cached ones."""
        beyond = max(0.0, num_tokens - self._prefill.end)
        pairs = num_tokens * num_cached + beyond * beyond / 2 if self.is_complete else 0.0
        return self._prefill(num_tokens) + self._pair_s * pairs

    def decode_step_s(self, num_sequences: int, context_tokens: int) -> float:
        """One step of so many sequences, with so many tokens of context each on average."""
        return self._step(num_sequences) + self._context_s * num_sequences * context_tokens


def _context_s(points: Sequence[DecodePoint]) -> float:
    """Of a step, for each token of each sequence's context: the mean slope between points of as many sequences."""
    ordered = sorted(points, key=lambda p: (p.num_sequences, p.context_tokens))
    slopes = [
        max(0.0, (more.step_s - less.step_s) / (less.num_sequences * (more.context_tokens - less.context_tokens)))
        for less, more in pairwise(ordered)
        if less.num_sequences == more.num_sequences and less.context_tokens < more.context_tokens
    ]
    return sum(slopes) / len(slopes) if slopes else 0.0
