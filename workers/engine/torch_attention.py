"""Attention of a step's tokens over the paged cache, in torch: for any type, device and block size.

Keys that were in the cache before a step need no mask; a prompt chunk's own keys are causal. Runs of consecutive blocks are
read in place, as views, and the results over several runs are merged by their log-sum-exp. Query heads are folded onto
their KV head, so that a key is read once for all of them; decoding sequences that share a prefix read it once together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.engine.attention_parts import AttentionPart, split_shared
from workers.engine.block_table import Run, cut_runs
from workers.engine.flash import Partial, flash, merge

MAX_RUNS_IN_PLACE = 6
"""A sequence scattered over more runs than this is gathered first: one copy is cheaper than many small products."""


class TorchAttention:
    """How the parts of one step are attended to; made once, used in every layer."""

    def __init__(self, parts: Sequence[AttentionPart], device: torch.device) -> None:
        num_decodes = next((i for i, part in enumerate(parts) if part.num_rows > 1), len(parts))
        self._decodes = _DecodeRows(parts[:num_decodes], device) if num_decodes else None
        self._chunks = [(part, _Context(_context_of(part), device)) for part in parts[num_decodes:]]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """Attention output [num_tokens, num_heads × head_dim].

        `q` [num_tokens, num_heads, head_dim], `k` and `v` [num_tokens, kv_heads, head_dim] are the step's, already written
        to the caches [slots, kv_heads, head_dim].
        """
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])
        by_head = k_cache.transpose(0, 1).unsqueeze(0), v_cache.transpose(0, 1).unsqueeze(0)
        outputs = [self._decodes.attend(grouped, *by_head)] if self._decodes is not None else []
        for part, context in self._chunks:
            rows = slice(part.first_row, part.first_row + part.num_rows)
            outputs.append(_attend_chunk(grouped[rows], k[rows], v[rows], context, *by_head))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _context_of(part: AttentionPart) -> Sequence[Run]:
    """What the part reads unmasked: all before its rows; for a single row its own key too, so that there is something."""
    return part.slots if part.num_rows == 1 else cut_runs(part.slots, part.num_before)


class _Context:
    """Cached tokens of one sequence: runs that are read in place, or the slots to gather if there are too many."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        self._runs = runs
        self._slots: torch.Tensor | None = None
        if len(runs) > MAX_RUNS_IN_PLACE:
            self._slots = torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs])

    def views(self, cache: torch.Tensor) -> list[torch.Tensor]:
        """Parts of `cache` [1, kv_heads, slots, head_dim], together the context."""
        if self._slots is not None:
            return [cache[:, :, self._slots]]
        return [cache.narrow(2, run.start, run.length) for run in self._runs]

    def partials(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> list[Partial]:
        """Unmasked attention of `q` [1, kv_heads, rows, head_dim] to each view."""
        views = zip(self.views(k_cache), self.views(v_cache), strict=True)
        return [flash(q, keys, values, causal=False) for keys, values in views]


class _DecodeRows:
    """The leading rows of a step, one per decoding sequence."""

    def __init__(self, parts: Sequence[AttentionPart], device: torch.device) -> None:
        self._num_rows = len(parts)
        shared, own_runs = split_shared([part.slots for part in parts])
        self._shared = [(torch.tensor(rows, device=device), run) for rows, run in shared]
        self._own = [_Context(own, device) for own in own_runs]

    def attend(self, grouped: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        queries = grouped[: self._num_rows]
        own = [
            merge(context.partials(query, k_cache, v_cache))
            for context, query in zip(self._own, queries.unsqueeze(1), strict=True)
        ]
        out = torch.cat([partial[0] for partial in own])
        if self._shared:
            lse = torch.cat([partial[1] for partial in own])
            for rows, run in self._shared:
                keys, values = k_cache.narrow(2, run.start, run.length), v_cache.narrow(2, run.start, run.length)
                shared = _attend_unmasked(queries[rows], keys, values)
                out[rows], lse[rows] = merge([(out[rows], lse[rows]), shared])
        return out.view(self._num_rows, -1)


def _attend_unmasked(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
    """`queries` [rows, kv_heads, group, head_dim] over the same keys; results by row."""
    rows, kv_heads, group, head_dim = queries.shape
    folded = queries.permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, head_dim)
    out, lse = flash(folded, keys, values, causal=False)
    return out.view(kv_heads, group, rows, head_dim).permute(2, 0, 1, 3), lse.view(kv_heads, group, rows).permute(
        2, 0, 1
    )


def _attend_chunk(
    grouped: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: _Context,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """A prompt chunk: unmasked over its context, causal over its own keys.

    Returns [rows, num_heads × head_dim].
    """
    queries = grouped.permute(1, 2, 0, 3)  # [kv_heads, group, rows, head_dim]
    folded = queries.reshape(1, queries.shape[0], -1, queries.shape[3])
    partials = [
        (out.view(queries.shape), lse.view(queries.shape[:3]))
        for out, lse in context.partials(folded, k_cache, v_cache)
    ]
    if grouped.shape[0] > 1:
        own_keys, own_values = (heads.transpose(0, 1).unsqueeze(1).expand(queries.shape) for heads in (k, v))
        partials.append(flash(queries, own_keys, own_values, causal=True))
    merged, _ = merge(partials)
    return merged.permute(2, 0, 1, 3).reshape(grouped.shape[0], -1)
