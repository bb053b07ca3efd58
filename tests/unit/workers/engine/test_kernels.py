"""The kernels compute what torch computes, wherever blocks lie and whatever is in their other slots."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from stratakv.config import NATIVE_ENV
from tests.unit.workers.engine.harness import TINY, prompt, save_tiny
from workers.engine import kernels
from workers.engine.attention_parts import AttentionPart
from workers.engine.block_table import BlockTable, Run
from workers.engine.config import EngineDtype
from workers.engine.forward_batch import ForwardBatch
from workers.engine.head import NativeHead, make_head
from workers.engine.kv_cache import KVCache
from workers.engine.linear import Linear
from workers.engine.model import Model
from workers.engine.model_config import ModelConfig
from workers.engine.native_step import NativeStep
from workers.engine.rope import RopeConfig, RotaryEmbedding
from workers.engine.step_ops import HeadNorms, StepOps
from workers.engine.torch_step import TorchStep

pytestmark = pytest.mark.skipif(not kernels.is_supported(), reason="without AMX, or the kernels were not built")

CPU = torch.device("cpu")
NUM_BLOCKS = 96
SHAPE = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=160,
    max_model_len=2048,
    rms_norm_eps=1e-5,
    rope=RopeConfig(64, 10000.0),
    tied_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    eos_token_ids=frozenset(),
)


@dataclass(frozen=True)
class Tokens:
    """Of one sequence: in the cache already, in this step, and leading blocks shared with the first sequence."""

    before: int
    new: int
    shared_blocks: int = 0


def shape(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    rope = RopeConfig(head_dim, 10000.0)
    return replace(SHAPE, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope)


def step_of(sequences: list[Tokens], block_size: int) -> ForwardBatch:
    """A step over the sequences, on scattered blocks."""
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(len(sequences))).tolist()
    parts: list[AttentionPart] = []
    writes: list[Run] = []
    positions: list[int] = []
    common: list[int] = []
    for tokens in sorted(sequences, key=lambda each: each.new > 1):
        table, total = BlockTable(block_size), tokens.before + tokens.new
        table.extend(common[: min(tokens.shared_blocks, tokens.before // block_size)])
        table.extend([free.pop() for _ in range(-(-total // block_size) - len(table.blocks))])
        common = common or table.blocks[: tokens.before // block_size]
        parts.append(AttentionPart(len(positions), tokens.new, tuple(table.slot_runs(0, total))))
        writes += table.slot_runs(tokens.before, total)
        positions += range(tokens.before, total)
    return ForwardBatch([0] * len(positions), positions, writes, parts, [0])


@dataclass
class Layer:
    """What a layer's attention works on."""

    heads: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def run(self, ops: StepOps, norms: HeadNorms | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention output, and the caches after it."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        for rows in ops.slices:
            ops.rotate_write(self.heads[rows], rows, norms, k_cache, v_cache)
        return ops.attend(k_cache, v_cache), k_cache, v_cache


def random_layer(config: ModelConfig, batch: ForwardBatch, block_size: int) -> Layer:
    """Random tensors; slots that no sequence has written hold NaN, as garbage of the worst kind."""
    generator = torch.Generator().manual_seed(7)
    rows, all_heads = len(batch.positions), config.num_heads + 2 * config.num_kv_heads
    heads = (torch.randn(rows, all_heads, config.head_dim, generator=generator) * 2).bfloat16()
    caches = torch.randn(
        2, NUM_BLOCKS * block_size, config.num_kv_heads, config.head_dim, generator=generator
    ).bfloat16()
    written = torch.zeros(caches.shape[1], dtype=torch.bool)
    for part in batch.parts:
        for run in part.slots:
            written[run.start : run.stop] = True
    caches[:, ~written] = float("nan")
    return Layer(heads, caches[0], caches[1])


def assert_alike(config: ModelConfig, batch: ForwardBatch, block_size: int, norms: HeadNorms | None = None) -> None:
    """The kernels are about as near to torch in fp32 as torch in bf16 is."""
    layer, rope = random_layer(config, batch, block_size), RotaryEmbedding(config.rope, config.max_model_len, CPU)
    out, k_cache, v_cache = layer.run(NativeStep(config, batch, rope), norms)
    rounded, _, _ = layer.run(TorchStep(config, torch.bfloat16, batch, rope), norms)
    exact_layer = Layer(layer.heads.float(), layer.k_cache.float(), layer.v_cache.float())
    exact, exact_k, exact_v = exact_layer.run(TorchStep(config, torch.float32, batch, rope), norms)
    usual = (rounded - exact).abs()
    assert ((out - exact).abs() <= 2 * usual.amax(dim=1, keepdim=True) + 0.01).all()
    assert (out - exact).abs().mean() <= 1.2 * usual.mean() + 1e-3
    torch.testing.assert_close(k_cache.float(), exact_k, rtol=0.01, atol=0.01, equal_nan=True)
    torch.testing.assert_close(v_cache.float(), exact_v, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 32), (14, 2, 128), (20, 1, 96)])
def test_attention_equals_that_of_torch(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    sequences = [
        Tokens(37, 1),
        Tokens(0, 1),
        Tokens(700, 1),
        Tokens(64, 1, 4),
        Tokens(0, 70),
        Tokens(300, 55),
        Tokens(5, 3),
    ]
    assert_alike(shape(num_heads, num_kv_heads, head_dim), step_of(sequences, block_size), block_size)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.builds(Tokens, st.integers(0, 150), st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=8))
def test_any_mix_of_sequences_is_attended_to_rightly(sequences: list[Tokens]) -> None:
    assert_alike(shape(6, 2, 32), step_of(sequences, 16), 16)


def test_decodes_with_a_long_shared_prefix_equal_those_of_torch() -> None:
    sequences = [Tokens(600 + i, 1, 36) for i in range(9)]
    assert_alike(shape(9, 3, 64), step_of(sequences, 16), 16)


def test_a_step_of_several_slices_equals_that_of_torch() -> None:
    assert_alike(shape(2, 1, 32), step_of([Tokens(9, 1), Tokens(30, 700), Tokens(0, 500)], 16), 16)


def test_norms_of_heads_equal_those_of_torch() -> None:
    config = shape(6, 2, 64)
    norms = HeadNorms(torch.rand(64) + 0.5, torch.rand(64) + 0.5)
    assert_alike(config, step_of([Tokens(20, 1), Tokens(3, 30)], 16), 16, norms)


def test_a_value_that_is_no_number_spoils_its_own_sequence_only() -> None:
    config, batch = shape(6, 2, 64), step_of([Tokens(40, 1), Tokens(50, 1), Tokens(10, 60)], 16)
    layer, rope = random_layer(config, batch, 16), RotaryEmbedding(config.rope, 256, CPU)
    layer.heads[1] = float("nan")
    out, _, _ = layer.run(NativeStep(config, batch, rope))
    assert out[1].isnan().all()
    assert not out[0].isnan().any()
    assert not out[2:].isnan().any()


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_the_operations_between_products_equal_those_of_torch(rows: int) -> None:
    batch, rope = step_of([Tokens(0, 1)], 16), RotaryEmbedding(SHAPE.rope, 16, CPU)
    native, plain = NativeStep(SHAPE, batch, rope), TorchStep(SHAPE, torch.bfloat16, batch, rope)
    generator = torch.Generator().manual_seed(3)
    hidden, added = torch.randn(2, rows, 576, generator=generator) * 3
    weight, gate_up = torch.rand(576) + 0.5, (torch.randn(rows, 192, generator=generator) * 6).bfloat16()
    ours, theirs = hidden.clone(), hidden.clone()
    normed, expected = (
        ops.add_norm(stream, added.bfloat16(), weight) for ops, stream in ((native, ours), (plain, theirs))
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(normed, expected, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(native.gated(gate_up), plain.gated(gate_up), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_head_is_as_exact_as_one_in_fp32(rows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = (torch.randn(1040, 576, generator=generator) * 0.05).bfloat16().float()
    hidden = torch.randn(rows, 576, generator=generator)
    head = make_head(weight)
    assert isinstance(head, NativeHead)
    exact = hidden.double() @ weight.double().T
    assert (head(hidden) - exact).abs().max() <= 2 * (Linear(weight)(hidden) - exact).abs().max()


def test_a_head_that_bf16_would_round_stays_in_fp32() -> None:
    assert isinstance(make_head(torch.rand(32, 64)), Linear)


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**{**TINY, "head_dim": 32}),
    "qwen3": Qwen3Config(**TINY, head_dim=64),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_bf16_gives_the_same_logits_with_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    directory, token_ids = save_tiny(tmp_path, CONFIGS[name]), prompt(7, 90)
    with_kernels = logits(directory, token_ids, EngineDtype.BF16)
    monkeypatch.setenv(NATIVE_ENV, "0")
    without = logits(directory, token_ids, EngineDtype.BF16)
    exact = logits(directory, token_ids, EngineDtype.FP32)
    assert not torch.equal(with_kernels, without)
    assert (with_kernels - exact).abs().mean() < 1.2 * (without - exact).abs().mean()


def logits(directory: Path, token_ids: list[int], dtype: EngineDtype) -> torch.Tensor:
    """Of every token, prefilled in two chunks."""
    model = Model(directory, dtype, CPU)
    cache, half, whole = KVCache(model.facts, 16, 16, CPU), len(token_ids) // 2, len(token_ids)
    found = []
    for start, stop in ((0, half), (half, whole)):
        part = AttentionPart(0, stop - start, (Run(0, stop),))
        rows = list(range(stop - start))
        batch = ForwardBatch(token_ids[start:stop], list(range(start, stop)), [Run(start, stop - start)], [part], rows)
        found.append(model.forward(batch, cache, NoHooks()))
    return torch.cat(found)


class NoHooks:
    def before_attention(self, layer: int) -> None:
        pass

    def after_write(self, layer: int) -> None:
        pass


@pytest.mark.parametrize(
    ("segment", "why"),
    [
        pytest.param(([5], [0, 16], -1), "outside the step", id="row"),
        pytest.param(([0], [8, 16], -1), "whole groups", id="run in the middle of a group"),
        pytest.param(([0], [0, -3], -1), "run of slots", id="length"),
        pytest.param(([0, 1], [0, 16], 15), "more keys than there are", id="causal"),
        pytest.param(([], [0, 16], -1), "needs rows", id="nobody"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(segment: tuple[list[int], list[int], int], why: str) -> None:
    rows, runs, causal_from = segment
    with pytest.raises(ValueError, match=why):
        kernels.make_plan(6, 2, 64, 2, 1, [(array("i", rows), array("q", runs), causal_from)])
