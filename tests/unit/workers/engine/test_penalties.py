"""Penalties count what was generated, here or elsewhere, and leave log-probabilities as they were."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratakv.errors import InvalidRequest
from tests.unit.workers.engine.harness import fp32, generate, prompt, request, running, save_tiny, submit
from workers.engine.penalties import Penalties
from workers.engine.requests import SamplingParams
from workers.engine.sampler import SampleRow, sample

VOCAB_SIZE = 12
LOGITS = torch.linspace(-3.0, 3.0, VOCAB_SIZE)
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=20)
penalty = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])


def params(**how: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1, **({"temperature": 0.0} | how))


def expected(how: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """The rule, written out token by token."""
    changed = LOGITS.tolist()
    for token, bias in how.logit_bias:
        changed[token] += bias
    for token in {*prompt, *output}:
        factor = how.repetition_penalty
        changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
    for token, count in Counter(output).items():
        changed[token] -= how.presence_penalty + how.frequency_penalty * count
    return changed


@given(tokens, tokens, penalty, penalty, st.sampled_from([0.5, 1.0, 1.5]), st.data())
def test_penalties_are_the_rule_however_the_output_was_made(
    prompt: list[int], output: list[int], presence: float, frequency: float, repetition: float, data: st.DataObject
) -> None:
    bias = data.draw(st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-5, 5), max_size=3))
    how = params(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
    )
    num_resumed = data.draw(st.integers(0, len(output)))
    penalties = Penalties.of(how, prompt, output[:num_resumed])
    if penalties is None:
        assert expected(how, prompt, output) == LOGITS.tolist()
        return
    for token in output[num_resumed:]:
        penalties.count(token)
    before = LOGITS.clone()
    assert penalties.apply(LOGITS).tolist() == pytest.approx(expected(how, prompt, output), abs=1e-4)
    assert torch.equal(before, LOGITS), "the model's own logits stay"


def test_a_penalised_choice_is_told_with_its_unpenalised_logprob() -> None:
    how = params(presence_penalty=2.0, logprobs=2)
    penalties = Penalties.of(how, [], [VOCAB_SIZE - 1])
    [drawn] = sample(LOGITS.unsqueeze(0), [SampleRow(how, 0, 1, penalties=penalties)])
    assert drawn is not None
    assert drawn.token_id == VOCAB_SIZE - 2
    assert drawn.logprob == pytest.approx(float(torch.log_softmax(LOGITS, -1)[VOCAB_SIZE - 2]))
    assert drawn.top_logprobs[0].token_id == VOCAB_SIZE - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_can_force_and_forbid_a_token(temperature: float) -> None:
    how = params(temperature=temperature, logit_bias=((3, 100.0),))
    rows = [SampleRow(how, 1, index, penalties=Penalties.of(how, [], [])) for index in range(50)]
    assert {drawn.token_id for drawn in sample(LOGITS.expand(50, -1), rows) if drawn} == {3}


@given(tokens, st.integers(0, 3), st.booleans())
def test_what_ends_an_answer_waits_for_its_least_length(output: list[int], eos: int, ignore_eos: bool) -> None:
    how = SamplingParams(
        max_tokens=9, min_tokens=9, stop_token_ids=(7,), ignore_eos=ignore_eos, logit_bias=((7, 100.0),)
    )
    penalties = Penalties.of(how, [], output, [eos])
    assert penalties is not None
    banned = {token for token, logit in enumerate(penalties.apply(LOGITS).tolist()) if logit == float("-inf")}
    assert banned == (({7} if ignore_eos else {7, eos}) if len(output) < 9 else set())


def test_a_form_is_kept_under_any_bias() -> None:
    how = params(logit_bias=((0, 100.0),))
    row = SampleRow(how, 0, 0, torch.tensor([4, 5]), Penalties.of(how, [], []))
    [drawn] = sample(LOGITS.unsqueeze(0), [row])
    assert drawn is not None
    assert drawn.token_id == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", tuple((token, 1.0) for token in range(2000))),
        ("logprobs", 21),
        ("min_tokens", 2),
        ("stop_token_ids", tuple(range(129))),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}])
def test_an_answer_that_goes_on_elsewhere_is_the_one_it_would_have_been(tmp_path: Path, how: dict[str, Any]) -> None:
    plain_how = dict(how)
    how = how | {
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
        "logit_bias": ((7, 2.0),),
    }
    with running(fp32(save_tiny(tmp_path))) as engine:
        whole, _ = generate(engine, prompt(1, 20), 24, **how)
        plain, _ = generate(engine, prompt(1, 20), 24, **plain_how)
        resumed, _ = generate(engine, prompt(1, 20), 24, resume=whole[:9], **how)
    assert whole != plain
    assert resumed == whole[9:]


def test_every_token_is_told_with_its_logprob(tmp_path: Path) -> None:
    with running(fp32(save_tiny(tmp_path))) as engine:
        listener = submit(engine, request(prompt(1, 20), 3, logprobs=2, presence_penalty=2.0))
        events = [listener.wait_first() for _ in range(3)]
    assert all(event.logprob is not None and event.logprob <= 0 for event in events)
    assert all(len(event.top_logprobs) == 2 for event in events)
    # Greedy and nothing penalised yet: the first token is the likeliest.
    assert events[0].top_logprobs[0].token_id == events[0].token_id
