"""The part of the connector that runs beside vLLM's model, one in each worker: it moves blocks.

Called from vLLM's thread only. For a step: `begin_step`, then `wait_layer` and `layer_saved` from inside the forward pass, then
`end_step`. Loads that run between steps are reported by `finished`; blocks that did not come by `take_bad_blocks`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.group_pages import GroupPages, RankMemory
from stratakv.integrations.vllm.layer_steps import LayerSteps
from stratakv.integrations.vllm.loads import BlockLoad, RequestLoad
from stratakv.integrations.vllm.options import Options
from stratakv.integrations.vllm.orders import GroupLoad, LoadOrder, RankSpec, StepOrders, StepReport
from stratakv.integrations.vllm.rates import farthest
from stratakv.integrations.vllm.saves import BlockSave, Saver
from stratakv.keys import BlockKey
from stratakv.log import EventLogger
from stratakv.wire import Place, ReleaseLease, ReportCorrupt

log = EventLogger("stratakv.vllm.worker")

LOAD_THREADS = 2


class WorkerSide:
    """Loads and saves of one rank."""

    def __init__(self, link: PoolLink, options: Options, memory: RankMemory, node: str | None, name: str) -> None:
        self._link = link
        self._options = options
        self._memory = memory
        self._node = node
        self._groups = [LayerSteps(pages) for pages in memory.groups]
        self._layer_index = {
            name: (group, n)
            for group, pages in enumerate(memory.groups)
            for n, layer in enumerate(pages.layers)
            for name in layer.names
        }
        self._threads = ThreadPoolExecutor(
            LOAD_THREADS, thread_name_prefix="stratakv-load", initializer=use_cores_of_process
        )
        self._saver = Saver(
            link,
            name=name,
            node=node,
            saves_max=options.saves_waiting_max,
            prepare_thread=use_cores_of_process,
            on_saved=self._count_saved,
        )
        self._step_loads: list[RequestLoad] = []
        self._loads_between: dict[str, RequestLoad] = {}
        self._saves: dict[str, list[BlockSave]] = {}
        """Those that are not done, by request."""
        self._holding: list[BlockSave] = []
        """Those that are not done and whose blocks the scheduler's side holds."""
        self._held: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._failed: set[str] = set()
        self._report = StepReport()
        self._report_lock = threading.Lock()

    @property
    def spec(self) -> RankSpec:
        """What the scheduler's side must know of this rank."""
        return RankSpec(tuple(pages.namespace for pages in self._memory.groups), self._node)

    def take_back(self, orders: StepOrders) -> None:
        """Before the step may overwrite blocks that vLLM took from requests."""
        for request_id in orders.preempted:
            self._void(self._saves.pop(request_id, []))
        if orders.voids_saves:
            for saves in self._saves.values():
                self._void(saves)

    def begin_step(self, orders: StepOrders) -> None:
        """The step's saves wait for its layers; loads begin with `start_loads`."""
        self._held |= orders.held
        for request_id in orders.dropped:
            if request_id in self._loads_between:
                self._loads_between[request_id].stop()
        for group in self._groups:
            group.begin()
        for order in orders.saves:
            group = self._groups[order.group]
            save = group.save_of(order)
            if self._saver.take(save):
                group.saves.append(save)
                self._saves.setdefault(order.request_id, []).append(save)
                if order.hold:
                    self._holding.append(save)
            else:
                self._report_not_saved(order.hold)

    def start_loads(self, orders: StepOrders) -> None:
        """Start the loads of this step, and those that run beside it and later ones."""
        for order in orders.loads:
            load = RequestLoad(order, [self._start_part(order, part) for part in order.parts])
            if order.is_layerwise:
                self._step_loads.append(load)
            else:
                self._loads_between[order.request_id] = load

    def wait_layer(self, name: str) -> None:
        """Before vLLM reads the layer: every load of this step has it, or has failed."""
        index = self._layer_index.get(name)
        if index is None:
            return
        group, layer = index
        for part in (part for load in self._step_loads for part in load.parts if part.order.group == group):
            if not part.wait_layer(layer):
                # What this step computes may rest on blocks that did not come.
                self._void_step()

    def layer_saved(self, name: str) -> None:
        """After vLLM has written the layer."""
        index = self._layer_index.get(name)
        if index is not None:
            self._groups[index[0]].is_final(index[1])

    def end_step(self) -> None:
        """The forward pass is over, if there was one: all layers are final."""
        for load in self._step_loads:
            self._end_load(load, was_used=load.was_waited_for)
        self._step_loads.clear()
        for group in self._groups:
            group.end()

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks vLLM may free now, and those whose loads between steps are over."""
        for request_id, saves in list(self._saves.items()):
            saves[:] = [save for save in saves if not save.is_done]
            if not saves:
                del self._saves[request_id]
        with self._report_lock:
            self._report.over.update(save.order.hold for save in self._holding if save.is_done)
        self._holding = [save for save in self._holding if not save.is_done]
        # While a request is held, vLLM goes on making steps, by which it hears of the holds.
        busy = self._saves.keys() | {save.order.request_id for save in self._holding}
        sent = self._held - busy
        self._held -= sent
        received = {request_id for request_id, load in self._loads_between.items() if load.is_done}
        for request_id in received:
            self._end_load(self._loads_between.pop(request_id), was_used=True)
        return sent, received

    def take_bad_blocks(self) -> set[int]:
        """Blocks that were to be loaded and do not hold what they should."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_failed(self) -> set[str]:
        """Requests whose load failed where vLLM cannot be told of single blocks."""
        failed, self._failed = self._failed, set()
        return failed

    def take_report(self) -> StepReport:
        """What happened since the last one."""
        with self._report_lock:
            report, self._report = self._report, StepReport()
        return report

    def close(self) -> None:
        """Stop loads, finish saves, let go of the pool."""
        for load in [*self._step_loads, *self._loads_between.values()]:
            load.stop()
        self._void_step()
        self._threads.shutdown()
        self._saver.close()
        self._link.close()

    def _start_part(self, order: LoadOrder, part: GroupLoad) -> BlockLoad:
        pages = self._memory.groups[part.group]
        load = BlockLoad(
            request_id=order.request_id,
            order=part,
            hit=part.hits[self._memory.rank],
            pages=pages,
            window=pages.open_window(part.blocks, None),
            deadline=time.monotonic() + self._options.load_timeout_s,
            on_bad_page=self._report_bad_page,
        )
        load.start(self._threads, self._link.connections)
        return load

    def _end_load(self, load: RequestLoad, was_used: bool) -> None:
        """Account for a load; one that vLLM did not wait for counts as failed, since it may have read blocks too early."""
        if not was_used:
            log.warning("load_not_waited_for", request=load.order.request_id)
            load.stop()
            self._void_step()
        for part in load.parts:
            if not was_used:
                part.num_good = 0
            elif not part.is_done:
                part.join()
            if part.hit.lease_id:
                self._link.tell(ReleaseLease(part.hit.lease_id))
            if self._memory.are_plain:
                self._bad_blocks.update(part.bad_blocks)
        if not load.is_whole and not self._memory.are_plain:
            self._failed.add(load.order.request_id)
        self._count_load(load)

    def _count_load(self, load: RequestLoad) -> None:
        with self._report_lock:
            self._report.loads += 1
            self._report.failed_loads += not load.is_whole
            if load.is_whole:
                distance = farthest(part.hit.distance(self._node) for part in load.parts)
                self._report.loaded_tokens[distance] += load.order.num_tokens
                self._report.load_s[distance] = self._report.load_s.get(distance, 0.0) + load.seconds

    def _report_not_saved(self, hold: int) -> None:
        with self._report_lock:
            self._report.dropped_saves += 1
            if hold:
                self._report.over[hold] += 1

    def _void_step(self) -> None:
        for group in self._groups:
            self._void(group.saves)

    def _void(self, saves: Sequence[BlockSave]) -> None:
        for save in saves:
            save.void()

    def _report_bad_page(self, pages: GroupPages, key: BlockKey, place: Place) -> None:
        log.warning("bad_page", node=place.node, offset=place.offset)
        self._link.tell(ReportCorrupt(pages.namespace, key, place))

    def _count_saved(self, num_blocks: int) -> None:
        with self._report_lock:
            self._report.saved_blocks += num_blocks


def use_cores_of_process() -> None:
    """Let the calling thread run wherever any thread of this process may: vLLM binds the one that made it to a single core."""
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            cores |= os.sched_getaffinity(int(thread))
        except ProcessLookupError:
            continue
    os.sched_setaffinity(0, cores)


def dtype_name(kv_caches: Mapping[str, torch.Tensor]) -> str:
    """The element types of the tensors, for the layout."""
    return "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in kv_caches.values()}))
