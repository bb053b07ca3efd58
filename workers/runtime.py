"""One worker: the engine, the tiers below it, and what others may know of both.

Owned by `workers.service`; the HTTP face calls it. Requests pass here from text or token ids to keys, ask the tiers for the
prefix, and enter the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import msgspec

from stratakv.errors import ContextTooLong, DeadlineExceeded, Overloaded, StrataError, Unavailable
from stratakv.keys import BlockKey, block_keys, salt_extra
from stratakv.log import EventLogger
from stratakv.text import Detokenizer
from stratakv.wire import WorkerInfo, WorkerLoad
from stratakv.worker_profile import WorkerProfile
from workers.api import CompletionRequest
from workers.engine.engine import Engine
from workers.engine.requests import EngineEvent, EngineRequest, FinishedEvent, OnEvent
from workers.engine.reservations import HeldBlocks
from workers.engine.structured import Structure, Structures
from workers.generation import Generation
from workers.handover.errors import HandoverFailed
from workers.handover.incoming import HandoverTaker
from workers.handover.outgoing import HandoverBook, Outgoing
from workers.metrics import WorkerMetrics
from workers.rates import Rates
from workers.request_journal import RequestJournal
from workers.tiers.tiers import Saved, Tiers

log = EventLogger("workers.runtime")


class Runtime:
    """A worker's state and the one way to start a request."""

    def __init__(
        self,
        info: WorkerInfo,
        dtype: str,
        engine: Engine,
        tiers: Tiers | None,
        tokenizer: Any,
        structures: Structures,
        rates: Rates,
        metrics: WorkerMetrics,
        handovers: HandoverBook,
        taker: HandoverTaker | None,
        journal: RequestJournal | None = None,
    ) -> None:
        self.info = info
        self.dtype = dtype
        self.metrics = metrics
        self.handovers = handovers
        self.journal = journal
        """None: nothing is written down."""
        self._taker = taker
        self.draining = False
        self._warm = False
        self._engine = engine
        self._tiers = tiers
        self._tokenizer = tokenizer
        self._structures = structures
        self._rates = rates
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._tokens_to_prefill = 0
        self._tokenize = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._compile = ThreadPoolExecutor(1, thread_name_prefix="compile")

    @property
    def healthy(self) -> bool:
        return self._engine.failure is None

    @property
    def in_flight(self) -> int:
        """Requests accepted and not ended."""
        return self._in_flight

    def open(self) -> None:
        """Let requests in; what is computed from now on is worth keeping."""
        self._warm = True
        if self._tiers is not None:
            self._tiers.open()

    def publishes(self, events_port: int, replay_port: int) -> None:
        """Blocks of L1 are told of at these ports."""
        host = urlsplit(self.info.url).netloc.rpartition(":")[0]
        events, replay = (f"tcp://{host}:{port}" for port in (events_port, replay_port))
        self.info = msgspec.structs.replace(self.info, events=events, replay=replay)

    async def wait_idle(self) -> None:
        """Until nothing is in flight."""
        await self._idle.wait()

    def not_ready_reasons(self) -> list[str]:
        """Why no request should be sent here; empty when ready."""
        reasons = []
        if not self._warm:
            reasons.append("warming up")
        if self.draining:
            reasons.append("draining")
        if not self.healthy:
            reasons.append("engine stopped")
        return reasons

    async def start(self, body: CompletionRequest, request_id: str, arrived: float) -> Generation:
        """Admit a request. Raises ContextTooLong, Overloaded or Unavailable before any work is done."""
        reasons = self.not_ready_reasons()
        if reasons:
            raise Unavailable(f"this worker takes no requests: {', '.join(reasons)}")
        prompt = await self._token_ids(body.prompt)
        if len(prompt) + body.max_tokens > self.info.max_model_len:
            raise ContextTooLong(
                f"{len(prompt)} prompt tokens and {body.max_tokens} to generate are more than the model's context of"
                f" {self.info.max_model_len} tokens",
                param="max_tokens",
            )
        resumed, held = await self._resumed(body, prompt)
        try:
            return await self._submit(body, request_id, arrived, prompt, resumed, held)
        except BaseException:
            self._engine.reservations.release(held.blocks)
            raise

    async def _resumed(self, body: CompletionRequest, prompt: list[int]) -> tuple[list[int], HeldBlocks]:
        """What was generated elsewhere, and the blocks of the prompt that were brought from there. Raises HandoverFailed."""
        transfer = body.transfer
        if not transfer.remote_request_id:
            return transfer.output_token_ids, HeldBlocks()
        if self._taker is None:
            raise HandoverFailed("this worker has no pool to take a prompt over by")
        keys = block_keys(prompt, self.info.block_size, first_block_extra=salt_extra(body.cache_salt))
        try:
            async with asyncio.timeout(body.timeout_s):
                taken = await self._taker.take(transfer.remote_url, transfer.remote_request_id, keys)
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed") from None
        return taken.token_ids, taken.held

    async def _submit(
        self,
        body: CompletionRequest,
        request_id: str,
        arrived: float,
        prompt: list[int],
        resumed: list[int],
        held: HeldBlocks,
    ) -> Generation:
        if len(resumed) >= body.max_tokens:
            raise ContextTooLong(f"all {body.max_tokens} tokens were generated elsewhere already", param="max_tokens")
        structure = await self._structure(body, resumed)
        keys = block_keys(prompt + resumed, self.info.block_size, first_block_extra=salt_extra(body.cache_salt))
        num_cached = self._engine.num_cached_blocks(keys)
        external = await self._tiers.lookup(keys, num_cached) if self._tiers is not None else None
        if external is not None:
            num_cached += len(external.pages)
        num_to_prefill = max(1, len(prompt) + len(resumed) - num_cached * self.info.block_size)
        detokenizer = Detokenizer(
            self._tokenizer,
            body.stop_strings,
            skip_special=body.skip_special_tokens,
            min_tokens=body.min_tokens,
            shows_stop=body.include_stop_str_in_output,
        )
        detokenizer.push(resumed)
        num_prompt_keys = len(prompt) // self.info.block_size
        prompt_keys = keys[:num_prompt_keys]
        followed = self._followed(body, request_id, prompt_keys)
        generation = Generation(prompt_keys, detokenizer, lambda: self._engine.cancel(request_id), followed)
        request = EngineRequest(
            request_id=request_id,
            token_ids=prompt,
            resume_token_ids=resumed,
            sampling=body.sampling(),
            keys=keys,
            external=external,
            deadline=None if body.timeout_s is None else arrived + body.timeout_s,
            structure=structure,
            held=held,
            cache_salt=body.cache_salt,
            owner=body.owner,
        )
        try:
            self._engine.submit(request, self._observed(generation, arrived, num_to_prefill))
        except StrataError:
            if external is not None:
                external.release()
            self.request_over(generation)
            raise
        self._in_flight += 1
        self._idle.clear()
        self._tokens_to_prefill += num_to_prefill
        return generation

    def _followed(self, body: CompletionRequest, request_id: str, keys: Sequence[BlockKey]) -> Outgoing | None:
        """The hand-over of a request that another worker follows; one too many is not handed over."""
        if not (body.stream and body.transfer.do_remote_decode and body.transfer.is_followed and self.hands_over):
            return None
        try:
            return self.handovers.open(request_id, keys)
        except Overloaded as error:
            log.info("handover_refused", error=error.message)
            return None

    def request_over(self, generation: Generation) -> None:
        """The request has been answered, or never will be."""
        if generation.followed is not None:
            self.handovers.request_over(generation.followed)

    def _observed(self, generation: Generation, arrived: float, num_to_prefill: int) -> OnEvent:
        """The engine's listener: passes events on to the generation and counts them here."""
        loop = asyncio.get_running_loop()
        prefilling = True

        def observe(event: EngineEvent) -> None:
            nonlocal prefilling
            if prefilling:
                prefilling = False
                self._tokens_to_prefill -= num_to_prefill
                if not isinstance(event, FinishedEvent):
                    self.metrics.time_to_first_token(time.monotonic() - arrived)
            if isinstance(event, FinishedEvent):
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()
                self._rates.observe(event.usage)
                self.metrics.request_ended(event.reason.value, event.usage)
                if self.journal is not None:
                    self.journal.add(event.request_id, event.usage)
            generation.take(event)

        def on_event(event: EngineEvent) -> None:
            loop.call_soon_threadsafe(observe, event)

        return on_event

    async def _token_ids(self, prompt: list[int] | str) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        loop = asyncio.get_running_loop()
        encode = self._tokenizer.encode
        return await loop.run_in_executor(self._tokenize, lambda: list(encode(prompt, add_special_tokens=False)))

    async def _structure(self, body: CompletionRequest, resumed: list[int]) -> Structure | None:
        if body.structured_outputs is None:
            return None
        form = body.structured_outputs.form()
        return await asyncio.get_running_loop().run_in_executor(
            self._compile, self._structures.structure, form, resumed, body.cache_salt
        )

    @property
    def hands_over(self) -> bool:
        """Whether prompts can be handed over to this worker, and from it, while they are computed."""
        return self._taker is not None

    @property
    def max_running(self) -> int:
        """Sequences decoded at once."""
        return self._engine.config.max_running

    async def wait_saved(self, keys: Sequence[BlockKey], timeout_s: float, lease_s: float = 0.0) -> Saved:
        """Whether these blocks can be found in the pool, waiting for writes that are under way."""
        if self._tiers is None:
            return Saved(is_whole=False)
        return await self._tiers.wait_saved(keys, timeout_s, lease_s)

    def release_lease(self, lease_id: int) -> None:
        if self._tiers is not None:
            self._tiers.release_lease(lease_id)

    async def drop_cache(self, tiers: frozenset[str]) -> dict[str, int]:
        """Forget what L1 or L2 hold and nobody is using; the numbers of blocks dropped."""
        dropped = {"l1_blocks": 0, "l2_blocks": 0}
        if "l1" in tiers:
            dropped["l1_blocks"] = await asyncio.to_thread(self._engine.drop_l1)
        if "l2" in tiers and self._tiers is not None:
            dropped["l2_blocks"] = self._tiers.drop_l2()
        return dropped

    @property
    def profile(self) -> WorkerProfile:
        """What it measured of itself at its start."""
        return self._rates.profile

    def load(self) -> WorkerLoad:
        """What the router wants to know."""
        stats = self._engine.stats()
        return WorkerLoad(
            running=stats.running,
            waiting=stats.waiting,
            waiting_tokens=self._tokens_to_prefill,
            l1_blocks_total=stats.blocks_total,
            l1_blocks_free=stats.blocks_free,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_step_s=self._rates.decode_step_s,
            load_bytes_per_s=self._rates.load_bytes_per_s(),
            slowdown=self._rates.slowdown,
            draining=self.draining,
        )
