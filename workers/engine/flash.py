"""Attention kernels that also return the log-sum-exp, by which results over disjoint keys can be merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention output [..., head_dim] and log-sum-exp [...] over some of the keys."""


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> Partial:
    """Scaled dot-product attention; q, k, v [batch, heads, tokens, head_dim] with as many heads each."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse
    return exact(q, k, v, causal=causal)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> Partial:
    """The same in plain operations, for devices whose kernels do not give the log-sum-exp for every shape."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype)
    return torch.matmul(weights, v), lse


def merge(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint keys from the attention over each."""
    out, lse = partials[0]
    if len(partials) == 1:
        return out, lse
    merged = out.float()
    for other, other_lse in partials[1:]:
        merged = torch.lerp(merged, other.float(), torch.sigmoid(other_lse - lse).unsqueeze(-1))
        lse = torch.logaddexp(lse, other_lse)
    return merged.to(out.dtype), lse
