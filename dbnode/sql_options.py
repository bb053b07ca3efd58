"""Options of infer() and its kin: names, types, ranges, and what they make of a request. Free of I/O.

The typed functions (`infer_json`, `infer_choice`, `infer_bool`, `infer_tokens`) are SQL wrappers around infer(): what they
want of the answer arrives among the options, under names that begin with `@` and are no part of the public options.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from dbnode.generate import Sampling, SloClass, StructuredOutputs
from dbnode.sql_fold import FOLD
from stratakv.errors import InvalidRequest

MAX_TOKENS_DEFAULT = 256
TEMPERATURE_DEFAULT = 0.0
STOPS_MAX = 16
STOP_CHARS_MAX = 1024
CHOICES_MAX = 1000
CACHE_SALT_CHARS_MAX = 512

JSON_SCHEMA = "@json_schema"
CHOICES = "@choices"
COUNT_TOKENS = "@count_tokens"

_NUMBERS = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
_INTEGERS = {
    "max_tokens": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "timeout_ms": (1, 2**31 - 1),
    "priority": (-(2**31), 2**31 - 1),
}
OPTIONS = frozenset({"system", "stop", "on_error", "dedupe", "cache_salt", "slo_class", *_NUMBERS, *_INTEGERS})
_TYPED = frozenset({JSON_SCHEMA, CHOICES, COUNT_TOKENS})
_PRIVATE = _TYPED | {FOLD}


class OnError(enum.StrEnum):
    """What a row's value is when its inference fails."""

    RAISE = "raise"
    NULL = "null"
    DETAIL = "detail"


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are not null, names and types checked. Raises InvalidRequest that names all that are wrong."""
    given = {name: value for name, value in options.items() if value is not None}
    unknown = sorted(name[:64] for name in options if name not in OPTIONS and name not in _PRIVATE)
    if unknown:
        known = ", ".join(sorted(OPTIONS))
        raise InvalidRequest(
            f"infer: unknown option {', '.join(unknown)}", hint=f"Options are {known}.", param=unknown[0]
        )
    wrong = [problem for name, value in given.items() if (problem := _problem(name, value))]
    if wrong:
        raise InvalidRequest(f"infer: option {'; '.join(wrong)}", param=wrong[0].split(" ")[0])
    _check_typed(given)
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
    if name == "cache_salt":
        right = isinstance(value, str) and 0 < len(value) <= CACHE_SALT_CHARS_MAX
        return None if right else f"cache_salt must be a string of 1 to {CACHE_SALT_CHARS_MAX} characters"
    if name == "on_error":
        known = isinstance(value, str) and value in frozenset(OnError)
        return None if known else f"on_error must be one of {', '.join(OnError)}"
    if name == "slo_class":
        known = isinstance(value, str) and value in frozenset(SloClass)
        return None if known else f"slo_class must be one of {', '.join(SloClass)}"
    if name == "dedupe":
        return None if isinstance(value, bool) else "dedupe must be true or false"
    if name in _PRIVATE:
        return None
    stops = _stops(value)
    right = len(stops) <= STOPS_MAX and all(isinstance(s, str) and 0 < len(s) <= STOP_CHARS_MAX for s in stops)
    return None if right else f"stop must be at most {STOPS_MAX} strings of 1 to {STOP_CHARS_MAX} characters"


def _check_typed(given: Mapping[str, Any]) -> None:
    """What the typed functions were called with, and which options do not go with them."""
    typed = [name for name in _TYPED if name in given]
    private = [name for name in _PRIVATE if name in given]
    if len(private) > 1:
        raise InvalidRequest(f"infer: unknown option {', '.join(sorted(private))}", param=min(private))
    if JSON_SCHEMA in given and not isinstance(given[JSON_SCHEMA], dict):
        raise InvalidRequest("infer_json: schema must be a JSON object", param="schema")
    if CHOICES in given:
        choices = given[CHOICES]
        right = isinstance(choices, list) and 0 < len(choices) <= CHOICES_MAX
        if not right or not all(isinstance(choice, str) and choice for choice in choices):
            raise InvalidRequest(
                f"infer_choice: choices must be 1 to {CHOICES_MAX} texts, none of them empty or NULL", param="choices"
            )
    if typed and "stop" in given:
        raise InvalidRequest("infer: option stop must not be given where the answer has a type", param="stop")
    if given.get("on_error") == OnError.DETAIL and JSON_SCHEMA not in given:
        raise InvalidRequest("infer: option on_error must be raise or null; detail is for infer_json", param="on_error")


def structured_outputs(options: Mapping[str, Any]) -> StructuredOutputs | None:
    """The form that checked options ask for."""
    if JSON_SCHEMA in options:
        return StructuredOutputs(json=options[JSON_SCHEMA])
    if CHOICES in options:
        return StructuredOutputs(choice=options[CHOICES])
    return None


def sampling(options: Mapping[str, Any]) -> Sampling:
    """How tokens are chosen under checked options."""
    return Sampling(
        max_tokens=options.get("max_tokens", MAX_TOKENS_DEFAULT),
        temperature=float(options.get("temperature", TEMPERATURE_DEFAULT)),
        top_p=float(options.get("top_p", 1.0)),
        top_k=options.get("top_k", 0),
        min_p=float(options.get("min_p", 0.0)),
        seed=options.get("seed"),
        stop=tuple(_stops(options["stop"])) if "stop" in options else (),
        structured_outputs=structured_outputs(options),
    )


def _stops(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
