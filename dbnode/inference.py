"""The one way to an answer: text to tokens, admission, workers, tokens to text, usage.

Called by the REST and the SQL face; owns admission. Nothing of a request outlives it but its usage event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Protocol

from dbnode.admission import Admission
from dbnode.dispatch import Dispatch, Job
from dbnode.errors import NoWorker
from dbnode.generate import (
    Chunk,
    FinishReason,
    GenerateRequest,
    Outcome,
    Settled,
    Source,
)
from dbnode.progress import Progress
from dbnode.prompt_tokens import PromptTokens
from dbnode.scheduler.planner import PromptKeys
from dbnode.scheduler.scheduler import Scheduler
from dbnode.slo import SloTargets, targets_of
from dbnode.suspects import Suspects
from dbnode.tenants.account import Reservation
from dbnode.tenants.charges import charged_micros, reserve, settle
from dbnode.tenants.quotas import Quotas
from dbnode.worker_base import WorkerDoor
from stratakv.errors import (
    Cancelled,
    ContextTooLong,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    StrataError,
    Unavailable,
)
from stratakv.log import EventLogger
from stratakv.settings import RouterSettings
from stratakv.text import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = EventLogger("dbnode.inference")

GIVEN_PER_RUNNING = 2
"""Requests a worker is given for each that it runs at once; the rest wait here, where they can still be routed."""
HASH_INLINE_TOKENS_MAX = 4096
"""The keys of longer prompts are computed off the event loop."""
STOP_SETTLE_S = 1.0
"""After a stop string, how long the worker is given to say what the prompt cost."""


class Observer(Protocol):
    """Told of every request: metrics and usage events."""

    def first_token(self, source: Source, ttft_s: float) -> None: ...

    def settled(self, settled: Settled) -> None: ...


class InferenceService:
    """Generates answers on the workers."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerFast,
        client: WorkerDoor,
        scheduler: Scheduler,
        suspects: Suspects,
        observers: tuple[Observer, ...],
        waiting_max: dict[Source, int],
        router: RouterSettings,
        quotas: Quotas | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.suspects = suspects
        self.draining = False
        self.quotas = quotas
        self.tokens = PromptTokens(tokenizer)
        self._client = client
        self._observers = observers
        self._router = router
        self._clock = clock
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.admission = Admission(self._running_max, waiting_max, self._wait_s)

    @property
    def in_flight(self) -> int:
        """Requests that have arrived and not ended."""
        return self._in_flight

    def max_model_len(self) -> int:
        """The longest context a worker offers now; 0 without workers."""
        lengths = (r.facts.max_model_len for r in self.scheduler.directory.usable(self.model) if r.facts)
        return max(lengths, default=0)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """The answer, piece by piece; the last piece has `finish_reason` and `usage`. Closing it cancels the request.

        Raises InvalidRequest, ContextTooLong, ModelNotFound, Overloaded, Unavailable, DeadlineExceeded, WorkersExhausted.
        """
        progress = Progress(request)
        outcome: Outcome = Outcome.CANCELLED
        error: StrataError | None = None
        self._in_flight += 1
        self._idle.clear()
        try:
            job = await self._prepare(request, progress)
            await self._check_time(job, request)
            progress.reservation = await self._reserved(request, job)
            if self.admission.is_full:
                self.scheduler.fetch_ahead(self.model, job.keys)
            prompt_tokens = len(job.keys.token_ids)
            async with self.admission.slot(
                request.source,
                job.deadline_s,
                request.priority,
                tenant=request.caller.tenant,
                cost_tokens=prompt_tokens + job.max_tokens,
                prompt_tokens=prompt_tokens,
            ) as took:
                progress.started_s = self._clock()
                try:
                    async with aclosing(self._answer(job, progress)) as chunks:
                        async for chunk in chunks:
                            if chunk.finish_reason is not None:
                                outcome = Outcome.COMPLETED
                            yield chunk
                finally:
                    took(progress.num_tokens)
        except StrataError as raised:
            outcome, error = Outcome.FAILED, raised
            raise
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            self._settle(progress, outcome, error)

    async def count_tokens(self, text: str, model: str | None) -> int:
        """Tokens of the text itself, without what a chat puts around it. Raises ModelNotFound."""
        self.check_model(model)
        return len(await self.tokens.of_text(text, special=False))

    async def prompt_keys(self, requests: Sequence[GenerateRequest]) -> list[PromptKeys]:
        """Of requests that are not made; computed off the event loop. Raises ModelNotFound, PermissionDenied, InvalidRequest."""
        for request in requests:
            self.check_allowed(request)
        sizes = self._block_sizes()

        def make() -> list[PromptKeys]:
            found = [PromptKeys(self.tokens.of_chat(request), request.kv_salt) for request in requests]
            for keys in found:
                for size in sizes:
                    keys.of_size(size)
            return found

        return await self.tokens.aside(make)

    async def keys_of(self, request: GenerateRequest) -> PromptKeys:
        """Of a request that is not made. Raises ModelNotFound, PermissionDenied, InvalidRequest."""
        self.check_allowed(request)
        return await self._keys(await self.tokens.of(request), request)

    async def drained(self, timeout_s: float) -> bool:
        """Take nothing new, and wait until what is in flight has ended."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.tokens.close()

    async def _prepare(self, request: GenerateRequest, progress: Progress) -> Job:
        """All that can refuse a request before it costs a worker anything."""
        if self.draining and request.source is Source.REST:  # statements that run may still ask for rows
            raise Unavailable("this DB node is shutting down")
        self.check_allowed(request)
        token_ids = await self.tokens.of(request)
        progress.prompt_tokens = len(token_ids)
        context = self.max_model_len()
        if not context:
            raise NoWorker(f"no worker is there for model {self.model}")
        if request.prompt_tokens_max is not None:
            room = max(1, context - (request.sampling.max_tokens or 1))
            token_ids = token_ids[-(request.prompt_tokens_max or room) :]
            progress.prompt_tokens = len(token_ids)
        max_tokens = self._max_tokens(request, len(token_ids), context)
        deadline_s = request.arrived_s + self._router.request_timeout_s
        if request.deadline_s is not None:
            deadline_s = min(deadline_s, request.deadline_s)
        return Job(
            request_id=request.request_id,
            model=self.model,
            keys=await self._keys(token_ids, request),
            sampling=request.sampling,
            max_tokens=max_tokens,
            deadline_s=deadline_s,
            tpot_max_s=self._targets(request).tpot_s,
            traceparent=request.traceparent,
            owner=request.caller.tenant.id,
        )

    def _max_tokens(self, request: GenerateRequest, num_prompt: int, context: int) -> int:
        """How many it may generate, by default all that the context has room for. Raises InvalidRequest, ContextTooLong."""
        sampling = request.sampling
        max_tokens = context - num_prompt if sampling.max_tokens is None else sampling.max_tokens
        self.tokens.checked(sampling.stop_token_ids, "stop_token_ids")
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens: at most max_tokens, which is {max_tokens}", param="min_tokens")
        if num_prompt + max(1, max_tokens) > context:
            raise ContextTooLong(
                f"the prompt has {num_prompt} tokens and {max(1, max_tokens)} are to be generated, together more than"
                f" the context of {context} tokens",
                param="messages" if request.messages is not None else "prompt",
            )
        return max_tokens

    async def _reserved(self, request: GenerateRequest, job: Job) -> Reservation | None:
        """Room in its tenant's quota, and a place among its tenant's requests. Raises QuotaExceeded, Unavailable."""
        if self.quotas is None or not request.caller.tenant.limits.is_limited:
            return None
        return await reserve(self.quotas, request, len(job.keys.token_ids), job.max_tokens, job.deadline_s)

    async def _check_time(self, job: Job, request: GenerateRequest) -> None:
        """Raises ExpectedTooLate."""
        wanted_s = job.deadline_s
        ttft_s = self._targets(request).ttft_s
        if ttft_s:
            wanted_s = min(wanted_s, request.arrived_s + ttft_s)
        await self.scheduler.check_time(self.model, job.keys, wanted_s - self._clock(), self.admission.waiting_tokens)

    def _targets(self, request: GenerateRequest) -> SloTargets:
        return targets_of(self._router, request.slo_class, request.source)

    def _wait_s(self) -> float | None:
        return self.scheduler.least_wait_s(self.scheduler.able(self.model, 0))

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound."""
        if name is not None and name != self.model:
            raise ModelNotFound(f"model {name!r} is not served here; {self.model!r} is", param="model")

    def check_allowed(self, request: GenerateRequest) -> None:
        """Raises ModelNotFound, PermissionDenied."""
        self.check_model(request.model)
        models = request.caller.models
        if models is not None and self.model not in models:
            raise PermissionDenied(
                f"model {self.model!r} is not among those that this tenant or key may use", param="model"
            )

    async def _keys(self, token_ids: list[int], request: GenerateRequest) -> PromptKeys:
        """Those of long prompts are computed where they do not hold up other requests."""
        keys = PromptKeys(token_ids, request.kv_salt)
        if len(keys.token_ids) > HASH_INLINE_TOKENS_MAX:
            for size in self._block_sizes():
                await self.tokens.aside(partial(keys.of_size, size))
        return keys

    async def _answer(self, job: Job, progress: Progress) -> AsyncGenerator[Chunk, None]:
        """Tokens to text; ends at a stop string or when the worker ends."""
        dispatch = progress.dispatch = Dispatch(self._client, self.scheduler, self.suspects, job)
        sampling = job.sampling
        wants_scores = sampling.logprobs is not None
        detokenizer = Detokenizer(
            self.tokens.tokenizer,
            sampling.stop,
            skip_special=sampling.skip_special_tokens,
            min_tokens=sampling.min_tokens,
            shows_stop=sampling.include_stop_str_in_output,
        )
        async with aclosing(dispatch.tokens()) as tokens:
            async for token_ids in tokens:
                if not progress.first_token_s:
                    self._first_token(progress)
                text = detokenizer.push(token_ids)
                scores = tuple(dispatch.scores[-len(token_ids) :]) if wants_scores else ()
                yield Chunk(text, tuple(token_ids), scores=scores)
                if detokenizer.stopped:
                    await _let_settle(dispatch, tokens)
                    break
        text = detokenizer.finish()
        reason = FinishReason.STOP if detokenizer.stopped else dispatch.finish_reason
        yield Chunk(text, (), reason or FinishReason.STOP, progress.usage(self._clock()))

    def _first_token(self, progress: Progress) -> None:
        progress.first_token_s = self._clock()
        for observer in self._observers:
            observer.first_token(progress.request.source, progress.first_token_s - progress.request.arrived_s)

    def _settle(self, progress: Progress, outcome: Outcome, error: StrataError | None) -> None:
        usage = progress.usage(self._clock())
        if isinstance(error, Cancelled):
            outcome = Outcome.CANCELLED
        if progress.reservation is not None:
            limits = progress.request.caller.tenant.limits
            micros = charged_micros(limits, usage, outcome) if progress.dispatch is not None else 0
            settle(progress.request, progress.reservation, micros)
        settled = Settled(progress.request, self.model, outcome, error.code if error else None, usage)
        for observer in self._observers:
            observer.settled(settled)
        if progress.request.on_settled is not None:
            progress.request.on_settled(settled)

    def _block_sizes(self) -> set[int]:
        """Of the workers that can be used now."""
        return {r.facts.block_size for r in self.scheduler.directory.usable(self.model) if r.facts}

    def _running_max(self) -> int:
        """Requests that all workers are given at once."""
        untold = self._router.worker_requests_max
        told = (r.facts.max_running for r in self.scheduler.directory.usable(self.model) if r.facts)
        return sum(GIVEN_PER_RUNNING * running or untold for running in told) or untold


async def _let_settle(dispatch: Dispatch, tokens: AsyncGenerator[list[int], None]) -> None:
    """The worker stops at the same stop string; wait for its account of the prompt, but not for long."""
    dispatch.enough = True
    seen = len(dispatch.output)
    try:
        async with asyncio.timeout(STOP_SETTLE_S):
            async for _ in tokens:
                pass
    except (TimeoutError, StrataError) as error:
        log.debug("no_usage_after_stop", error=type(error).__name__)
    del dispatch.output[seen:]
