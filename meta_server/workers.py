"""The workers that the routers may use: who they are and what load they report. Kept in memory; rows are for people."""

from __future__ import annotations

from dataclasses import dataclass

from meta_server.presence import Clock, Pulse, RetiredEpochs
from stratakv.errors import Overloaded
from stratakv.wire import HeartbeatWorker, WorkerInfo, WorkerLoad, WorkerState

WORKERS_MAX = 4096


@dataclass(slots=True)
class _Worker:
    info: WorkerInfo
    pulse: Pulse
    load: WorkerLoad


class WorkerTable:
    """Workers by name."""

    def __init__(self, clock: Clock, heartbeat_s: float) -> None:
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._retired = RetiredEpochs()
        self._by_name: dict[str, _Worker] = {}

    def register(self, info: WorkerInfo) -> None:
        """Add the worker, or replace its earlier start. Raises StaleEpoch, Overloaded."""
        self._retired.refuse(info.worker, info.epoch)
        known = self._by_name.get(info.worker)
        if known is not None and known.info.epoch != info.epoch:
            self._retired.add(known.info.epoch)
        if known is None:
            self._make_room()
        worker = _Worker(info, Pulse(self._clock, self._heartbeat_s), known.load if known else WorkerLoad())
        worker.pulse.beat()
        self._by_name[info.worker] = worker

    def heartbeat(self, beat: HeartbeatWorker) -> bool:
        """Take the load over; False if the worker must register again."""
        worker = self._by_name.get(beat.worker)
        if worker is None or worker.info.epoch != beat.epoch:
            return False
        worker.pulse.beat()
        worker.load = beat.load
        return True

    def states(self) -> list[WorkerState]:
        """The workers whose heartbeats arrive."""
        return [WorkerState(w.info, w.load) for w in self._by_name.values() if w.pulse.alive]

    def _make_room(self) -> None:
        if len(self._by_name) < WORKERS_MAX:
            return
        gone = next((name for name, worker in self._by_name.items() if not worker.pulse.alive), None)
        if gone is None:
            raise Overloaded(f"{WORKERS_MAX} workers are registered already")
        del self._by_name[gone]
