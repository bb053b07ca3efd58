"""Causal grouped-query attention of a step's tokens over the paged cache.

Each sequence's part of the step attends to two kinds of keys: those that were in the cache before (no mask is needed) and
the part's own (causal). Runs of consecutive blocks are read in place, as views; the results over several runs are merged
by their log-sum-exp. Query heads are folded onto their KV head, so that a key is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from workers.engine.block_table import Run

MAX_RUNS_IN_PLACE = 6
"""A sequence scattered over more runs than this is gathered first: one copy is cheaper than many small products."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""Output [kv_heads, group, rows, head_dim] and log-sum-exp [kv_heads, group, rows] over some of the keys."""


@dataclass(frozen=True, slots=True)
class AttentionPart:
    """Rows `first_row` .. `first_row + num_rows - 1` of a step: new tokens of one sequence.

    A single row reads its own key from the cache, as the last slot of `context`; several rows read theirs from the step.
    """

    first_row: int
    num_rows: int
    context: tuple[Run, ...]

    @property
    def stop_row(self) -> int:
        return self.first_row + self.num_rows


class PreparedPart:
    """A part and, if its context is too scattered to be read in place, the slots to gather."""

    __slots__ = ("part", "slots")

    def __init__(self, part: AttentionPart, device: torch.device) -> None:
        self.part = part
        self.slots: torch.Tensor | None = None
        if len(part.context) > MAX_RUNS_IN_PLACE:
            self.slots = torch.cat([torch.arange(run.start, run.stop, device=device) for run in part.context])

    def context(self, cache: torch.Tensor) -> list[torch.Tensor]:
        """The context's keys or values as [1, kv_heads, num_tokens, head_dim] views of `cache` [slots, heads, dim]."""
        if self.slots is not None:
            return [cache[self.slots].transpose(0, 1).unsqueeze(0)]
        return [cache[run.start : run.stop].transpose(0, 1).unsqueeze(0) for run in self.part.context]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    parts: Sequence[PreparedPart],
) -> torch.Tensor:
    """Attention output [num_tokens, num_heads × head_dim].

    `q` [num_tokens, num_heads, head_dim], `k` and `v` [num_tokens, kv_heads, head_dim] are the step's, already written to
    the caches [slots, kv_heads, head_dim].
    """
    outputs = [_attend_part(prepared, q, k, v, k_cache, v_cache) for prepared in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_part(
    prepared: PreparedPart,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    part = prepared.part
    rows, kv_heads, head_dim = part.num_rows, k.shape[1], k.shape[2]
    # [kv_heads, group, rows, head_dim]
    queries = q[part.first_row : part.stop_row].view(rows, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    partials = []
    if part.context:
        folded = queries.reshape(1, kv_heads, -1, head_dim)
        for keys, values in zip(prepared.context(k_cache), prepared.context(v_cache), strict=True):
            out, lse = _flash(folded, keys, values, causal=False)
            partials.append((out.view(queries.shape), lse.view(queries.shape[:3])))
    if rows > 1:
        own = slice(part.first_row, part.stop_row)
        partials.append(
            _flash(queries, _per_query_head(k[own], queries), _per_query_head(v[own], queries), causal=True)
        )
    merged = partials[0][0] if len(partials) == 1 else _merge(partials)
    return merged.permute(2, 0, 1, 3).reshape(rows, -1)


def _per_query_head(heads: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """[rows, kv_heads, head_dim] seen as [kv_heads, group, rows, head_dim] without copying."""
    return heads.transpose(0, 1).unsqueeze(1).expand(queries.shape)


def _merge(partials: Sequence[Partial]) -> torch.Tensor:
    """Attention over the union of disjoint keys from the attention over each."""
    out, lse = partials[0][0].float(), partials[0][1]
    for other, other_lse in partials[1:]:
        out = torch.lerp(out, other.float(), torch.sigmoid(other_lse - lse).unsqueeze(-1))
        lse = torch.logaddexp(lse, other_lse)
    return out.to(partials[0][0].dtype)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> Partial:
    """Attention with log-sum-exp; q, k, v [batch, heads, tokens, head_dim]."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse
    return _exact(q, k, v, causal=causal)


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> Partial:
    """The same in plain operations, for devices without a kernel that returns the log-sum-exp."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul(functional.softmax(scores, dim=-1).to(v.dtype), v), lse
