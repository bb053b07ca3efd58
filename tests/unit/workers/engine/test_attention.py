"""Attention over the paged cache equals attention over the plain sequence, wherever the blocks lie."""

from __future__ import annotations

import pytest
import torch

from workers.engine.attention_parts import AttentionPart
from workers.engine.block_table import BlockTable
from workers.engine.flash import exact, flash
from workers.engine.torch_attention import MAX_RUNS_IN_PLACE, TorchAttention

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 8, 4
CPU = torch.device("cpu")


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Last rows of plain causal attention; q [rows, HEADS, DIM], k and v [tokens, KV_HEADS, DIM]."""
    rows, tokens, group = q.shape[0], k.shape[0], HEADS // KV_HEADS
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * DIM**-0.5
    visible = torch.arange(tokens) <= torch.arange(tokens - rows, tokens).unsqueeze(1)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).reshape(rows, -1)


def run_step(tables: list[list[int]], lengths: list[tuple[int, int]], shared: int = 0) -> None:
    """Sequences of (tokens before, new tokens) on the given blocks; the first `shared` tokens are one prefix."""
    generator = torch.Generator().manual_seed(5)
    k_cache, v_cache = (torch.full((64 * BLOCK, KV_HEADS, DIM), float("nan")) for _ in range(2))
    parts, queries, new_k, new_v, expected = [], [], [], [], []
    prefix = torch.randn(2, shared, KV_HEADS, DIM, generator=generator)
    for blocks, (before, new) in zip(tables, lengths, strict=True):
        table = BlockTable(BLOCK)
        table.extend(blocks)
        kv = torch.randn(2, before + new, KV_HEADS, DIM, generator=generator)
        kv[:, :shared] = prefix
        q = torch.randn(new, HEADS, DIM, generator=generator)
        at = 0
        for run in table.slot_runs(0, before + new):
            k_cache[run.start : run.stop] = kv[0, at : at + run.length]
            v_cache[run.start : run.stop] = kv[1, at : at + run.length]
            at += run.length
        slots = table.slot_runs(0, before + new)
        parts.append(AttentionPart(sum(len(q) for q in queries), new, tuple(slots)))
        queries.append(q)
        new_k.append(kv[0, before:])
        new_v.append(kv[1, before:])
        expected.append(reference(q, kv[0], kv[1]))
    plan = TorchAttention(parts, CPU)
    out = plan.attend(torch.cat(queries), torch.cat(new_k), torch.cat(new_v), k_cache, v_cache)
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-5)


SCATTERED = list(range(1, 4 * MAX_RUNS_IN_PLACE, 2))


@pytest.mark.parametrize(
    ("tables", "lengths"),
    [
        pytest.param([[3, 4, 5]], [(0, 11)], id="prompt"),
        pytest.param([[3, 4, 5]], [(5, 6)], id="second chunk"),
        pytest.param([[9, 2, 3, 7]], [(7, 8)], id="second chunk over several runs"),
        pytest.param([SCATTERED], [(20, 9)], id="second chunk over scattered blocks"),
        pytest.param([[3], [4]], [(0, 1), (0, 1)], id="first tokens"),
        pytest.param([[3, 4], [10, 5]], [(6, 1), (5, 1)], id="decodes"),
        pytest.param([SCATTERED, [60, 61]], [(30, 1), (5, 1)], id="decode over scattered blocks"),
        pytest.param([[3, 4], [8, 9], [20, 21, 22]], [(6, 1), (0, 5), (5, 1)], id="decode, prompt, single token"),
    ],
)
def test_paged_attention_equals_plain_attention(tables: list[list[int]], lengths: list[tuple[int, int]]) -> None:
    run_step(tables, lengths)


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param([[1, 2, 3, 4], [1, 2, 9], [1, 2, 20, 21]], id="one continues in place"),
        pytest.param([[5, 2, 3, 4], [5, 2, 9], [5, 2, 20, 21]], id="prefix in two runs"),
    ],
)
def test_decodes_that_share_a_prefix_read_it_together(tables: list[list[int]]) -> None:
    run_step([*tables, [40, 41, 42]], [(14, 1), (9, 1), (12, 1), (10, 1)], shared=8)


@pytest.mark.parametrize("causal", [True, False])
def test_plain_operations_equal_the_kernel(causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 7, DIM, generator=generator) for _ in range(3))
    torch.testing.assert_close(exact(q, k, v, causal=causal), flash(q, k, v, causal=causal))
