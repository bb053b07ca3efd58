"""A vLLM server's load and speed, from what it shows under /metrics."""

from __future__ import annotations

import pytest

from dbnode.vllm.metrics import VllmRates, load_of, read_metrics
from stratakv.wire import WorkerLoad
from tests.stand_in_vllm import METRICS

TEXT = METRICS.format(started=1795368595.59, running=3.0, waiting=5.0, usage=0.25, block_size=128, algorithm="sha256")


def test_load_is_read_from_recorded_metrics() -> None:
    found = read_metrics(TEXT)
    assert found.started == "1795368595.59"
    assert (found.config_number("block_size"), found.config_number("num_cpu_blocks")) == (128, 0)
    load = load_of(found, VllmRates(), num_own_waiting=3)
    assert load == WorkerLoad(
        running=3,
        waiting=5,
        waiting_tokens=600,  # of the two that others sent
        l1_blocks_total=182,
        l1_blocks_free=round(182 * 0.75),
    )


def test_engines_behind_one_server_are_added_up() -> None:
    more = TEXT + 'vllm:num_requests_running{engine="1",model_name="m"} 4.0\n'
    assert read_metrics(more).number("vllm:num_requests_running") == 7


def test_rates_come_from_what_was_gained_between_two_readings() -> None:
    rates = VllmRates()
    rates.take(read_metrics(TEXT))
    assert (rates.prefill_tokens_per_s, rates.decode_step_s) == (0.0, 0.0)
    later = (
        TEXT.replace('computed_tokens_sum{engine="0",model_name="m"} 901.0', "computed_tokens_sum 1901.0")
        .replace("1.7364839839938213", "3.7364839839938213")
        .replace('count{engine="0",model_name="m"} 54.0', "count 154.0")
        .replace("2.659498879995226", "7.659498879995226")
    )
    rates.take(read_metrics(later))
    assert rates.prefill_tokens_per_s == pytest.approx(500.0)
    assert rates.decode_step_s == pytest.approx(0.05)


def test_another_process_has_gained_nothing_yet() -> None:
    rates = VllmRates()
    rates.take(read_metrics(TEXT))
    rates.take(read_metrics(TEXT.replace("1795368595.59", "1795368600.0").replace("901.0", "9010.0")))
    assert rates.prefill_tokens_per_s == 0.0


@pytest.mark.parametrize("text", ["", "\n", "vllm:num_requests_running", "vllm:num_requests_running{} x", "{} 1", "#"])
def test_what_is_no_metric_is_passed_over(text: str) -> None:
    assert read_metrics(text).number("vllm:num_requests_running") == 0.0
