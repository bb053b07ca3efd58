"""The part of the connector that runs beside vLLM's model, one in each worker: it moves blocks.

Called from vLLM's thread only. For a step: `begin_step`, then `wait_layer` and `layer_saved` from inside the forward pass, then
`end_step`. Loads that run between steps are reported by `finished`; blocks that did not come by `take_bad_blocks`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.kv_tensors import LayerTensor
from stratakv.integrations.vllm.loads import BlockLoad
from stratakv.integrations.vllm.options import Options
from stratakv.integrations.vllm.orders import LoadOrder, Rank, RankSpec, StepOrders, StepReport
from stratakv.integrations.vllm.saves import BlockSave, Saver
from stratakv.integrations.vllm.windows import CudaStamps, Stamps, windows_of
from stratakv.keys import BlockKey, Namespace
from stratakv.layout import KVLayout
from stratakv.log import EventLogger
from stratakv.pool.pages import PageReader
from stratakv.wire import Place, ReleaseLease, ReportCorrupt

log = EventLogger("stratakv.vllm.worker")

LOAD_THREADS = 2


@dataclass(frozen=True, slots=True)
class RankMemory:
    """One rank's KV tensors, and what pages of them are."""

    layers: tuple[LayerTensor, ...]
    layout: KVLayout
    namespace: Namespace
    rank: Rank


class WorkerSide:
    """Loads and saves of one rank."""

    def __init__(self, link: PoolLink, options: Options, memory: RankMemory, node: str | None, name: str) -> None:
        self._link = link
        self._options = options
        self._memory = memory
        self._node = node
        self._num_layers = len(memory.layers)
        self._layer_index = {name: n for n, layer in enumerate(memory.layers) for name in layer.names}
        self._is_cuda = memory.layers[0].storage.device.type == "cuda"
        self._open_window = windows_of(memory.layers)
        self._reader = PageReader(memory.layout, memory.namespace)
        self._threads = ThreadPoolExecutor(
            LOAD_THREADS, thread_name_prefix="stratakv-load", initializer=use_cores_of_process
        )
        self._saver = Saver(
            link,
            memory.layout,
            memory.namespace,
            self._open_window,
            name=name,
            node=node,
            saves_max=options.saves_waiting_max,
            prepare_thread=use_cores_of_process,
            on_saved=self._count_saved,
        )
        self._step_loads: list[BlockLoad] = []
        self._loads_between: dict[str, BlockLoad] = {}
        self._step_saves: list[BlockSave] = []
        self._saves: dict[str, list[BlockSave]] = {}
        """Those that are not done, by request."""
        self._held: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._layers_final: set[int] = set()
        self._layers_open = 0
        self._report = StepReport()
        self._report_lock = threading.Lock()

    @property
    def spec(self) -> RankSpec:
        """What the scheduler's side must know of this rank."""
        return RankSpec(self._memory.namespace, self._memory.layout.page_bytes, self._node)

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
        self._layers_final.clear()
        self._layers_open = 0
        stamps: Stamps | None = CudaStamps(self._num_layers) if self._is_cuda and orders.saves else None
        for order in orders.saves:
            save = BlockSave(order, stamps)
            if self._saver.take(save):
                self._step_saves.append(save)
                self._saves.setdefault(order.request_id, []).append(save)
            else:
                self._report.dropped_saves += 1

    def start_loads(self, orders: StepOrders) -> None:
        """Start the loads of this step, and those that run beside it and later ones."""
        for order in orders.loads:
            load = self._start_load(order)
            if order.is_layerwise:
                self._step_loads.append(load)
            else:
                self._loads_between[order.request_id] = load

    def wait_layer(self, name: str) -> None:
        """Before vLLM reads the layer: every load of this step has it, or has failed."""
        layer = self._layer_index.get(name)
        if layer is None or not self._step_loads:
            return
        for load in self._step_loads:
            if not load.wait_layer(layer):
                # What this step computes may rest on blocks that did not come.
                self._void(self._step_saves)

    def layer_saved(self, name: str) -> None:
        """After vLLM has written the layer."""
        layer = self._layer_index.get(name)
        if layer is None or not self._step_saves:
            return
        if self._step_saves[0].stamps is not None:
            self._step_saves[0].stamps.mark(layer)
        self._layers_final.add(layer)
        while self._layers_open in self._layers_final:
            self._layers_open += 1
        if self._layers_open < self._num_layers:
            for save in self._step_saves:
                save.ready.open(self._layers_open)

    def end_step(self) -> None:
        """The forward pass is over, if there was one: all layers are final."""
        for load in self._step_loads:
            self._end_load(load, was_used=load.was_waited_for)
        self._step_loads.clear()
        for save in self._step_saves:
            if save.stamps is not None:
                for layer in range(self._num_layers):
                    if layer not in self._layers_final:
                        save.stamps.mark(layer)
            if not save.is_void:
                save.ready.open(self._num_layers)
        self._step_saves.clear()

    def finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks vLLM may free now, and those whose loads between steps are over."""
        for request_id, saves in list(self._saves.items()):
            saves[:] = [save for save in saves if not save.is_done]
            if not saves:
                del self._saves[request_id]
        sent = {request_id for request_id in self._held if request_id not in self._saves}
        self._held -= sent
        received = {request_id for request_id, load in self._loads_between.items() if load.is_done}
        for request_id in received:
            self._end_load(self._loads_between.pop(request_id), was_used=True)
        return sent, received

    def take_bad_blocks(self) -> set[int]:
        """Blocks that were to be loaded and do not hold what they should."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_report(self) -> StepReport:
        """What happened since the last one."""
        with self._report_lock:
            report, self._report = self._report, StepReport()
        return report

    def close(self) -> None:
        """Stop loads, finish saves, let go of the pool."""
        for load in [*self._step_loads, *self._loads_between.values()]:
            load.stop()
        self._void(self._step_saves)
        self._threads.shutdown()
        self._saver.close()
        self._link.close()

    def _start_load(self, order: LoadOrder) -> BlockLoad:
        hit = order.hits[self._memory.rank]
        load = BlockLoad(
            order=order,
            hit=hit,
            window=self._open_window(order.blocks, None),
            num_layers=self._num_layers,
            deadline=time.monotonic() + self._options.load_timeout_s,
            on_bad_page=self._report_bad_page,
        )
        load.start(self._threads, self._reader, self._link.connections)
        return load

    def _end_load(self, load: BlockLoad, was_used: bool) -> None:
        """Account for a load; one that vLLM did not wait for counts as failed, since it may have read blocks too early."""
        if not was_used:
            log.warning("load_not_waited_for", request=load.order.request_id)
            load.stop()
            load.num_good = 0
            self._void(self._step_saves)
        elif not load.is_done:
            load.join()
        if load.hit.lease_id:
            self._link.tell(ReleaseLease(load.hit.lease_id))
        self._bad_blocks.update(load.bad_blocks)
        with self._report_lock:
            self._report.loads += 1
            self._report.failed_loads += not load.is_whole
            if load.is_whole:
                distance = load.hit.distance(self._node)
                self._report.loaded_tokens[distance] += load.num_good * self._memory.layout.page_tokens
                self._report.load_s[distance] = self._report.load_s.get(distance, 0.0) + load.seconds

    def _void(self, saves: list[BlockSave]) -> None:
        for save in saves:
            save.void()

    def _report_bad_page(self, key: BlockKey, place: Place) -> None:
        log.warning("bad_page", node=place.node, offset=place.offset)
        self._link.tell(ReportCorrupt(self._memory.namespace, key, place))

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
