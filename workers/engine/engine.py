"""The engine: a thread that steps the model over all running requests, and the thread-safe face the worker talks to.

Other threads never touch the scheduler or the cache: what they want is posted to the engine's thread and done between two
steps. Every accepted request is answered with exactly one FinishedEvent, also when the engine dies.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch

from stratakv.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    StrataError,
    Unavailable,
)
from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from workers.engine.answers import End, take_token
from workers.engine.checks import check_request
from workers.engine.config import EngineConfig
from workers.engine.connector import KVConnector
from workers.engine.errors import EngineFailed, NotFinite
from workers.engine.kv_cache import KVCache
from workers.engine.model import Model
from workers.engine.requests import (
    EngineEvent,
    EngineRequest,
    FinishedEvent,
    FinishReason,
    OnEvent,
)
from workers.engine.reservations import Reservations
from workers.engine.sampler import Sample
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence as RunningSequence
from workers.engine.stats import EngineStats, StatsKeeper
from workers.engine.step import PartOutcome, StepRunner

_log = EventLogger(__name__)
_WAIT_S = 0.05
"""How often deadlines are looked at while nothing can be computed."""


class Engine:
    """One model on one device. `start` it once; `shutdown` ends it for good."""

    def __init__(
        self,
        config: EngineConfig,
        connector: KVConnector | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        new_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        """Load the model. Raises SetupError if it cannot be run."""
        self.config = config
        self._connector = connector
        self._clock = clock
        self._new_seed = new_seed
        self._stats = StatsKeeper()
        self._lock = threading.Condition()
        self._posted: deque[Callable[[], None]] = deque()
        self._known: dict[str, RunningSequence] = {}
        """Accepted requests that have no terminal event yet; guarded by the lock."""
        self._num_arriving = 0
        self._stopping = False
        self._failure: BaseException | None = None
        self._started = False
        self._runner: StepRunner | None = None
        loaded: Future[tuple[Model, KVCache]] = Future()
        self._thread = threading.Thread(target=self._run, args=(loaded,), name="engine", daemon=True)
        self._thread.start()
        self.model, self.kv_cache = loaded.result()
        self.reservations = Reservations(self.kv_cache, self._post, lambda: bool(self._scheduler.waiting))
        self._scheduler = Scheduler(config, self.kv_cache, self.reservations.released, self._find)

    # --- any thread ---------------------------------------------------------------------------------------------------

    def attach(self, connector: KVConnector | None) -> None:
        """Set the lower tiers, which may themselves need `kv_cache`. Before `start` only."""
        with self._lock:
            if self._started:
                raise StrataError("The engine is running; its connector cannot be changed.")
            self._connector = connector

    def start(self) -> None:
        """Begin to serve; requests submitted before wait for it."""
        with self._lock:
            self._started = True
            self._lock.notify()

    def submit(self, request: EngineRequest, on_event: OnEvent) -> None:
        """Queue a request, whose `external` and `held` are released by the engine from then on.

        Raises InvalidRequest, Overloaded or Unavailable; then no event follows and both stay the caller's.
        """
        check_request(request, self.config, self.model.facts)
        seed = request.sampling.seed
        sequence = RunningSequence(
            request=request,
            on_event=on_event,
            block_size=self.config.block_size,
            seed=self._new_seed() if seed is None else seed,
            arrived_at=self._clock(),
            eos_token_ids=self.model.facts.eos_token_ids,
        )
        with self._lock:
            self._check_open()
            if request.request_id in self._known:
                raise InvalidRequest(f"Request {request.request_id} is running already.", param="request_id")
            if len(self._scheduler.waiting) + self._num_arriving >= self.config.max_waiting:
                raise Overloaded(f"{self.config.max_waiting} requests are waiting already.", hint="Try again later.")
            self._known[request.request_id] = sequence
            self._num_arriving += 1
            self._posted.append(lambda: self._arrive(sequence))
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        """End a request with `cancelled`; nothing happens if it is unknown or has ended."""
        self._post(lambda: self._cancel(request_id))

    def drop_l1(self, timeout_s: float = 30.0) -> int:
        """Forget all cached blocks that no request uses; how many. Raises Unavailable if the engine does not get to it."""
        dropped: Future[int] = Future()
        with self._lock:
            self._check_open()
            self._posted.append(lambda: dropped.set_result(self.kv_cache.drop_unreferenced()))
            self._lock.notify()
        try:
            return dropped.result(timeout_s)
        except TimeoutError as error:
            raise Unavailable(f"The engine has not answered for {timeout_s} s.") from error

    def num_cached_blocks(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks L1 holds right now."""
        return self.kv_cache.num_cached(keys)

    @property
    def failure(self) -> BaseException | None:
        """Why the engine stopped by itself; None while it is healthy."""
        return self._failure

    def stats(self) -> EngineStats:
        """State at the end of the last step."""
        return replace(self._stats.latest, waiting=self._stats.latest.waiting + self._num_arriving)

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Stop after the running step; unfinished requests end with Unavailable. Safe to repeat."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _post(self, action: Callable[[], None]) -> None:
        with self._lock:
            self._posted.append(action)
            self._lock.notify()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineFailed("The engine has failed.", hint="The worker must be restarted.")
        if self._stopping:
            raise Unavailable("The engine is shutting down.")

    # --- engine thread ------------------------------------------------------------------------------------------------

    def _run(self, loaded: Future[tuple[Model, KVCache]]) -> None:
        # All of torch's work stays on this thread: each thread that computes has a pool of OpenMP workers of its own, and
        # two pools on the same cores double the time of small operations.
        try:
            loaded.set_result(self._load())
        except BaseException as error:
            loaded.set_exception(error)
            return
        with self._lock:
            self._lock.wait_for(lambda: self._started or self._stopping)
        try:
            self._runner = StepRunner(self.model, self.kv_cache, self._connector, self._release_later)
            while self._await_work():
                self._step()
        except BaseException as error:
            _log.exception("engine_failed")
            self._failure = error
        self._end_all()
        if self._runner is not None:
            self._runner.close()

    def _load(self) -> tuple[Model, KVCache]:
        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        model = Model(
            config.model_dir, config.dtype, config.torch_device, config.max_model_len, block_size=config.block_size
        )
        return model, KVCache(model.facts, config.num_blocks, config.block_size, config.torch_device)

    def _await_work(self) -> bool:
        """Do what was posted; wait while there is nothing to compute. False when the engine is to stop."""
        while True:
            if self._is_idle():
                self.kv_cache.check()
                self._publish_stats()
            with self._lock:
                if self._is_idle():
                    self._lock.wait_for(lambda: self._posted or self._stopping)
                posted = list(self._posted)
                self._posted.clear()
                if self._stopping:
                    return False
            for action in posted:
                action()
            self._expire()
            if not self._is_idle():
                return True

    def _is_idle(self) -> bool:
        return not self._scheduler.running and not self._scheduler.waiting

    def _step(self) -> None:
        parts = self._scheduler.schedule()
        now = self._clock()
        if not parts:
            # What is waited for, blocks that are being written down or an answer of the tiers below, will be posted.
            with self._lock:
                self._lock.wait_for(lambda: self._posted or self._stopping, timeout=_WAIT_S)
            return
        for part in parts:
            if part.sequence.scheduled_at is None:
                part.sequence.scheduled_at = now
        assert self._runner is not None
        outcomes = self._runner.run(parts)
        for outcome in outcomes:
            self._settle(outcome)
        self._stats.count_step(outcomes, self._clock() - now)
        self._publish_stats()

    def _settle(self, outcome: PartOutcome) -> None:
        sequence = outcome.part.sequence
        if outcome.part.load_first_block is not None:
            sequence.release_external()
        if outcome.load_error is not None:
            self._scheduler.load_failed(outcome.part, outcome.load_error.num_good_blocks)
            _log.warning("kv_load_failed", num_good_blocks=outcome.load_error.num_good_blocks)
        elif outcome.sample is None:
            error = NotFinite("The model's output for this request is not a finite number.")
            self._finish(sequence, End(FinishReason.ERROR, error))
        elif outcome.structure_error is not None:
            self._finish(sequence, End(FinishReason.ERROR, outcome.structure_error))
        else:
            samples = outcome.part.samples
            self._scheduler.computed(outcome.part)
            if samples:
                self._take_token(sequence, outcome.sample)

    def _take_token(self, sequence: RunningSequence, sampled: Sample) -> None:
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        event, end = take_token(sequence, sampled, self.model.facts.eos_token_ids)
        if event is not None:
            self._emit(sequence, event)
        if end is not None:
            self._finish(sequence, end)

    def _arrive(self, sequence: RunningSequence) -> None:
        with self._lock:
            self._num_arriving -= 1
            self._scheduler.waiting.append(sequence)

    def _find(self, sequence: RunningSequence, num_l1_blocks: int) -> bool:
        """Have the tiers below asked for what a preempted sequence has lost; False if there are none."""
        if self._connector is None:
            return False
        keys = sequence.keys[: sequence.num_reusable_blocks]
        self._connector.find(keys, num_l1_blocks, lambda hit: self._post(lambda: self._scheduler.found(sequence, hit)))
        return True

    def _cancel(self, request_id: str) -> None:
        sequence = self._known.get(request_id)
        if sequence is not None:
            self._finish(sequence, End(FinishReason.CANCELLED, Cancelled("The request was cancelled.")))

    def _expire(self) -> None:
        now = self._clock()
        late = [s for s in self._scheduler.sequences() if s.request.deadline is not None and s.request.deadline <= now]
        for sequence in late:
            self._finish(sequence, End(FinishReason.DEADLINE, DeadlineExceeded("The request's deadline has passed.")))

    def _finish(self, sequence: RunningSequence, end: End) -> None:
        self._scheduler.remove(sequence)
        self._answer(sequence, end)

    def _answer(self, sequence: RunningSequence, end: End) -> None:
        with self._lock:
            del self._known[sequence.request_id]
        usage = sequence.usage(self._clock())
        self._emit(sequence, FinishedEvent(sequence.request_id, end.reason, end.error, usage, end.stop_token_id))

    def _emit(self, sequence: RunningSequence, event: EngineEvent) -> None:
        try:
            sequence.on_event(event)
        except Exception:
            # The listener is not ours: whatever it raises must not cost the other requests their engine.
            _log.exception("event_listener_failed")

    def _release_later(self, blocks: Sequence[int]) -> None:
        self._post(lambda: self.kv_cache.release(blocks))

    def _publish_stats(self) -> None:
        self._stats.publish(self.kv_cache.use, self._scheduler, healthy=self._failure is None)

    def _end_all(self) -> None:
        """Terminal events for all that is left; nothing is accepted any more."""
        with self._lock:
            self._stopping = True
            left = list(self._known.values())
        for sequence in left:
            error = (
                EngineFailed("The engine failed while it worked on this request.")
                if self._failure is not None
                else Unavailable("The engine is shutting down.")
            )
            try:
                self._scheduler.ahead.drop(sequence)
                sequence.release_external()
            except StrataError:
                _log.exception("release_failed")
            self._answer(sequence, End(FinishReason.ERROR, error))
        self._publish_stats()
