"""When a request is refused because its first token would come too late. Pure.

Asked by `dbnode.inference` before a request waits for anything, and by the simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dbnode.errors import ExpectedTooLate

RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 600.0
WAIT_SHARE_MIN = 0.5
"""If less of the time to the first token is waiting for others, it is the request that is large, not the load."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one request, if it were sent now."""

    wait_s: float
    """Until its prompt's turn comes."""
    first_token_s: float


def may_be_late(wait_s: float, limit_s: float) -> bool:
    """Whether a forecast is worth making, given the least wait."""
    return wait_s > WAIT_SHARE_MIN * limit_s


def is_late(forecast: Forecast, limit_s: float) -> bool:
    """Whether the load makes the first token come after `limit_s`."""
    expected_s = forecast.first_token_s
    return expected_s > limit_s and forecast.wait_s >= WAIT_SHARE_MIN * expected_s


def too_late(forecast: Forecast, limit_s: float) -> ExpectedTooLate:
    """The refusal, which says when the wait will be short enough if nothing else comes."""
    retry_s = retry_after_s(forecast.first_token_s - limit_s)
    return ExpectedTooLate(
        f"the first token is expected in {forecast.first_token_s:.1f} s and wanted in {max(0.0, limit_s):.1f} s",
        hint=retry_hint(retry_s),
        retry_after_s=retry_s,
    )


def retry_after_s(wait_s: float) -> float:
    """What a client is told of a forecast."""
    return min(max(wait_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)


def retry_hint(retry_s: float) -> str:
    return f"Try again in about {math.ceil(retry_s)} s."
