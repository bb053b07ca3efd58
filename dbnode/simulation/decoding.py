"""The answers that a simulated worker generates: each step gives all of them a token, and takes longer the more they are."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from dbnode.simulation.request import SimRequest


class Decoding:
    """Answers by when they end, if none comes or goes before. `step_s` is told how many there are, and of how many tokens."""

    def __init__(self, step_s: Callable[[int, int], float]) -> None:
        self._step_s_of = step_s
        self._answers: list[tuple[float, int, SimRequest]] = []
        self._tokens = 0
        self.step_s = 0.0
        """Of a step now; 0 until the first one."""

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def next_end_s(self) -> float | None:
        """When the next one has all its tokens; None without any."""
        return self._answers[0][0] if self._answers else None

    def add(self, now_s: float, sim: SimRequest) -> None:
        """One that has its first token."""
        self._change(now_s, 1, _tokens(sim))
        end_s = now_s + max(0, sim.request.output_tokens - 1) * self.step_s
        heapq.heappush(self._answers, (end_s, sim.number, sim))

    def take_ended(self, now_s: float) -> list[SimRequest]:
        """Those that have all their tokens."""
        ended = []
        while self._answers and self._answers[0][0] <= now_s:
            ended.append(heapq.heappop(self._answers)[2])
        self._change(now_s, 0, -sum(map(_tokens, ended)))
        return ended

    def _change(self, now_s: float, added: int, added_tokens: int) -> None:
        """So many come, or have gone: the steps that the others still need take longer, or shorter."""
        self._tokens += added_tokens
        before_s, self.step_s = self.step_s, self._step_s_of(len(self._answers) + added, self._tokens)
        if before_s and self.step_s != before_s:
            scale = self.step_s / before_s
            self._answers = [(now_s + (end_s - now_s) * scale, n, sim) for end_s, n, sim in self._answers]


def _tokens(sim: SimRequest) -> int:
    """That each of its steps attends to, on average."""
    return sim.request.prompt_tokens + sim.request.output_tokens // 2
