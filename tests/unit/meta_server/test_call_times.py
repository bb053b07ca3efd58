"""Times of calls: what Prometheus is told, what percentiles are read off, what is logged."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from meta_server.call_times import BOUNDS_S, SLOW_LOG_INTERVAL_S, CallTimes


class Now:
    """A clock to turn."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_prometheus_is_told_of_every_call_in_a_histogram() -> None:
    times, registry = CallTimes("calls_seconds", "call", slow_s=0, clock=Now()), CollectorRegistry()
    registry.register(times)
    for seconds in (0.0002, 0.0002, 0.3, 60.0):
        times.observe("Match", seconds)
    text = generate_latest(registry).decode()
    for line in (
        'calls_seconds_bucket{call="Match",le="0.0001"} 0.0',
        'calls_seconds_bucket{call="Match",le="0.00025"} 2.0',
        'calls_seconds_bucket{call="Match",le="0.5"} 3.0',
        'calls_seconds_bucket{call="Match",le="+Inf"} 4.0',
        'calls_seconds_count{call="Match"} 4.0',
    ):
        assert line in text


def test_percentiles_lie_in_the_interval_that_the_true_ones_lie_in() -> None:
    rng, times = random.Random(0), CallTimes("c", "call", slow_s=0, clock=Now())
    seconds = sorted(rng.lognormvariate(-6, 1.5) for _ in range(2000))
    for value in seconds:
        times.observe("a", value)
    (summary,) = times.summaries()
    assert summary.count == 2000
    assert summary.mean_s == pytest.approx(sum(seconds) / 2000)
    for found, true in ((summary.p50_s, seconds[999]), (summary.p99_s, seconds[1979])):
        assert max(b for b in (0.0, *BOUNDS_S) if b < true) <= found <= min(b for b in BOUNDS_S if b >= true)


def test_slow_calls_are_logged_and_many_of_them_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    now = Now()
    times = CallTimes("c", "call", slow_s=0.1, clock=now)
    for seconds in (0.05, 0.1, 0.2, 0.3):
        times.observe("a", seconds)
    now.seconds += SLOW_LOG_INTERVAL_S
    times.observe("a", 0.4)
    assert [record.getMessage() for record in caplog.records] == ["slow_call"] * 2
    fields = [record.__dict__["stratakv_fields"] for record in caplog.records]
    assert fields == [{"call": "a", "ms": 100.0, "left_out": 0}, {"call": "a", "ms": 400.0, "left_out": 2}]
