"""infer() calls of the SQL face → requests of the inference service.

A prompt is one user message; `options.system` is the system message before it. Unlike REST, the default temperature is 0: a
statement that is run twice should answer the same. The default of max_tokens is 256, so that a column of answers stays bounded.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from dbnode.errors import (
    AnswerCut,
    AnswerUnfit,
    ExpectedTooLate,
    NoWorker,
    PoisonPrompt,
    WorkerLost,
    WorkersExhausted,
)
from dbnode.generate import (
    Answer,
    Caller,
    FinishReason,
    GenerateRequest,
    Settled,
    SloClass,
    Source,
    StructuredOutputs,
    Usage,
)
from dbnode.inference import InferenceService
from dbnode.sql.commands import NulInAnswer
from dbnode.sql.service import CallCost, InferCall, NullAnswer
from dbnode.sql.topics import Asked
from dbnode.sql_fold import FOLD, Fold, parse_fold
from dbnode.sql_options import COUNT_TOKENS, MAX_TOKENS_DEFAULT, OnError, checked_options, sampling
from dbnode.tenants.account import Reservation
from dbnode.tenants.charges import reserved_tokens
from dbnode.tenants.directory import Directory
from stratakv.errors import ContextTooLong, DeadlineExceeded, StrataError

RESERVE_TIMEOUT_S = 5.0
_OF_ONE_ROW = (
    ContextTooLong,
    DeadlineExceeded,
    ExpectedTooLate,
    AnswerCut,
    AnswerUnfit,
    NulInAnswer,
    WorkerLost,
    WorkersExhausted,
    PoisonPrompt,
)
"""What `on_error` is about. Other errors would meet every row alike, or say that the statement is to end."""


class SqlInference:
    """What the SQL face asks of the DB node."""

    def __init__(self, service: InferenceService, directory: Directory) -> None:
        self._service = service
        self._directory = directory

    async def infer_text(self, call: InferCall) -> str:
        """The answer. Cancelling it stops the work. Raises StrataError, or NullAnswer."""
        arrived_s = time.monotonic()
        caller = caller_of(call, self._directory)
        options = checked_options(call.options)
        if COUNT_TOKENS in options:
            return str(await self._service.count_tokens(call.prompt, call.model))
        deadline_s = arrived_s + options["timeout_ms"] / 1e3 if "timeout_ms" in options else None
        try:
            if FOLD in options:
                return await self._fold(call, caller, options, deadline_s)
            return await self._answer(call, caller, options, deadline_s)
        except _OF_ONE_ROW as error:
            return _instead(OnError(options.get("on_error", OnError.RAISE)), error)

    async def reserve(self, calls: Sequence[InferCall]) -> list[InferCall]:
        """The calls, each with a reservation if their tenant has limits; all of them or none. Raises StrataError."""
        caller = caller_of(calls[0], self._directory)
        quotas = self._service.quotas
        if quotas is None or not caller.tenant.limits.is_limited:
            return list(calls)
        requests = [_reservable(call, caller) for call in calls]
        counted = [request for request in requests if request is not None]
        tokens = self._service.tokens
        lengths = await tokens.aside(lambda: [len(tokens.of_chat(request)) for request in counted])
        asked = [
            (request.request_id, reserved_tokens(request, length, request.sampling.max_tokens or MAX_TOKENS_DEFAULT))
            for request, length in zip(counted, lengths, strict=True)
        ]
        deadline_s = time.monotonic() + RESERVE_TIMEOUT_S
        made = iter(await quotas.reserve_all(asked, caller.tenant, deadline_s) if asked else [])
        return [
            call if request is None else _reserved(call, next(made, None))
            for call, request in zip(calls, requests, strict=True)
        ]

    async def _fold(self, call: InferCall, caller: Caller, options: Mapping[str, Any], deadline_s: float | None) -> str:
        """Several requests, each with its own event of usage; a `timeout_ms` is that of all together."""
        service = self._service
        service.check_model(call.model)
        asked = parse_fold(call.prompt)
        context = service.max_model_len()
        if not context:
            raise NoWorker("no worker is there")
        answer_tokens_max = options.get("max_tokens", MAX_TOKENS_DEFAULT)

        async def answer(prompt: str) -> str:
            return await self._answer(replace(call, prompt=prompt), caller, options, deadline_s)

        async def count_prompt(prompt: str) -> int:
            request = request_of(replace(call, prompt=prompt), caller, options)
            return len((await service.prompt_keys([request]))[0].token_ids)

        fold = Fold(
            instruction=asked.instruction,
            room_tokens=context - answer_tokens_max,
            answer_tokens_max=answer_tokens_max,
            count=service.tokens.count_each,
            count_prompt=count_prompt,
            answer=answer,
        )
        return await fold.run(asked.pieces)

    async def _answer(
        self, call: InferCall, caller: Caller, options: Mapping[str, Any], deadline_s: float | None
    ) -> str:
        request = request_of(call, caller, options, deadline_s)
        answer = Answer()
        async with aclosing(self._service.generate(request)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
        text = "".join(answer.text)
        if "\0" in text:
            raise NulInAnswer("the model's answer contains a NUL character")
        if request.sampling.structured_outputs is not None:
            _check_form(request.sampling.structured_outputs, text, answer.finish_reason)
        return text


def _reservable(call: InferCall, caller: Caller) -> GenerateRequest | None:
    """What a call asks, if it is one request that can be made."""
    try:
        options = checked_options(call.options)
        if COUNT_TOKENS in options or FOLD in options:
            return None
        return request_of(call, caller, options)
    except StrataError:
        return None  # the call itself says what is wrong


def _reserved(call: InferCall, reservation: Reservation | None) -> InferCall:
    """The call with its reservation, which ends if nobody asks for the answer."""
    if reservation is not None and call.charge is not None:
        call.charge.settle(lambda is_due: None if is_due or reservation.is_started else reservation.settle(0))
    return replace(call, reservation=reservation)


def caller_of(call: InferCall | Asked, directory: Directory) -> Caller:
    """Who calls: the tenant of the role that has logged in. Raises PermissionDenied, Unavailable."""
    login = call.login
    role, oid, cluster = (call.role, None, "") if login is None else (login.role, login.oid, login.cluster)
    tenant = directory.of_role(role, oid, cluster)
    return Caller(tenant, tenant.models, role=call.role, database=call.database, session=call.session)


def request_of(
    call: InferCall, caller: Caller, options: Mapping[str, Any] | None = None, deadline_s: float | None = None
) -> GenerateRequest:
    """What the inference service is asked for a call, whose options are checked if they are not given. Raises InvalidRequest."""
    options = checked_options(call.options) if options is None else options
    messages: list[object] = [{"role": "user", "content": call.prompt}]
    if "system" in options:
        messages.insert(0, {"role": "system", "content": options["system"]})
    reservation = call.reservation
    if reservation is not None and (reservation.is_started or reservation.is_ended):
        reservation = None  # a call that is tried again
    return GenerateRequest(
        request_id=f"sql-{uuid.uuid4().hex}" if reservation is None else reservation.request_id,
        source=Source.SQL,
        arrived_s=time.monotonic(),
        model=call.model,
        messages=tuple(messages),
        sampling=sampling(options),
        priority=options.get("priority", 0),
        slo_class=SloClass(options["slo_class"]) if "slo_class" in options else None,
        cache_salt=options.get("cache_salt"),
        deadline_s=deadline_s,
        caller=caller,
        on_settled=_reporter(call),
        charge=call.charge,
        reservation=reservation,
    )


def _reporter(call: InferCall) -> Callable[[Settled], None] | None:
    report = call.on_cost
    return None if report is None else lambda settled: report(_cost(settled.usage))


def _cost(usage: Usage) -> CallCost:
    tiers = usage.tiers
    return CallCost(usage.prompt_tokens, tiers.l1, tiers.l2, tiers.pool + tiers.disk, usage.completion_tokens)


def _check_form(wanted: StructuredOutputs, text: str, reason: FinishReason | None) -> None:
    """Workers hold answers to their form, but stop at max_tokens, and not all workers are ours."""
    if reason is FinishReason.LENGTH:
        raise AnswerCut("the answer is longer than max_tokens", hint="Raise the option max_tokens.")
    if wanted.choice is not None and text not in wanted.choice:
        raise AnswerUnfit("the worker's answer is none of the choices")
    if wanted.json is not None:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise AnswerUnfit("the worker's answer is not JSON") from None


def _instead(on_error: OnError, error: StrataError) -> str:
    """What a failed row is answered with, if the statement is to go on."""
    if on_error is OnError.NULL:
        raise NullAnswer("the answer is NULL") from error
    if on_error is OnError.DETAIL:
        return json.dumps({"error": {"sqlstate": error.sqlstate, "code": error.code, "message": error.message}})
    raise error
