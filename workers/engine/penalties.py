"""Logits changed before a token is chosen: penalties on tokens that were there already, biases the caller gives, no early end.

A sequence that asks for neither has no `Penalties`. Counts are taken from the sequence's tokens, so an engine that continues a
request from what another one generated counts the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch

from workers.engine.requests import SamplingParams


class Penalties:
    """What one sequence's next logits are changed by."""

    __slots__ = ("_bias", "_counts", "_ends", "_num_output", "_params", "_prompt")

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Collection[int] = ()
    ) -> None:
        self._params = params
        self._num_output = len(output)
        self._ends = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos)}) if params.min_tokens else []
        self._counts = Counter(output) if params.penalizes_output else Counter[int]()
        self._prompt = sorted(set(prompt)) if params.repetition_penalty != 1.0 else []
        ids, values = [token for token, _ in params.logit_bias], [bias for _, bias in params.logit_bias]
        self._bias = (torch.tensor(ids, dtype=torch.long), torch.tensor(values)) if ids else None

    @classmethod
    def of(
        cls, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Collection[int] = ()
    ) -> Penalties | None:
        """None if the request asks for none. `eos` are the model's tokens that end an answer."""
        return cls(params, prompt, output, eos) if params.changes_logits else None

    def count(self, token_id: int) -> None:
        """Take a generated token."""
        self._num_output += 1
        if self._params.penalizes_output:
            self._counts[token_id] += 1

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """A changed copy of one row of fp32 `logits` [vocab_size]: biases first, then penalties, then ends."""
        changed = logits.clone()
        if self._bias is not None:
            ids, values = (part.to(logits.device) for part in self._bias)
            changed[ids] += values
        if self._params.repetition_penalty != 1.0:
            self._divide(changed)
        if self._counts and (self._params.presence_penalty or self._params.frequency_penalty):
            ids = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            changed[ids] -= self._params.presence_penalty + self._params.frequency_penalty * counts
        if self._num_output < self._params.min_tokens:
            changed[self._ends] = -torch.inf
        return changed

    def _divide(self, logits: torch.Tensor) -> None:
        """By the repetition penalty, in place, for tokens of the prompt and the output; negative ones are multiplied."""
        seen = list(self._counts.keys() | self._prompt)
        ids = torch.tensor(seen, dtype=torch.long, device=logits.device)
        penalty, values = self._params.repetition_penalty, logits[ids]
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
