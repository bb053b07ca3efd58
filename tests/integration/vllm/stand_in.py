"""Plays vLLM to both sides of its connector: requests, blocks, steps; tensors whose bytes follow from the tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.kv_tensors import layer_tensors, layout_of
from stratakv.integrations.vllm.options import parse_options
from stratakv.integrations.vllm.orders import Rank, StepOrders
from stratakv.integrations.vllm.scheduler_side import EngineRequest, SchedulerSide
from stratakv.integrations.vllm.worker_side import RankMemory, WorkerSide
from stratakv.keys import BlockKey, Namespace, block_keys
from tests.support import eventually

BLOCK_SIZE = 16
NUM_BLOCKS = 64
LAYERS = 3
SHAPE = (NUM_BLOCKS, 2, BLOCK_SIZE, 64)


@dataclass
class Request:
    """What the scheduler's side reads of a request of vLLM's."""

    request_id: str
    tokens: Sequence[int]
    num_computed_tokens: int = 0
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


class Keys:
    """`RequestKeys` of a vLLM whose hashes are the pool's."""

    def of(self, request: EngineRequest) -> Sequence[BlockKey]:
        assert isinstance(request, Request)
        return block_keys(request.tokens, BLOCK_SIZE)

    def forget(self, request_id: str) -> None:
        """Nothing is kept."""


class Instance:
    """A scheduler and the workers of some ranks."""

    def __init__(
        self, meta: str, *, ranks: Sequence[Rank] = ((0, 0),), namespace: bytes = b"v", **options: object
    ) -> None:
        self.options = parse_options({"meta": meta, **options})
        self.caches: dict[Rank, dict[str, torch.Tensor]] = {}
        self.workers: dict[Rank, WorkerSide] = {}
        for rank in ranks:
            self.caches[rank] = {f"layers.{n}": torch.zeros(SHAPE, dtype=torch.bfloat16) for n in range(LAYERS)}
            layers = layer_tensors(self.caches[rank], NUM_BLOCKS)
            layout = layout_of(layers, BLOCK_SIZE, "bfloat16", *rank)
            name = Namespace(hashlib.sha256(namespace + bytes(rank)).digest()[:16])
            link = self._link()
            memory = RankMemory(layers, layout, name, rank)
            self.workers[rank] = WorkerSide(link, self.options, memory, link.local_node(), "stand-in")
        self.scheduler = SchedulerSide(
            self._link(), self.options, BLOCK_SIZE, Keys(), may_load_layerwise=True, are_steps_apart=True
        )
        self.scheduler.ranks_known({rank: worker.spec for rank, worker in self.workers.items()})
        self.orders = StepOrders()
        self._told: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def _link(self) -> PoolLink:
        return PoolLink(self.options.meta, credentials=None, role="vllm", name="stand-in")

    def close(self) -> None:
        self.scheduler.close()
        for worker in self.workers.values():
            worker.close()

    def ask(self, request: Request, num_computed_tokens: int = 0) -> tuple[int, bool]:
        """As often as the scheduler has to."""
        answers: list[tuple[int | None, bool]] = []

        def has_answer() -> bool:
            answers.append(self.scheduler.num_tokens_to_load(request, num_computed_tokens))
            return answers[-1][0] is not None

        eventually(has_answer, what="an answer")
        num_tokens, is_between = answers[-1]
        assert num_tokens is not None
        return num_tokens, is_between

    def schedule(self, request: Request, blocks: Sequence[int], num_computed: int, num_loaded: int = 0) -> None:
        """All of the request's tokens in the coming step."""
        self.scheduler.blocks_allocated(request, blocks, num_loaded)
        done = num_computed + num_loaded
        self.scheduler.request_scheduled(request.request_id, blocks, done, request.num_tokens - done, is_anew=True)
        request.num_computed_tokens = request.num_tokens

    def begin(self, preempted: Sequence[str] = ()) -> None:
        """A step, up to its first layer."""
        self.orders = self.scheduler.take_orders(preempted)
        for worker in self.workers.values():
            worker.take_back(self.orders)
            worker.begin_step(self.orders)
            worker.start_loads(self.orders)

    def forward(self) -> None:
        """All layers."""
        for worker in self.workers.values():
            for n in range(LAYERS):
                worker.wait_layer(f"layers.{n}")
                worker.layer_saved(f"layers.{n}")

    def end(self) -> tuple[set[str], set[str], set[int]]:
        """The rest of a step: requests that every rank has sent, or received, by now; and bad blocks."""
        bad: set[int] = set()
        for worker in self.workers.values():
            worker.end_step()
            told = worker.finished()
            for counts, requests in zip(self._told, told, strict=True):
                counts.update(requests)
            bad |= worker.take_bad_blocks()
            self.scheduler.step_done(told[1], bad, worker.take_report())
        sent, received = ({name for name, n in counts.items() if n == len(self.workers)} for counts in self._told)
        for counts, requests in zip(self._told, (sent, received), strict=True):
            for name in requests:
                del counts[name]
        return sent, received, bad

    def step(self) -> tuple[set[str], set[str], set[int]]:
        self.begin()
        self.forward()
        return self.end()

    def fill(self, blocks: Sequence[int], seed: int) -> None:
        """What computing them would write."""
        generator = torch.Generator().manual_seed(seed)
        for caches in self.caches.values():
            for cache in caches.values():
                cache[list(blocks)] = torch.randn((len(blocks), *SHAPE[1:]), generator=generator).to(torch.bfloat16)

    def content(self, blocks: Sequence[int]) -> list[torch.Tensor]:
        return [cache[list(blocks)].clone() for caches in self.caches.values() for cache in caches.values()]

    def write(self, request: Request, blocks: Sequence[int], seed: int) -> None:
        """Compute a request and have it saved."""
        self.fill(blocks, seed)
        self.schedule(request, blocks, 0)
        self.step()
        assert self.scheduler.request_finished(request, blocks, request.num_tokens)
        sent: set[str] = set()
        eventually(lambda: sent.update(self.step()[0]) or request.request_id in sent, what="the save to end")
