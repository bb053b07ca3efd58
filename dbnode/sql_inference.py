"""infer() calls of the SQL face → requests of the inference service.

A prompt is one user message; `options.system` is the system message before it. Unlike REST, the default temperature is 0: a
statement that is run twice should answer the same. The default of max_tokens is 256, so that a column of answers stays bounded.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from dbnode.generate import Caller, GenerateRequest, Sampling, Source
from dbnode.inference import InferenceService
from dbnode.sql.service import InferCall
from stratakv.errors import InvalidRequest

MAX_TOKENS_DEFAULT = 256
TEMPERATURE_DEFAULT = 0.0
STOPS_MAX = 16
STOP_CHARS_MAX = 1024

_NUMBERS = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
_INTEGERS = {
    "max_tokens": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "timeout_ms": (1, 2**31 - 1),
}
OPTIONS = frozenset({"system", "stop", *_NUMBERS, *_INTEGERS})


class SqlInference:
    """What the SQL face asks of the DB node."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def infer_text(self, call: InferCall) -> str:
        """The answer. Cancelling it stops the work. Raises StrataError."""
        arrived_s = time.monotonic()
        options = checked_options(call.options)
        messages: list[object] = [{"role": "user", "content": call.prompt}]
        if "system" in options:
            messages.insert(0, {"role": "system", "content": options["system"]})
        request = GenerateRequest(
            request_id=f"sql-{uuid.uuid4().hex}",
            source=Source.SQL,
            arrived_s=arrived_s,
            model=call.model,
            messages=tuple(messages),
            sampling=_sampling(options),
            deadline_s=arrived_s + options["timeout_ms"] / 1e3 if "timeout_ms" in options else None,
            caller=Caller(role=call.role, database=call.database, session=call.session),
        )
        async with aclosing(self._service.generate(request)) as chunks:
            return "".join([chunk.text async for chunk in chunks])


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are not null, names and types checked. Raises InvalidRequest that names all that are wrong."""
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(name[:64] for name in options if name not in OPTIONS)
    if unknown:
        known = ", ".join(sorted(OPTIONS))
        raise InvalidRequest(
            f"infer: unknown option {', '.join(unknown)}", hint=f"Options are {known}.", param=unknown[0]
        )
    wrong = [problem for name, value in given.items() if (problem := _problem(name, value))]
    if wrong:
        raise InvalidRequest(f"infer: option {'; '.join(wrong)}", param=wrong[0].split(" ")[0])
    return given


def _problem(name: str, value: Any) -> str | None:
    if name in _NUMBERS:
        low, high = _NUMBERS[name]
        right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"{name} must be a number from {low:g} to {high:g}"
    if name in _INTEGERS:
        least, most = _INTEGERS[name]
        return (
            None if type(value) is int and least <= value <= most else f"{name} must be an integer of at least {least}"
        )
    if name == "system":
        return None if isinstance(value, str) else "system must be a string"
    stops = _stops(value)
    right = len(stops) <= STOPS_MAX and all(isinstance(s, str) and 0 < len(s) <= STOP_CHARS_MAX for s in stops)
    return None if right else f"stop must be at most {STOPS_MAX} strings of 1 to {STOP_CHARS_MAX} characters"


def _stops(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sampling(options: Mapping[str, Any]) -> Sampling:
    return Sampling(
        max_tokens=options.get("max_tokens", MAX_TOKENS_DEFAULT),
        temperature=float(options.get("temperature", TEMPERATURE_DEFAULT)),
        top_p=float(options.get("top_p", 1.0)),
        top_k=options.get("top_k", 0),
        min_p=float(options.get("min_p", 0.0)),
        seed=options.get("seed"),
        stop=tuple(_stops(options["stop"])) if "stop" in options else (),
    )
