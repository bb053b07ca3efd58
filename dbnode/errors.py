"""Errors of the DB node that are not in the common tree.

StrataError
├── InvalidRequest
│   ├── Unauthenticated
│   └── NotOffered           an endpoint that clients know and this node does not have
├── Overloaded
│   └── ExpectedTooLate      its first token would come too late
├── Unavailable
│   ├── NoWorker
│   ├── WorkerUnreachable    the request did not reach the worker
│   └── WorkerRefused        the worker is draining or full, or failed the request in an orderly way
│       └── HandoverFailed   a decode worker did not get the prompt's KV
├── Overloaded
│   └── QuotaExceeded        a limit of the tenant
├── AnswerCut                a typed answer does not fit max_tokens
├── AnswerUnfit              a worker's answer is not of its type
├── WorkerLost               the worker went away with the request in hand
├── WorkersExhausted         what was tried on several workers failed on all
└── PoisonPrompt             workers died of the same prompt not long ago
"""

from __future__ import annotations

from stratakv.errors import InvalidRequest, Overloaded, StrataError, Unavailable


class Unauthenticated(InvalidRequest):
    """The API key is missing or wrong."""

    openai_type = "authentication_error"
    code = "invalid_api_key"
    http_status = 401
    sqlstate = "28000"


class NotOffered(InvalidRequest):
    """Clients know this endpoint from elsewhere; it is not here."""

    code = "not_offered"
    http_status = 404
    sqlstate = "0A000"


class NoWorker(Unavailable):
    """No worker is there to take the request."""

    code = "no_worker"


class WorkerUnreachable(Unavailable):
    """The worker could not be reached; it has not seen the request."""

    code = "worker_unreachable"


class WorkerRefused(Unavailable):
    """The worker answered, but did not do the work: full, draining, or its engine failed."""

    code = "worker_refused"


class HandoverFailed(WorkerRefused):
    """The decode worker did not get the prompt's KV; the worker that computed it can go on."""

    code = "handover_failed"


class QuotaExceeded(Overloaded):
    """A limit of the tenant is reached; nothing was done."""

    code = "quota_exceeded"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        """Without a time, the same request is never let in while the limit is what it is."""
        hint = None if retry_after_s is None else f"retry_after_ms={max(1, round(retry_after_s * 1000))}"
        super().__init__(message, hint=hint, retry_after_s=retry_after_s)


class WorkerLost(StrataError):
    """The worker went away while it had the request."""

    code = "worker_lost"
    http_status = 502
    retryable = True


class WorkersExhausted(StrataError):
    """The request failed on every worker it was given to."""

    code = "workers_exhausted"
    http_status = 502
    sqlstate = "XX000"


class ExpectedTooLate(Overloaded):
    """The load would make the first token come after the request's deadline or its class's target; nothing was done."""

    code = "expected_too_late"


class PoisonPrompt(StrataError):
    """Workers died of this prompt; it is given to none for a while."""

    openai_type = "invalid_request_error"
    code = "poison_prompt"
    http_status = 422
    sqlstate = "XX000"


class AnswerCut(StrataError):
    """An answer that must be whole to be of use is longer than it may be."""

    code = "answer_cut"
    sqlstate = "54000"


class AnswerUnfit(StrataError):
    """A worker's answer does not have the form it was told."""

    code = "answer_unfit"
    http_status = 502
