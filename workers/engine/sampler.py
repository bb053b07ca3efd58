"""From logits to tokens: greedy, or one draw per token that depends on (seed, index) alone.

A draw is a number in [0, 1) hashed from seed and output index, looked up in the cumulated probabilities; no generator state
is carried, so any engine continues any request.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.engine.penalties import Penalties
from workers.engine.requests import SamplingParams, TokenLogprob

_CANDIDATES = 512
"""Likeliest tokens looked at first; a nucleus that is larger costs a full sort."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How to choose from one row of logits."""

    params: SamplingParams
    seed: int
    index: int
    allowed: torch.Tensor | None = None
    """Ids of the tokens to choose from, ascending; None: all."""
    penalties: Penalties | None = None
    """Change the logits first; log-probabilities are of the unchanged ones."""


@dataclass(frozen=True, slots=True)
class Sample:
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sample | None]:
    """One token per row of fp32 `logits` [len(rows), vocab_size]; None for a row that is not finite."""
    best, tokens = logits.max(dim=-1)
    # max propagates NaN and shows +inf; a row of -inf only shows as -inf
    finite = torch.isfinite(best).tolist()
    chosen: list[int] = tokens.tolist()
    samples: list[Sample | None] = []
    for row, (how, token, usable) in enumerate(zip(rows, chosen, finite, strict=True)):
        if not usable:
            samples.append(None)
            continue
        if how.allowed is not None or how.penalties is not None:
            token = _choose_changed(logits[row], how)
        elif how.params.temperature > 0:
            token = _draw(logits[row], how)
        samples.append(_with_logprobs(logits[row], token, how.params.logprobs))
    return samples


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that decides output token `index` of a request with this seed."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    bits: int = struct.unpack("<Q", digest)[0]
    return (bits >> 11) * 2.0**-53


def _choose_changed(logits: torch.Tensor, how: SampleRow) -> int:
    """The token of a row that has penalties, or not all tokens to choose from."""
    if how.penalties is not None:
        logits = how.penalties.apply(logits)
    if how.allowed is None:
        return _choose(logits, how)
    # Only what may be chosen is looked at, so that no rounding can ever choose anything else.
    among = how.allowed.to(logits.device)
    return int(among[_choose(logits[among], how)])


def _choose(logits: torch.Tensor, how: SampleRow) -> int:
    return _draw(logits, how) if how.params.temperature > 0 else int(logits.argmax())


def _draw(logits: torch.Tensor, how: SampleRow) -> int:
    params = how.params
    # the largest logit first: dividing by a tiny temperature must not overflow
    probabilities = torch.softmax((logits - logits.max()).double() / params.temperature, dim=-1)
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        return _pick(probabilities, uniform(how.seed, how.index))
    kept, token_ids = _filter(probabilities, params)
    return int(token_ids[_pick(kept, uniform(how.seed, how.index))])


def _filter(probabilities: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, largest first, and ids of the tokens that top_k, top_p and min_p leave."""
    # what top_k leaves is needed whole: top_p is a share of its sum
    kept, token_ids = torch.topk(probabilities, min(params.top_k or _CANDIDATES, len(probabilities)))
    reaches_all = float(kept.sum()) >= params.top_p or float(kept[-1]) < params.min_p * float(kept[0])
    if not params.top_k and not reaches_all:
        kept, token_ids = torch.sort(probabilities, descending=True, stable=True)
    if params.top_p < 1.0:
        before = torch.cumsum(kept, dim=0) - kept
        keep = before < params.top_p * kept.sum() if params.top_k else before < params.top_p
        kept, token_ids = kept[keep], token_ids[keep]
    above = kept >= params.min_p * kept[0]
    return kept[above], token_ids[above]


def _pick(weights: torch.Tensor, point: float) -> int:
    """Index into `weights` where their cumulated sum passes `point` × their total."""
    cumulated = torch.cumsum(weights, dim=0)
    index = int(torch.searchsorted(cumulated, point * float(cumulated[-1]), right=True))
    return min(index, len(weights) - 1)


def _with_logprobs(logits: torch.Tensor, token: int, wanted: int | None) -> Sample:
    if wanted is None:
        return Sample(token)
    logprobs = torch.log_softmax(logits, dim=-1)
    top: tuple[TokenLogprob, ...] = ()
    if wanted:
        values, ids = torch.topk(logprobs, wanted)
        top = tuple(TokenLogprob(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return Sample(token, float(logprobs[token]), top)
