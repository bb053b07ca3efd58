"""What a request reserves of its tenant's quota, and what it is charged in the end."""

from __future__ import annotations

from dbnode.generate import GenerateRequest, Outcome, Usage
from dbnode.tenants.account import Reservation
from dbnode.tenants.quotas import Quotas
from stratakv.tenancy.values import TOKEN_MICROS, Limits


def reserved_tokens(request: GenerateRequest, prompt_tokens: int, max_tokens: int) -> int:
    """The most that a request can take; of several answers to one prompt, the first has the prompt."""
    return max_tokens + (0 if request.is_sibling else prompt_tokens)


async def reserve(
    quotas: Quotas, request: GenerateRequest, prompt_tokens: int, max_tokens: int, deadline_s: float
) -> Reservation | None:
    """Of a tenant with limits, unless that was done for several requests together. Raises QuotaExceeded, Unavailable."""
    reservation = request.reservation
    if reservation is None:
        tokens = reserved_tokens(request, prompt_tokens, max_tokens)
        requests = 0 if request.is_sibling else 1
        tenant = request.caller.tenant
        reservation = await quotas.reserve(request.request_id, tenant, tokens, deadline_s, requests=requests)
    else:
        await quotas.permit(reservation, deadline_s)
    if reservation is not None:
        reservation.is_started = True
    return reservation


def charged_micros(limits: Limits, usage: Usage, outcome: Outcome) -> int:
    """What a request took that a worker has had, in millionths of a token.

    A prompt that was cancelled before its first token may have been computed; one that failed before has given nobody anything.
    """
    if outcome is Outcome.FAILED and not usage.completion_tokens:
        return 0
    cached = min(usage.tiers.num_cached, usage.prompt_tokens)
    computed = usage.prompt_tokens - cached + usage.completion_tokens
    return computed * TOKEN_MICROS + cached * limits.cached_token_micros


def settle(request: GenerateRequest, reservation: Reservation, micros: int) -> None:
    """Once it is decided whether the request counts."""
    reservation.release()
    if request.charge is None:
        reservation.settle(micros)
    else:
        request.charge.settle(lambda is_due: reservation.settle(micros if is_due else 0))
