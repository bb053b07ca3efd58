"""One admitted request on its way over the workers: split or whole, again elsewhere when a worker fails.

Owned by `dbnode.inference`, one object per request. Tokens that have been handed on are never generated again: another worker
continues from them. A request that saw two workers die fails, since it may be what kills them (`dbnode.suspects`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext

import msgspec

from dbnode.errors import HandoverFailed, NoWorker, WorkerLost, WorkerRefused, WorkersExhausted, WorkerUnreachable
from dbnode.generate import FinishReason, PromptTiers, Sampling, TokenScore
from dbnode.scheduler.fleet import Sent, WorkerRecord
from dbnode.scheduler.planner import Plan, PromptKeys
from dbnode.scheduler.scheduler import Scheduler
from dbnode.suspects import PromptId, Suspects, Trial, prompt_id
from dbnode.worker_base import WorkerDoor, WorkerStream
from dbnode.worker_messages import KVTransfer, WorkerChunk, WorkerRequest, WorkerUsage
from stratakv.errors import DeadlineExceeded, Overloaded, StrataError
from stratakv.log import EventLogger

log = EventLogger("dbnode.dispatch")

ATTEMPTS_MAX = 8
"""Workers tried at most, those included that could not be reached."""
RETRIES_BEFORE_TOKENS_MAX = 1
RETRIES_AFTER_TOKENS_MAX = 2
DEATHS_MAX = 2

_ELSEWHERE = (WorkerUnreachable, WorkerRefused, WorkerLost, Overloaded)
"""Failures after which another worker is tried."""


class Job(msgspec.Struct, frozen=True):
    """What is sent to workers."""

    request_id: str
    model: str
    keys: PromptKeys
    sampling: Sampling
    max_tokens: int
    deadline_s: float
    tpot_max_s: float = 0.0
    """What a token should take at most; 0: no matter."""
    traceparent: str | None = None
    owner: int = 0
    """The tenant whose its blocks in the pool are."""


class Dispatch:
    """The workers' side of one request."""

    def __init__(self, client: WorkerDoor, scheduler: Scheduler, suspects: Suspects, job: Job) -> None:
        self._client = client
        self._scheduler = scheduler
        self._suspects = suspects
        self._job = job
        self._prompt: PromptId = prompt_id(job.keys)
        self._trial: Trial | None = None
        """Of a request that saw a worker die."""
        self._is_cause = False
        self._avoid: set[str] = set()
        self._attempt = 0
        self._failures = 0
        self._deaths = 0
        self.output: list[int] = []
        """All tokens handed on so far."""
        self.scores: list[TokenScore] = []
        """Theirs, if the request asks for them."""
        self.finish_reason: FinishReason | None = None
        self.tiers: PromptTiers | None = None
        """Where the prompt's KV came from, as the first worker that had it says."""
        self.queue_ms = 0.0
        """Waiting in that worker."""
        self.enough = False
        """Set by the consumer: no more tokens are wanted, only what the worker has to say at the end."""

    async def tokens(self) -> AsyncGenerator[list[int], None]:
        """Generated tokens as they come. Closing it cancels the request in the worker. Raises what cannot be helped."""
        self._suspects.check(self._prompt)
        last_error: StrataError | None = None
        while self.finish_reason is None:
            plan = await self._plan(last_error)
            try:
                async with aclosing(self._steps(plan)) as attempt:
                    async for token_ids in attempt:
                        yield token_ids
            except _Failed as failed:
                if self.enough:
                    return
                if self._is_ended():
                    self.finish_reason = FinishReason.STOP
                    return
                last_error = self._give_up_or_go_on(failed.record, failed.error)

    def _is_ended(self) -> bool:
        """The last token handed on is one that ends the answer; the worker had no time to say so."""
        return bool(self.output) and self.output[-1] in self._job.sampling.stop_token_ids

    async def _plan(self, last_error: StrataError | None) -> Plan:
        job = self._job
        if self._attempt >= ATTEMPTS_MAX:
            raise WorkersExhausted(f"the request failed on {self._attempt} workers") from last_error
        avoid = frozenset(self._avoid)
        try:
            return await self._scheduler.plan(
                job.request_id, job.model, job.keys, job.max_tokens, avoid, self._attempt, job.tpot_max_s
            )
        except NoWorker:
            if last_error is None:
                raise
            raise last_error from None

    def _steps(self, plan: Plan) -> AsyncGenerator[list[int], None]:
        """An attempt: on one worker, or on two."""
        if plan.prefill is None or self.output:
            return self._decode(plan.worker, KVTransfer(), plan.uncached_tokens)
        if _can_follow(plan.worker, plan.prefill) and self._job.max_tokens > 1:
            return self._split_followed(plan.prefill, plan)
        return self._split(plan.prefill, plan)

    async def _split(self, prefill: WorkerRecord, plan: Plan) -> AsyncGenerator[list[int], None]:
        """Prefill on one worker, then decode on the other, which loads the prompt from the pool."""
        transfer = KVTransfer()
        async with aclosing(self._prefill(prefill, KVTransfer(do_remote_decode=True), plan.uncached_tokens)) as chunks:
            async for chunk in chunks:
                transfer = chunk.transfer or transfer
                if chunk.token_ids:
                    yield chunk.token_ids
        if self.finish_reason is not None:
            return
        # If the prompt did not get into the pool, it is only where it was computed.
        worker, uncached = (plan.worker, 1) if transfer.do_remote_prefill else (prefill, plan.uncached_tokens)
        async with aclosing(self._decode(worker, transfer, uncached)) as decode:
            async for token_ids in decode:
                yield token_ids

    async def _split_followed(self, prefill: WorkerRecord, plan: Plan) -> AsyncGenerator[list[int], None]:
        """Both at once: the decode worker loads what the prefill worker writes, and goes on from its first token."""
        asked = KVTransfer(do_remote_decode=True, is_followed=True)
        following = KVTransfer(
            do_remote_prefill=True, remote_url=prefill.url, remote_request_id=self._request_id(asked)
        )
        is_prefilled = asyncio.Event()
        decode = self._decode(plan.worker, following, 1, after=is_prefilled)
        first = asyncio.ensure_future(anext(decode, None))
        try:
            async with aclosing(self._prefill(prefill, asked, plan.uncached_tokens)) as chunks:
                async for chunk in chunks:
                    if chunk.token_ids:
                        yield chunk.token_ids
            if self.finish_reason is not None:
                return
            is_prefilled.set()
            token_ids = await first
            while token_ids is not None:
                yield token_ids
                token_ids = await anext(decode, None)
            return
        except _Failed as failed:
            if not isinstance(failed.error, HandoverFailed):
                raise
            log.info("handover_failed", url=plan.worker.url, error=failed.error.message)
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await decode.aclose()
        async with aclosing(self._decode(prefill, KVTransfer(), 1)) as steps:
            async for token_ids in steps:
                yield token_ids

    async def _prefill(
        self, record: WorkerRecord, transfer: KVTransfer, num_tokens: int
    ) -> AsyncGenerator[WorkerChunk, None]:
        """Compute the prompt and the first token on one worker, to go on elsewhere.

        The token comes at once; unless the request is followed, the hand-over comes when the prompt's blocks can be found. Some
        answers cannot go on from a token that another worker made; then only the hand-over comes.
        """
        body = self._body(transfer)
        request = msgspec.structs.replace(body, max_tokens=1, min_tokens=min(1, body.min_tokens))
        reason: FinishReason | None = None
        is_handed_over = False
        async with aclosing(self._chunks(record, request, num_tokens)) as chunks:
            async for chunk in chunks:
                reason = chunk.finish_reason or reason
                is_handed_over = is_handed_over or chunk.transfer is not None
                yield chunk
        if reason is None or not (self.output or reason is FinishReason.STOP or is_handed_over):
            raise _Failed(record, WorkerRefused(f"{record.url} answered without a token"))
        if reason is FinishReason.STOP:
            self.finish_reason = FinishReason.STOP
        elif len(self.output) >= self._job.max_tokens:
            self.finish_reason = FinishReason.LENGTH

    async def _decode(
        self, record: WorkerRecord, transfer: KVTransfer, num_tokens: int, after: asyncio.Event | None = None
    ) -> AsyncGenerator[list[int], None]:
        """Generate on one worker up to the end. What it answers is looked at `after` something else."""
        if self.output:
            transfer = msgspec.structs.replace(transfer, output_token_ids=list(self.output))
        reason: FinishReason | None = None
        async with aclosing(self._chunks(record, self._body(transfer), num_tokens, after)) as chunks:
            async for chunk in chunks:
                reason = chunk.finish_reason or reason
                if token_ids := chunk.token_ids:
                    yield token_ids
        if reason is None:
            raise _Failed(record, WorkerRefused(f"{record.url} ended without saying why"))
        self._scheduler.answered(record, self._job.keys, self.output)
        self.finish_reason = reason

    async def _chunks(
        self, record: WorkerRecord, request: WorkerRequest, num_tokens: int, after: asyncio.Event | None = None
    ) -> AsyncGenerator[WorkerChunk, None]:
        """One worker's answer as it streams; its tokens are handed on, `after` those of another one. Raises _Failed."""
        sent = self._scheduler.send(record, self._job.keys, num_tokens)
        trial = self._suspects.trial(record.url, self._job.deadline_s) if self._deaths else nullcontext()
        try:
            async with trial as self._trial:
                try:
                    stream = await self._begun(record, request, sent)
                    sent.abort = stream.close
                    async with stream, aclosing(stream.chunks()) as chunks:
                        if after is not None:
                            await after.wait()
                        async for chunk in chunks:
                            if token_ids := chunk.token_ids:
                                if not sent.prefilled:
                                    self._prefilled(record, sent)
                                if self._job.sampling.logprobs is not None:
                                    self._take_scores(record, chunk)
                                self.output += token_ids
                            if chunk.usage is not None:
                                self._take_usage(chunk.usage)
                            yield chunk
                except _ELSEWHERE as error:
                    self._count_death(error)
                    raise _Failed(record, error) from error
        finally:
            self._scheduler.ended(record, sent)

    async def _begun(self, record: WorkerRecord, request: WorkerRequest, sent: Sent) -> WorkerStream:
        """Wait for a worker's first bytes. Raises WorkerLost when the directory gives the worker up, else DeadlineExceeded."""
        timeout = asyncio.timeout_at(self._job.deadline_s)
        is_silent = False

        def abort() -> None:
            nonlocal is_silent
            is_silent = True
            timeout.reschedule(0)

        sent.abort = abort
        try:
            async with timeout:
                return await self._client.stream(record.url, request, self._job.deadline_s)
        except TimeoutError:
            if is_silent:
                raise WorkerLost(f"{record.url} has been silent for too long") from None
            raise DeadlineExceeded("the request's deadline passed") from None
        finally:
            sent.abort = None

    def _body(self, transfer: KVTransfer) -> WorkerRequest:
        job, sampling = self._job, self._job.sampling
        return WorkerRequest(
            model=job.model,
            prompt=list(job.keys.token_ids),
            request_id=self._request_id(transfer),
            max_tokens=job.max_tokens,
            temperature=sampling.temperature,
            timeout_s=max(0.001, job.deadline_s - time.monotonic()),
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop=list(sampling.stop),
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=list(sampling.stop_token_ids),
            min_tokens=sampling.min_tokens,
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            kv_transfer_params=transfer if transfer != KVTransfer() else None,
            structured_outputs=sampling.structured_outputs,
            cache_salt=job.keys.cache_salt,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=dict(sampling.logit_bias),
            logprobs=sampling.logprobs,
            return_tokens_as_token_ids=sampling.logprobs is not None,
            traceparent=job.traceparent,
            owner=job.owner,
        )

    def _prefilled(self, record: WorkerRecord, sent: Sent) -> None:
        """Its first token is there."""
        self._scheduler.prefilled(record, sent)
        if self._trial is not None:
            self._trial.passed()

    def _take_scores(self, record: WorkerRecord, chunk: WorkerChunk) -> None:
        try:
            scores = chunk.scores
        except ValueError as error:
            raise WorkerRefused(f"{record.url} sends log-probabilities that cannot be read: {error}") from None
        if len(scores) != len(chunk.token_ids):
            raise WorkerRefused(f"{record.url} does not send the log-probabilities that it was asked for")
        self.scores.extend(scores)

    def _request_id(self, transfer: KVTransfer) -> str:
        """What a worker calls the request."""
        return f"{self._job.request_id}-{self._attempt}{'p' if transfer.do_remote_decode else ''}"

    def _take_usage(self, usage: WorkerUsage) -> None:
        if self.tiers is not None:
            return
        said = usage.stratakv
        num_prompt = len(self._job.keys.token_ids)
        if said is None:
            self.tiers = PromptTiers(computed=num_prompt)
            return
        num_cached = min(said.num_cached, num_prompt)
        self.tiers = PromptTiers(num_prompt - num_cached, said.l1, said.l2, said.pool, said.disk)
        self.queue_ms = said.queue_ms

    def _count_death(self, error: StrataError) -> None:
        """Before the trial is over, which a death decides."""
        if isinstance(error, WorkerLost):
            self._deaths += 1
            if self._deaths >= DEATHS_MAX:
                self._is_cause = self._suspects.is_cause(self._prompt, self._trial)

    def _give_up_or_go_on(self, record: WorkerRecord, error: StrataError) -> StrataError:
        """Count a failure. Raises when the request may not be tried again, else returns the error to remember."""
        self._attempt += 1
        self._avoid.add(record.url)
        log.warning("worker_failed_request", url=record.url, error=error.message, tokens=len(self.output))
        if isinstance(error, WorkerUnreachable | WorkerLost):
            self._scheduler.directory.mark_dead(record)
        if self._is_cause:
            raise WorkersExhausted(f"{self._deaths} workers were lost with this request in hand") from error
        if isinstance(error, WorkerRefused | WorkerLost):
            self._failures += 1
            if self._failures > (RETRIES_AFTER_TOKENS_MAX if self.output else RETRIES_BEFORE_TOKENS_MAX):
                raise error
        return error


def _can_follow(decode: WorkerRecord, prefill: WorkerRecord) -> bool:
    """Whether one can take a prompt over from the other while it is computed."""
    ours, theirs = decode.facts, prefill.facts
    if ours is None or theirs is None or not (ours.hands_over and theirs.hands_over):
        return False
    return ours.namespace == theirs.namespace and ours.block_size == theirs.block_size


class _Failed(Exception):
    """An attempt failed in a way that another worker may mend."""

    def __init__(self, record: WorkerRecord, error: StrataError) -> None:
        super().__init__(error.message)
        self.record = record
        self.error = error
