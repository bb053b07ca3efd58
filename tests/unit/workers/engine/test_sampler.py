"""A draw depends on (seed, index) alone and follows the filtered distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.engine.requests import SamplingParams
from workers.engine.sampler import SampleRow, sample, uniform

seeds = st.integers(0, 2**32)
LOGITS = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))


def draws(count: int, logits: torch.Tensor = LOGITS, seed: int = 3, **how: Any) -> Counter[int]:
    rows = [SampleRow(SamplingParams(max_tokens=1, **how), seed, index) for index in range(count)]
    samples = sample(logits.expand(count, -1), rows)
    return Counter(drawn.token_id for drawn in samples if drawn is not None)


def test_draws_follow_the_probabilities() -> None:
    counts = draws(4000)
    for token, probability in enumerate(LOGITS.exp().tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.81}, {1, 2, 3}),
        ({"min_p": 0.5}, {1, 3}),
        ({"top_k": 1, "temperature": 5.0}, {1}),
        ({"temperature": 1e-6}, {1}),
        ({"top_p": 1e-9}, {1}),
    ],
)
def test_filters_leave_only_the_likeliest(how: dict[str, Any], allowed: set[int]) -> None:
    assert set(draws(300, **how)) == allowed


FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.1, 0.7, 1.5]),
        "top_k": st.sampled_from([1, 5, 40, 700]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.97]),
        "min_p": st.sampled_from([0.001, 0.02, 0.3]),
    },
)


def by_transformers(logits: torch.Tensor, how: dict[str, Any]) -> torch.Tensor:
    """Probabilities after transformers' filters, in its order."""
    filters = LogitsProcessorList([TemperatureLogitsWarper(how.get("temperature", 1.0))])
    if "top_k" in how:
        filters.append(TopKLogitsWarper(how["top_k"]))
    if "top_p" in how:
        filters.append(TopPLogitsWarper(how["top_p"]))
    if "min_p" in how:
        filters.append(MinPLogitsWarper(how["min_p"]))
    return torch.softmax(filters(torch.zeros(1, 1, dtype=torch.long), logits.unsqueeze(0)), dim=-1)[0]


@given(vocab_size=st.sampled_from([3, 200, 2000]), spread=st.sampled_from([0.2, 2.0, 6.0]), seed=seeds, how=FILTERS)
@example(vocab_size=2000, spread=2.0, seed=0, how={"top_k": 700, "top_p": 0.9})
def test_any_filters_leave_what_transformers_leaves(
    vocab_size: int, spread: float, seed: int, how: dict[str, Any]
) -> None:
    """Each draw is the token at which transformers' probabilities, likeliest first, pass its number."""
    logits = torch.randn(vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread
    expected, token_ids = torch.sort(by_transformers(logits, how), descending=True)
    passed = torch.cumsum(expected, 0)
    rows = [SampleRow(SamplingParams(max_tokens=1, **how), seed, index) for index in range(40)]
    for drawn, row in zip(sample(logits.expand(40, -1), rows), rows, strict=True):
        assert drawn is not None
        rank = int((token_ids == drawn.token_id).nonzero())
        assert expected[rank] > 0
        if how.keys() - {"temperature"}:
            point = uniform(seed, row.index)
            assert passed[rank] - expected[rank] - 1e-9 <= point <= passed[rank] + 1e-9


def test_a_nucleus_larger_than_the_candidates_is_exact() -> None:
    flat = torch.zeros(3000)
    assert len(draws(3000, flat, top_p=0.999)) > 1500


def test_a_draw_is_the_same_in_any_batch() -> None:
    row = SampleRow(SamplingParams(max_tokens=1), seed=5, index=17)
    other = SampleRow(SamplingParams(max_tokens=1), seed=6, index=2)
    alone = sample(LOGITS.unsqueeze(0), [row])
    assert sample(LOGITS.expand(2, -1), [other, row])[1:] == alone


def test_uniform_numbers_differ_by_seed_and_index() -> None:
    numbers = {uniform(seed, index) for seed in (0, 1, -1, 2**70) for index in range(100)}
    assert len(numbers) == 400
    assert all(0 <= number < 1 for number in numbers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_only_itself(bad: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[0, 2] = bad
    greedy = SampleRow(SamplingParams(max_tokens=1, temperature=0.0), 0, 0)
    spoiled, healthy = sample(logits, [greedy, greedy])
    assert spoiled is None
    assert healthy is not None
    assert healthy.token_id == 1


def test_logprobs_are_logarithms_of_the_unfiltered_probabilities() -> None:
    row = SampleRow(SamplingParams(max_tokens=1, temperature=0.0, logprobs=2), 0, 0)
    [drawn] = sample(LOGITS.unsqueeze(0), [row])
    assert drawn is not None
    assert drawn.logprob == pytest.approx(torch.tensor(0.5).log().item())
    assert [top.token_id for top in drawn.top_logprobs] == [1, 3]
