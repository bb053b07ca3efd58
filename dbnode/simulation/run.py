"""Replays a trace on a simulated fleet, with the router's own code under a clock that jumps from event to event.

`Planner` chooses and counts, `Fleet` and `BlockIndex` believe what they are told; only workers, pool and time are simulated.
The same trace, settings and seed give the same report.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from dbnode.scheduler.fleet import Fleet, WorkerRecord
from dbnode.scheduler.index import Medium, tails
from dbnode.scheduler.overload import is_late
from dbnode.scheduler.planner import Planner, PromptKeys, scope
from dbnode.simulation.caches import LruBlocks
from dbnode.simulation.report import SimReport
from dbnode.simulation.request import SimRequest
from dbnode.simulation.trace import TraceRequest
from dbnode.simulation.worker import SimWorker, WorkerModel
from dbnode.worker_messages import WorkerFacts
from stratakv.keys import BlockKey
from stratakv.settings import RouterPolicy, RouterSettings
from stratakv.wire import WorkerRole
from stratakv.worker_profile import Curves, WorkerProfile

MODEL = "simulated"
NAMESPACE = "00" * 16
CONTEXT_TOKENS = 2**31


@dataclass(frozen=True, slots=True)
class SimSettings:
    """A fleet and its router."""

    workers: int = 8
    block_tokens: int = 512
    prefill_tokens_per_s: float = 7000.0
    l1_blocks: int = 8000
    decode_step_s: float = 0.03
    kv_bytes_per_token: int = 131_072
    pool_bytes_per_s: float = 0.0
    """How fast a worker loads from the pool; 0: there is no pool."""
    pool_blocks: int = 0
    """0: without bounds."""
    profile: WorkerProfile = WorkerProfile()
    """What workers have measured of themselves: where it says something, computing takes what its curves say."""
    ttft_max_s: float = 0.0
    """Requests whose first token the load would make come later are refused; 0: none is."""
    events_lag_s: float = 0.05
    """After so long the router knows of what a worker's L1 got and lost."""
    seed: int = 0
    router: RouterSettings = field(default_factory=RouterSettings)

    @property
    def policy(self) -> RouterPolicy:
        return self.router.policy

    def model(self) -> WorkerModel:
        return WorkerModel(
            self.block_tokens,
            self.prefill_tokens_per_s,
            self.l1_blocks,
            self.decode_step_s,
            self.kv_bytes_per_token,
            self.pool_bytes_per_s,
            Curves(self.profile) if self.profile.prefill else None,
        )


class VirtualTime:
    """What happens, in order of time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def __call__(self) -> float:
        return self.now_s

    def at(self, when_s: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), happens))

    def run(self) -> None:
        while self._events:
            self.now_s, _, happens = heapq.heappop(self._events)
            happens()


class Simulation:
    """One replay; `run` once."""

    def __init__(self, trace: Sequence[TraceRequest], settings: SimSettings) -> None:
        self._trace = trace
        self._settings = settings
        self._model = settings.model()
        self._time = VirtualTime()
        fleet = Fleet(settings.router, self._time)
        self._planner = Planner(
            settings.router,
            fleet,
            settings.kv_bytes_per_token,
            random.Random(settings.seed),
            self._time,
            self._time,
        )
        self._pool = LruBlocks(settings.pool_blocks) if settings.pool_bytes_per_s else None
        self._workers: dict[str, SimWorker] = {}
        self._records: list[WorkerRecord] = []
        self._pending = len(trace)
        self._done: list[SimRequest] = []
        for number in range(settings.workers):
            self._add_worker(fleet, number)

    def run(self) -> SimReport:
        for number, request in enumerate(self._trace):
            self._time.at(request.at_s, partial(self._arrive, number, request))
        self._time.at(self._settings.router.refresh_s, self._report_load)
        self._time.run()
        return SimReport.of(len(self._trace), self._done, self._settings.block_tokens)

    def _add_worker(self, fleet: Fleet, number: int) -> None:
        name = f"w{number}"
        record = fleet.add(f"http://{name}")
        record.index.believe()
        size, profile = self._settings.block_tokens, self._settings.profile
        facts = WorkerFacts(name, name, WorkerRole.BOTH, MODEL, NAMESPACE, size, CONTEXT_TOKENS, profile=profile)
        worker = SimWorker(self._model, self._pool, partial(self._told, record))
        fleet.heard(record, facts, worker.load(), -1.0)  # before any request
        record.index.believe()
        self._workers[record.url] = worker
        self._records.append(record)

    def _arrive(self, number: int, request: TraceRequest) -> None:
        size = self._settings.block_tokens
        keys = PromptKeys(range(request.prompt_tokens), known={size: list(request.keys)})
        records = self._planner.able(MODEL, request.prompt_tokens + request.output_tokens)
        pool_tokens = {scope(records[0]): self._pool.match(request.keys) * size} if self._pool is not None else {}
        held = self._planner.held_tokens(records, keys)
        if self._settings.ttft_max_s:
            forecast = self._planner.forecast(records, keys, held, pool_tokens)
            if forecast is not None and is_late(forecast, self._settings.ttft_max_s):
                self._pending -= 1
                return
        plan = self._planner.choose(
            str(number), records, keys, max(1, request.output_tokens), held, pool_tokens, may_split=False
        )
        sim = SimRequest(number, request, self._planner.send(plan.worker, keys, plan.uncached_tokens))
        worker = self._workers[plan.worker.url]
        worker.arrive(sim)
        self._begin(plan.worker, worker)

    def _begin(self, record: WorkerRecord, worker: SimWorker) -> None:
        done_s = worker.begin(self._time.now_s)
        if done_s is not None:
            self._time.at(done_s, partial(self._prefilled, record, worker))

    def _prefilled(self, record: WorkerRecord, worker: SimWorker) -> None:
        sim = worker.finish(self._time.now_s)
        self._planner.prefilled(record, sim.sent)
        self._done.append(sim)
        self._await_end(record, worker)
        self._begin(record, worker)

    def _await_end(self, record: WorkerRecord, worker: SimWorker) -> None:
        end_s = worker.decoding.next_end_s
        if end_s is not None:
            self._time.at(end_s, partial(self._ended, record, worker, end_s))

    def _ended(self, record: WorkerRecord, worker: SimWorker, expected_s: float) -> None:
        if worker.decoding.next_end_s != expected_s:
            return  # others came or went, and it is expected at another time
        for sim in worker.decoding.take_ended(self._time.now_s):
            self._pending -= 1
            self._planner.ended(record, sim.sent)
        self._await_end(record, worker)

    def _told(self, record: WorkerRecord, added: list[BlockKey], left: list[BlockKey]) -> None:
        def know() -> None:
            record.index.stored(tails(added), Medium.DEVICE)
            record.index.removed(tails(left), Medium.DEVICE)

        self._time.at(self._time.now_s + self._settings.events_lag_s, know)

    def _report_load(self) -> None:
        for record in self._records:
            assert record.facts is not None
            load = self._workers[record.url].load()
            self._planner.fleet.heard(record, record.facts, load, self._time.now_s)
        if self._pending:
            self._time.at(self._time.now_s + self._settings.router.refresh_s, self._report_load)


def simulate(trace: Sequence[TraceRequest], settings: SimSettings) -> SimReport:
    """Replay all requests of a trace."""
    return Simulation(trace, settings).run()
