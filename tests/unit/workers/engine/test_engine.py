"""Every accepted request ends exactly once, within its limits, and takes nobody with it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from stratakv.errors import ContextTooLong, InvalidRequest, Overloaded, SetupError, Unavailable
from tests.support import eventually
from tests.unit.workers.engine.harness import Listener, fp32, generate, prompt, request, running, submit
from workers.engine import Engine, EngineConfig, EngineEvent, FinishedEvent, FinishReason, SamplingParams
from workers.engine.errors import EngineFailed

PROMPT = prompt(51, 20)


class Clock:
    """Time that tests move by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_stop_tokens_end_a_request_and_are_not_emitted(tiny: Path) -> None:
    with running(fp32(tiny)) as engine:
        tokens, _ = generate(engine, PROMPT, 12)
        stop = tokens[5]
        stopped, finished = generate(engine, PROMPT, 12, stop_token_ids=(stop,))
    assert stopped == tokens[: tokens.index(stop)]
    assert (finished.reason, finished.stop_token_id) == (FinishReason.STOP, stop)
    assert finished.usage.generated_tokens == len(stopped) + 1


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_stop_token_is_emitted_where_that_is_wanted(tiny: Path, ignore_eos: bool) -> None:
    with running(fp32(tiny)) as engine:
        tokens, _ = generate(engine, PROMPT, 12)
        how: dict[str, Any] = {"stop_token_ids": (tokens[5],), "tells_stop_token": True, "ignore_eos": ignore_eos}
        stopped, finished = generate(engine, PROMPT, 12, **how)
    assert stopped == tokens[: tokens.index(tokens[5]) + 1]
    assert finished.reason is FinishReason.STOP


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_an_answer_before_its_least_length(tiny: Path, temperature: float) -> None:
    """Also where another engine has generated the beginning."""
    with running(fp32(tiny)) as engine:
        plain, _ = generate(engine, PROMPT, 12, temperature=temperature, seed=3)
        stops = tuple(set(plain[:6]))
        how: dict[str, Any] = {"min_tokens": 8, "stop_token_ids": stops, "temperature": temperature, "seed": 3}
        tokens, finished = generate(engine, PROMPT, 12, **how)
        rest, _ = generate(engine, PROMPT, 12, resume=tokens[:5], **how)
    assert not set(tokens[:8]) & set(stops)
    assert 8 <= len(tokens) < 12 or finished.reason is FinishReason.LENGTH
    assert rest == tokens[5:]


def test_cancel_ends_a_running_and_a_waiting_request_and_frees_their_blocks(tiny: Path) -> None:
    with running(fp32(tiny, max_running=1)) as engine:
        first = submit(engine, request(PROMPT, 400, request_id="first"))
        second = submit(engine, request(PROMPT, 400, request_id="second"))
        first.wait_first()
        engine.cancel("second")
        engine.cancel("first")
        engine.cancel("unknown")
        assert [listener.result()[1].reason for listener in (first, second)] == [FinishReason.CANCELLED] * 2
        eventually(lambda: engine.stats().blocks_referenced == 0)


def test_a_passed_deadline_ends_a_request(tiny: Path) -> None:
    clock = Clock()
    with running(fp32(tiny), clock=clock) as engine:
        listener = submit(engine, request(PROMPT, 400, deadline=101.0))
        listener.wait_first()
        clock.now = 101.5
        _, finished = listener.result()
    assert finished.reason is FinishReason.DEADLINE
    assert finished.error is not None
    assert finished.error.retryable


def test_the_queue_is_bounded(tiny: Path) -> None:
    engine = Engine(fp32(tiny, max_waiting=2))
    try:
        for i in range(2):
            submit(engine, request(PROMPT, 4, request_id=str(i)))
        with pytest.raises(Overloaded):
            submit(engine, request(PROMPT, 4, request_id="one too many"))
        assert engine.stats().waiting == 2
    finally:
        engine.shutdown()


@pytest.mark.parametrize(
    ("token_ids", "num_tokens", "how", "error"),
    [
        pytest.param(prompt(1, 500), 20, {}, ContextTooLong, id="longer than the context"),
        pytest.param(prompt(1, 100), 100, {}, ContextTooLong, id="larger than L1"),
        pytest.param([], 4, {}, InvalidRequest, id="empty"),
        pytest.param([3, 10_000], 4, {}, InvalidRequest, id="unknown token"),
        pytest.param([3, -1], 4, {}, InvalidRequest, id="negative token"),
        pytest.param([3] * 20, 4, {"block_size": 4}, InvalidRequest, id="keys of another block size"),
        pytest.param([3], 4, {"resume": [1, 2, 3, 4]}, InvalidRequest, id="nothing left to generate"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    tiny: Path, token_ids: list[int], num_tokens: int, how: dict[str, Any], error: type[Exception]
) -> None:
    with running(fp32(tiny, num_blocks=8)) as engine:
        with pytest.raises(error):
            submit(engine, request(token_ids, num_tokens, **how))
        assert generate(engine, PROMPT, 2)[1].reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}, {"max_tokens": 0}, {"logprobs": 99}],
)
def test_sampling_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        SamplingParams(**{"max_tokens": 1, **wrong})
    assert raised.value.param in wrong


def test_a_request_id_is_used_once_at_a_time(tiny: Path) -> None:
    with running(fp32(tiny)) as engine:
        listener = submit(engine, request(PROMPT, 100))
        with pytest.raises(InvalidRequest):
            submit(engine, request(PROMPT, 4))
        listener.result()
        generate(engine, PROMPT, 4)


def test_a_listener_that_raises_costs_nobody_else_anything(tiny: Path) -> None:
    def raising(event: EngineEvent) -> None:
        raise RuntimeError("listener")

    with running(fp32(tiny)) as engine:
        engine.submit(request(PROMPT, 5, request_id="raising"), raising)
        assert generate(engine, PROMPT, 5)[1].reason is FinishReason.LENGTH


def test_shutdown_answers_what_is_unfinished_and_refuses_the_rest(tiny: Path) -> None:
    with running(fp32(tiny)) as engine:
        listener = submit(engine, request(PROMPT, 400))
        listener.wait_first()
    _, finished = listener.result()
    assert isinstance(finished.error, Unavailable)
    with pytest.raises(Unavailable):
        submit(engine, request(PROMPT, 4))


def test_a_dying_engine_answers_everybody_and_reports_it(tiny: Path) -> None:
    all_are_in = threading.Event()

    class Broken:
        """A connector with a bug."""

        def find(self, keys: object, num_l1_blocks: object, on_found: object) -> None:
            raise ZeroDivisionError

        def save(self, keys: object, l1_blocks: object, owner: int, on_finished: object) -> None:
            assert all_are_in.wait(20.0)
            raise ZeroDivisionError

    with running(fp32(tiny, max_running=1), lambda cache: Broken()) as engine:
        listeners = [submit(engine, request(PROMPT, 40, request_id=str(i))) for i in range(3)]
        all_are_in.set()
        events = [listener.result()[1] for listener in listeners]
        eventually(lambda: not engine.stats().healthy)
        with pytest.raises(EngineFailed):
            submit(engine, request(PROMPT, 4))
    assert all(isinstance(event.error, EngineFailed) for event in events)
    assert isinstance(engine.failure, ZeroDivisionError)


def test_logprobs_are_of_the_chosen_and_the_likeliest_tokens(tiny: Path) -> None:
    with running(fp32(tiny)) as engine:
        listener = Listener()
        engine.submit(request(PROMPT, 1, logprobs=3), listener.events.put)
        event = listener.wait_first()
    assert event.logprob == event.top_logprobs[0].logprob
    assert event.top_logprobs[0].token_id == event.token_id
    assert len(event.top_logprobs) == 3
    assert event.logprob is not None
    assert event.logprob < 0


def test_times_and_tokens_are_accounted(tiny: Path) -> None:
    with running(fp32(tiny)) as engine:
        _, finished = generate(engine, PROMPT, 5)
        assert isinstance(finished, FinishedEvent)
        stats = engine.stats()
    usage = finished.usage
    assert (usage.prompt_tokens, usage.generated_tokens, usage.preemptions) == (20, 5, 0)
    assert min(usage.queue_time_s, usage.prefill_time_s, usage.decode_time_s) >= 0
    assert (stats.prefill_tokens, stats.decode_tokens, stats.num_steps) == (20, 4, 5)


def test_settings_that_cannot_work_are_refused(tiny: Path) -> None:
    with pytest.raises(SetupError, match="num_blocks"):
        EngineConfig(tiny, num_blocks=0)
    with pytest.raises(SetupError):
        Engine(EngineConfig(tiny / "nowhere"))
