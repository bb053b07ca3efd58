"""What a vLLM server says of itself under /metrics → its load, and how fast it has been. No I/O.

Rates are not there; they come from what counters gained between two readings, smoothed. Counters of several engines behind one
server are added up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from stratakv.wire import WorkerLoad

SMOOTHING = 0.3
"""Weight of the newest rate."""
PREFILL_TOKENS_MIN = 64
"""Fewer computed prompt tokens between two readings say nothing of the rate."""

_CONFIG = "vllm:cache_config_info"
_STARTED = "process_start_time_seconds"
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_USAGE = "vllm:kv_cache_usage_perc"
_USAGE_OLD = "vllm:gpu_cache_usage_perc"
_PROMPTS = "vllm:request_prompt_tokens_count"
_PROMPT_TOKENS = "vllm:request_prompt_tokens_sum"
_COMPUTED_TOKENS = "vllm:request_prefill_kv_computed_tokens_sum"
_PREFILL_S = "vllm:request_prefill_time_seconds_sum"
_STEP_S = "vllm:inter_token_latency_seconds_sum"
_STEPS = "vllm:inter_token_latency_seconds_count"
_MEAN = frozenset((_USAGE, _USAGE_OLD))
_WANTED = frozenset(
    (_STARTED, _RUNNING, _WAITING, _PROMPTS, _PROMPT_TOKENS, _COMPUTED_TOKENS, _PREFILL_S, _STEP_S, _STEPS)
)
_LABEL = re.compile(r'([A-Za-z_]+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class VllmMetrics:
    """One reading."""

    values: Mapping[str, float]
    config: Mapping[str, str]
    """Labels of the cache's configuration."""

    def number(self, name: str) -> float:
        return self.values.get(name, 0.0)

    def config_number(self, name: str) -> int:
        """0 if it is not told."""
        text = self.config.get(name, "")
        return int(text) if text.isdecimal() else 0

    @property
    def started(self) -> str:
        """Changes when another process answers; empty if it is not told."""
        return str(self.values[_STARTED]) if _STARTED in self.values else ""

    @property
    def cache_usage(self) -> float:
        """Share of the blocks that running requests hold."""
        return min(1.0, max(self.number(_USAGE), self.number(_USAGE_OLD)))


def read_metrics(text: str) -> VllmMetrics:
    """Prometheus' text format; what is not known is passed over."""
    values: dict[str, float] = {}
    config: dict[str, str] = {}
    for line in text.splitlines():
        end = _end_of_name(line)
        name = line[:end]
        if name == _CONFIG and not config:
            config = dict(_LABEL.findall(line))
        elif name in _WANTED:
            values[name] = values.get(name, 0.0) + _value(line)
        elif name in _MEAN:
            values[name] = max(values.get(name, 0.0), _value(line))
    return VllmMetrics(values, config)


def _end_of_name(line: str) -> int:
    brace, space = line.find("{"), line.find(" ")
    return min(place for place in (brace, space, len(line)) if place >= 0)


def _value(line: str) -> float:
    try:
        return float(line[line.rindex("}") + 1 if "}" in line else line.index(" ") :].split()[0])
    except (ValueError, IndexError):
        return 0.0


@dataclass(slots=True)
class VllmRates:
    """How fast one server has been lately."""

    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    _before: VllmMetrics | None = field(default=None, repr=False)

    def take(self, now: VllmMetrics) -> None:
        """A newer reading."""
        before, self._before = self._before, now
        if before is None or before.started != now.started:
            return
        tokens, prefill_s = _gained(before, now, _COMPUTED_TOKENS), _gained(before, now, _PREFILL_S)
        if tokens >= PREFILL_TOKENS_MIN and prefill_s > 0:
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, tokens / prefill_s)
        steps, step_s = _gained(before, now, _STEPS), _gained(before, now, _STEP_S)
        if steps > 0 and step_s > 0:
            self.decode_step_s = _smooth(self.decode_step_s, step_s / steps)


def load_of(now: VllmMetrics, rates: VllmRates, num_own_waiting: int) -> WorkerLoad:
    """How busy it is. Prompts that others have sent are taken to be as long as its prompts are on average."""
    prompts = now.number(_PROMPTS)
    waiting = int(now.number(_WAITING))
    others_waiting = max(0, waiting - num_own_waiting)
    blocks = now.config_number("num_gpu_blocks")
    return WorkerLoad(
        running=int(now.number(_RUNNING)),
        waiting=waiting,
        waiting_tokens=int(others_waiting * now.number(_PROMPT_TOKENS) / prompts) if prompts else 0,
        l1_blocks_total=blocks,
        l1_blocks_free=round(blocks * (1.0 - now.cache_usage)),
        prefill_tokens_per_s=rates.prefill_tokens_per_s,
        decode_step_s=rates.decode_step_s,
    )


def _gained(before: VllmMetrics, now: VllmMetrics, name: str) -> float:
    return now.number(name) - before.number(name)


def _smooth(before: float, now: float) -> float:
    return now if not before else (1 - SMOOTHING) * before + SMOOTHING * now
