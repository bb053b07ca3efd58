"""The kernels compute what torch computes, wherever blocks lie and whatever is in their other slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from stratakv.config import NATIVE_ENV
from tests.unit.workers.engine.harness import TINY, prompt, save_tiny
from workers.engine import kernels
from workers.engine.attention_parts import AttentionPart
from workers.engine.block_table import BlockTable, Run
from workers.engine.config import EngineDtype
from workers.engine.forward_batch import ForwardBatch
from workers.engine.head import NativeHead, make_head
from workers.engine.kv_cache import KVCache
from workers.engine.layer_weights import HeadNorms, LayerWeights, LinearWeights
from workers.engine.layers import ModelTables
from workers.engine.linear import Linear
from workers.engine.model import Model
from workers.engine.model_config import ModelConfig
from workers.engine.native_layers import NativeLayers
from workers.engine.rope import RopeConfig, RotaryEmbedding
from workers.engine.torch_layers import TorchLayers

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
    token_ids = [(17 * i + 3) % SHAPE.vocab_size for i in range(len(positions))]
    return ForwardBatch(token_ids, positions, writes, parts, list(range(len(positions))))


def random_weights(config: ModelConfig, *, bias: bool = False, norms: HeadNorms | None = None) -> LayerWeights:
    """Of one layer, in bf16 as a model file may have them."""
    generator = torch.Generator().manual_seed(5)
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    all_heads = heads + 2 * config.num_kv_heads * config.head_dim

    def product(outputs: int, inputs: int) -> LinearWeights:
        weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        added = torch.randn(outputs, generator=generator).bfloat16() if bias else None
        return LinearWeights(weight.bfloat16(), added)

    def norm() -> torch.Tensor:
        return torch.rand(hidden, generator=generator) + 0.5

    qkv = product(all_heads, hidden)
    qkv.weight.mul_(2)  # Scores far enough apart that a wrong key shows.
    output, gate_up, down = product(hidden, heads), product(2 * inner, hidden), product(hidden, inner)
    return LayerWeights(norm(), qkv, norms, output, norm(), gate_up, down)


def in_fp32(weights: LayerWeights) -> LayerWeights:
    def product(linear: LinearWeights) -> LinearWeights:
        return LinearWeights(linear.weight.float(), None if linear.bias is None else linear.bias.float())

    products = {name: product(getattr(weights, name)) for name in ("qkv", "output", "gate_up", "down")}
    return replace(weights, **products)


class Caches:
    """K and V of one layer. Slots that no sequence has written hold NaN, as garbage of the worst kind."""

    def __init__(self, config: ModelConfig, batch: ForwardBatch, block_size: int) -> None:
        generator = torch.Generator().manual_seed(7)
        slots = (NUM_BLOCKS * block_size, config.num_kv_heads, config.head_dim)
        both = torch.randn(2, *slots, generator=generator).bfloat16()
        written = torch.zeros(slots[0], dtype=torch.bool)
        for part in batch.parts:
            for run in part.slots:
                written[run.start : run.stop] = True
        both[:, ~written] = float("nan")
        blocks = both.view(2, NUM_BLOCKS, block_size, *slots[1:])
        self.k, self.v = [blocks[0].clone()], [blocks[1].clone()]

    def in_fp32(self) -> Caches:
        self.k, self.v = [self.k[0].float()], [self.v[0].float()]
        return self


class Hooks:
    """Of a step with transfers, or without."""

    def __init__(self, *, is_idle: bool) -> None:
        self.is_idle = is_idle
        self.calls: list[tuple[str, int]] = []

    def before_attention(self, layer: int) -> None:
        self.calls.append(("before attention", layer))

    def after_write(self, layer: int) -> None:
        self.calls.append(("after write", layer))


def tables(config: ModelConfig, dtype: torch.dtype) -> ModelTables:
    generator = torch.Generator().manual_seed(9)
    embedding = torch.randn(config.vocab_size, config.hidden_size, generator=generator).bfloat16()
    norm = torch.rand(config.hidden_size, generator=generator) + 0.5
    return ModelTables(embedding.to(dtype), norm, RotaryEmbedding(config.rope, config.max_model_len, CPU))


def assert_alike(
    config: ModelConfig, batch: ForwardBatch, block_size: int, weights: LayerWeights | None = None
) -> None:
    """The kernels are about as near to torch in fp32 as torch in bf16 is, over a whole layer."""
    weights, bf16 = weights or random_weights(config), tables(config, torch.bfloat16)
    caches = Caches(config, batch, block_size), Caches(config, batch, block_size), Caches(config, batch, block_size)
    idle = Hooks(is_idle=True)
    out = NativeLayers(config, bf16, [weights]).forward(batch, caches[0], idle)
    rounded = TorchLayers(config, bf16, [weights]).forward(batch, caches[1], idle)
    exact_layers = TorchLayers(config, tables(config, torch.float32), [in_fp32(weights)])
    exact = exact_layers.forward(batch, caches[2].in_fp32(), idle)
    usual = (rounded - exact).abs()
    assert ((out - exact).abs() <= 2 * usual.amax(dim=1, keepdim=True) + 0.01).all()
    assert (out - exact).abs().mean() <= 1.2 * usual.mean() + 1e-3
    for ours, theirs in ((caches[0].k, caches[2].k), (caches[0].v, caches[2].v)):
        torch.testing.assert_close(ours[0].float(), theirs[0], rtol=0.02, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 32), (14, 2, 128), (20, 1, 96)])
def test_a_layer_equals_that_of_torch(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
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
def test_any_mix_of_sequences_is_computed_rightly(sequences: list[Tokens]) -> None:
    assert_alike(shape(6, 2, 32), step_of(sequences, 16), 16)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 70), st.booleans())
def test_any_shape_of_products_is_computed_rightly(hidden: int, inner: int, rows: int, bias: bool) -> None:
    config = replace(shape(2, 1, 32), hidden_size=32 * hidden, intermediate_size=32 * inner)
    assert_alike(config, step_of([Tokens(0, rows)], 16), 16, random_weights(config, bias=bias))


def test_decodes_with_a_long_shared_prefix_equal_those_of_torch() -> None:
    sequences = [Tokens(600 + i, 1, 36) for i in range(9)]
    assert_alike(shape(9, 3, 64), step_of(sequences, 16), 16)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [255, 512, 801])
def test_a_step_of_several_blocks_of_rows_equals_that_of_torch(rows: int, num_threads: int) -> None:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_alike(shape(2, 1, 32), step_of([Tokens(9, 1), Tokens(30, rows)], 16), 16)
    finally:
        torch.set_num_threads(threads_before)


def test_norms_of_heads_equal_those_of_torch() -> None:
    config = shape(6, 2, 64)
    norms = HeadNorms(torch.rand(64) + 0.5, torch.rand(64) + 0.5)
    assert_alike(config, step_of([Tokens(20, 1), Tokens(3, 30)], 16), 16, random_weights(config, norms=norms))


@pytest.mark.parametrize("new", [1, 300])
def test_a_value_that_is_no_number_spoils_its_own_sequence_only(new: int) -> None:
    config, batch = shape(6, 2, 64), step_of([Tokens(40, 1), Tokens(50, 1), Tokens(10, new)], 16)
    given = tables(config, torch.bfloat16)
    given.embedding[7] = float("nan")
    batch.token_ids[:] = [7 if row == 1 else 3 for row in range(len(batch.token_ids))]
    out = NativeLayers(config, given, [random_weights(config)]).forward(
        batch, Caches(config, batch, 16), Hooks(is_idle=True)
    )
    assert out[1].isnan().all()
    assert not out[0].isnan().any()
    assert not out[2:].isnan().any()


def test_layers_are_told_of_in_order_and_the_result_is_the_same_as_without() -> None:
    config = replace(shape(2, 1, 32), num_layers=3)
    batch, weights = step_of([Tokens(20, 1), Tokens(5, 40)], 16), random_weights(config)
    layers = NativeLayers(config, tables(config, torch.bfloat16), [weights] * 3)
    results, hooks = [], [Hooks(is_idle=True), Hooks(is_idle=False)]
    for each in hooks:
        caches = Caches(config, batch, 16)
        caches.k, caches.v = caches.k * 3, caches.v * 3
        results.append(layers.forward(batch, caches, each))
    assert torch.equal(*results)
    assert hooks[0].calls == []
    assert hooks[1].calls == [(what, i) for i in range(3) for what in ("after write", "before attention")]


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
    "llama, biases": LlamaConfig(**{**TINY, "head_dim": 32}, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**{**TINY, "head_dim": 32}),
    "qwen2": Qwen2Config(**{**TINY, "hidden_size": 128}),
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


@pytest.mark.parametrize(
    ("config", "block_size"),
    [
        pytest.param(LlamaConfig(**{**TINY, "head_dim": 32}), 8, id="blocks of half a group"),
        pytest.param(LlamaConfig(**{**TINY, "head_dim": 16}), 16, id="heads of half a product"),
        pytest.param(LlamaConfig(**{**TINY, "head_dim": 32, "intermediate_size": 80}), 16, id="an inner part of 80"),
    ],
)
def test_what_the_kernels_do_not_take_is_computed_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: PretrainedConfig, block_size: int
) -> None:
    directory, token_ids = save_tiny(tmp_path, config), prompt(7, 60)
    found = logits(directory, token_ids, EngineDtype.BF16, block_size)
    monkeypatch.setenv(NATIVE_ENV, "0")
    torch.testing.assert_close(found, logits(directory, token_ids, EngineDtype.BF16, block_size), rtol=1e-4, atol=1e-4)


def test_what_the_machine_can_do_is_measured() -> None:
    bounds = kernels.measure_bounds(1)
    assert bounds.bytes_per_s > 1e8
    assert bounds.operations_per_s > 1e10


def test_more_layers_than_a_stack_has_are_refused() -> None:
    config = shape(2, 1, 32)
    with pytest.raises(ValueError, match="all layers have been added"):
        NativeLayers(config, tables(config, torch.bfloat16), [random_weights(config)] * 2)


def test_more_wanted_rows_than_rows_are_refused() -> None:
    config, batch = shape(2, 1, 32), step_of([Tokens(0, 2)], 16)
    layers = NativeLayers(config, tables(config, torch.bfloat16), [random_weights(config)])
    with pytest.raises(ValueError, match="not a step"):
        layers.forward(replace(batch, logit_rows=[1] * 3), Caches(config, batch, 16), Hooks(is_idle=True))


def test_a_step_before_all_layers_are_there_is_refused() -> None:
    config, batch = replace(shape(2, 1, 32), num_layers=2), step_of([Tokens(0, 2)], 16)
    layers = NativeLayers(config, tables(config, torch.bfloat16), [random_weights(config)])
    with pytest.raises(ValueError, match="not all layers"):
        layers.forward(batch, Caches(config, batch, 16), Hooks(is_idle=True))


def logits(directory: Path, token_ids: list[int], dtype: EngineDtype, block_size: int = 16) -> torch.Tensor:
    """Of every token, prefilled in two chunks."""
    model = Model(directory, dtype, CPU, block_size=block_size)
    cache, half, whole = KVCache(model.facts, 16, block_size, CPU), len(token_ids) // 2, len(token_ids)
    found = []
    for start, stop in ((0, half), (half, whole)):
        part = AttentionPart(0, stop - start, (Run(0, stop),))
        rows = list(range(stop - start))
        batch = ForwardBatch(token_ids[start:stop], list(range(start, stop)), [Run(start, stop - start)], [part], rows)
        found.append(model.forward(batch, cache, Hooks(is_idle=True)))
    return torch.cat(found)


def begin_step(layers: NativeLayers, parts: list[AttentionPart], token_ids: list[int], caches: Caches) -> None:
    positions = list(range(len(token_ids)))
    batch = ForwardBatch(token_ids, positions, [Run(0, len(token_ids))], parts, [0])
    layers.forward(batch, caches, Hooks(is_idle=True))


@pytest.mark.parametrize(
    ("part", "token_id", "why"),
    [
        pytest.param(AttentionPart(1, 2, (Run(0, 16),)), 1, "outside the step", id="row"),
        pytest.param(AttentionPart(0, 2, (Run(8, 16),)), 1, "whole groups", id="run in the middle of a group"),
        pytest.param(AttentionPart(0, 2, (Run(0, -3),)), 1, "run of slots", id="length"),
        pytest.param(AttentionPart(0, 2, ()), 1, "needs rows and keys", id="no keys"),
        pytest.param(AttentionPart(0, 2, (Run(16 * NUM_BLOCKS, 2),)), 1, "outside the cache", id="slots"),
        pytest.param(AttentionPart(0, 2, (Run(0, 16),)), 999, "token ids are out of range", id="token"),
    ],
)
def test_a_step_that_cannot_be_is_refused(part: AttentionPart, token_id: int, why: str) -> None:
    config, batch = shape(6, 2, 64), step_of([Tokens(0, 2)], 16)
    layers = NativeLayers(config, tables(config, torch.bfloat16), [random_weights(config)])
    with pytest.raises(ValueError, match=why):
        begin_step(layers, [part], [token_id, 1], Caches(config, batch, 16))
