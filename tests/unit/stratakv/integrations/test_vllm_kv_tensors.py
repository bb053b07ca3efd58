"""Blocks of vLLM's tensors as byte ranges, for every order in which their axes can lie."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratakv.errors import SetupError
from stratakv.integrations.vllm.kv_tensors import RUNS_MAX, layer_tensors, layout_of
from stratakv.integrations.vllm.options import parse_options

ORDERS = [(0, *(axis + 1 for axis in order)) for order in permutations(range(3))]


def tensors(shape: tuple[int, ...], order: tuple[int, ...], layers: int) -> dict[str, torch.Tensor]:
    """One storage for all layers; each layer's axes lie in `order`."""
    storage = torch.arange(layers * math.prod(shape), dtype=torch.int32)
    parts = storage.view(layers, *(shape[axis] for axis in order))
    back = [order.index(axis) for axis in range(4)]
    return {f"layer.{n}": parts[n].permute(back) for n in range(layers)}


@given(
    shape=st.tuples(*(st.integers(1, 5) for _ in range(4))),
    order=st.sampled_from(ORDERS),
    layers=st.integers(1, 3),
    split=st.sampled_from((1, 2)),
)
def test_the_runs_of_a_block_are_exactly_its_bytes(
    shape: tuple[int, int, int, int], order: tuple[int, ...], layers: int, split: int
) -> None:
    caches = tensors((shape[0] * split, *shape[1:]), order, layers)
    found = layer_tensors(caches, shape[0])
    assert [layer.names for layer in found] == [(name,) for name in caches]
    for layer, cache in zip(found, caches.values(), strict=True):
        for block in range(shape[0]):
            runs = [layer.storage[at : at + run.size] for run in layer.runs for at in [run.start + block * run.stride]]
            expected = cache[block * split : (block + 1) * split].flatten()
            assert torch.equal(torch.cat(runs).view(torch.int32).sort().values, expected.sort().values)
    layout = layout_of(found, 16, "int32", 0, 0, 0)
    assert layout.data_bytes == layers * split * math.prod(shape[1:]) * 4


def test_layers_that_share_a_tensor_are_one() -> None:
    caches = tensors((4, 2, 8, 4), (0, 1, 2, 3), 2)
    caches["drafter"] = caches["layer.1"]
    assert [layer.names for layer in layer_tensors(caches, 4)] == [("layer.0",), ("layer.1", "drafter")]


def test_a_tensor_that_does_not_begin_with_blocks_is_refused() -> None:
    with pytest.raises(SetupError, match="first axis"):
        layer_tensors({"layer": torch.zeros(2, 7, 4)}, 7)


def test_a_block_in_too_many_pieces_is_refused() -> None:
    scattered = torch.zeros(RUNS_MAX + 1, 4, 2).permute(1, 0, 2)
    with pytest.raises(SetupError, match="pieces"):
        layer_tensors({"layer": scattered}, 4)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"meta_server": "tcp://127.0.0.1:1"}, "meta_server"),
        ({"load": "sometimes"}, "load"),
        ({"load_timeout_s": 0}, "load_timeout_s"),
        ({"namespace_id": "abc"}, "namespace_id"),
    ],
)
def test_a_wrong_key_is_refused_by_name(extra: dict[str, object], named: str) -> None:
    with pytest.raises(SetupError, match=named):
        parse_options(extra)
