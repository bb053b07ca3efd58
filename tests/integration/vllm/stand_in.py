"""Plays vLLM to both sides of its connector: requests, blocks, steps; tensors whose bytes follow from the tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from stratakv.integrations.link import PoolLink
from stratakv.integrations.vllm.group_pages import GroupPages, RankMemory
from stratakv.integrations.vllm.groups import KVGroup, KVGroups, Reach
from stratakv.integrations.vllm.holds import EngineBlock
from stratakv.integrations.vllm.kv_tensors import layer_tensors, layout_of
from stratakv.integrations.vllm.options import parse_options
from stratakv.integrations.vllm.orders import Rank, StepOrders
from stratakv.integrations.vllm.scheduler_side import SchedulerSide
from stratakv.integrations.vllm.tracked import EngineRequest
from stratakv.integrations.vllm.worker_side import WorkerSide
from stratakv.keys import BlockKey, Namespace, block_keys
from tests.support import eventually

BLOCK_SIZE = 16
NUM_BLOCKS = 64
LAYERS = 3
HEADS = (2, 64)
PLAIN = KVGroups((KVGroup(Reach.ALL, BLOCK_SIZE),))


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


@dataclass
class Keys:
    """`RequestKeys` of a vLLM whose hashes are the pool's."""

    key_tokens: int

    def of(self, request: EngineRequest) -> Sequence[BlockKey]:
        assert isinstance(request, Request)
        return block_keys(request.tokens, self.key_tokens)

    def forget(self, request_id: str) -> None:
        """Nothing is kept."""


@dataclass
class Block:
    """One of vLLM's blocks, and how many use it."""

    block_id: int
    users: int = 1

    @property
    def is_null(self) -> bool:
        return self.block_id == 0


@dataclass
class Tables:
    """`KVCacheBlocks`."""

    blocks: list[list[Block]]


@dataclass
class Cache:
    """`KVCacheManager` and its `BlockPool`."""

    num_gpu_blocks: int = NUM_BLOCKS
    tables: dict[str, Tables] = field(default_factory=dict)

    @property
    def block_pool(self) -> Cache:
        return self

    def get_blocks(self, request_id: str) -> Tables:
        return self.tables[request_id]

    def touch(self, blocks: Sequence[EngineBlock]) -> None:
        for block in blocks:
            assert isinstance(block, Block)
            block.users += 1

    def free_blocks(self, ordered_blocks: Iterable[EngineBlock]) -> None:
        for block in ordered_blocks:
            assert isinstance(block, Block)
            block.users -= 1
            assert block.users >= 0


class Instance:
    """A scheduler and the workers of some ranks."""

    def __init__(
        self,
        meta: str,
        *,
        ranks: Sequence[Rank] = ((0, 0),),
        namespace: bytes = b"v",
        groups: KVGroups = PLAIN,
        **options: object,
    ) -> None:
        self.options = parse_options({"meta": meta, **options})
        self.groups = groups
        self.cache = Cache()
        self.caches: dict[Rank, dict[str, torch.Tensor]] = {}
        self.workers: dict[Rank, WorkerSide] = {}
        for rank in ranks:
            link = self._link()
            self.caches[rank] = {}
            pages = [self._pages(n, rank, namespace) for n in range(len(groups.groups))]
            memory = RankMemory(rank, pages, groups.are_plain)
            self.workers[rank] = WorkerSide(link, self.options, memory, link.local_node(), "stand-in")
        self.scheduler = SchedulerSide(
            self._link(),
            self.options,
            groups,
            Keys(groups.key_tokens),
            may_load_layerwise=groups.are_plain,
            are_steps_apart=True,
        )
        self.scheduler.cache_known(self.cache)
        self.scheduler.ranks_known({rank: worker.spec for rank, worker in self.workers.items()})
        self.orders = StepOrders()
        self.failed: set[str] = set()
        self._told: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def _pages(self, group: int, rank: Rank, namespace: bytes) -> GroupPages:
        size = self.groups.groups[group].block_size
        shape = (NUM_BLOCKS, HEADS[0], size, HEADS[1])
        caches = {f"layers.{group}.{n}": torch.zeros(shape, dtype=torch.bfloat16) for n in range(LAYERS)}
        self.caches[rank] |= caches
        layers = layer_tensors(caches, NUM_BLOCKS)
        name = Namespace(hashlib.sha256(namespace + bytes(rank) + bytes([group])).digest()[:16])
        return GroupPages.of(layers, layout_of(layers, size, "bfloat16", group, *rank), name)

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
        self.schedule_tables(request, [blocks], num_computed, num_loaded)

    def schedule_tables(
        self, request: Request, tables: Sequence[Sequence[int]], num_computed: int, num_loaded: int = 0
    ) -> None:
        """The same with a block table for each group."""
        self.cache.tables[request.request_id] = Tables([[Block(n) for n in table] for table in tables])
        self.scheduler.blocks_allocated(request, tables, num_loaded)
        done = num_computed + num_loaded
        self.scheduler.request_scheduled(request.request_id, tables, done, request.num_tokens - done, is_anew=True)
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
        for rank, worker in self.workers.items():
            for layer in self.caches[rank]:
                worker.wait_layer(layer)
                worker.layer_saved(layer)

    def end(self) -> tuple[set[str], set[str], set[int]]:
        """The rest of a step: requests that every rank has sent, or received, by now; and bad blocks."""
        bad: set[int] = set()
        for worker in self.workers.values():
            worker.end_step()
            told = worker.finished()
            for counts, requests in zip(self._told, told, strict=True):
                counts.update(requests)
            bad |= worker.take_bad_blocks()
            failed = worker.take_failed()
            self.failed |= failed
            self.scheduler.step_done(told[1], failed, bad, worker.take_report())
        sent, received = ({name for name, n in counts.items() if n == len(self.workers)} for counts in self._told)
        for counts, requests in zip(self._told, (sent, received), strict=True):
            for name in requests:
                del counts[name]
        return sent, received, bad

    def step(self) -> tuple[set[str], set[str], set[int]]:
        self.begin()
        self.forward()
        return self.end()

    def fill(self, blocks: Sequence[int], seed: int, group: int = 0) -> None:
        """What computing them would write."""
        generator = torch.Generator().manual_seed(seed)
        for cache in self._of_group(group):
            shape = (len(blocks), *cache.shape[1:])
            cache[list(blocks)] = torch.randn(shape, generator=generator).to(torch.bfloat16)

    def content(self, blocks: Sequence[int], group: int = 0) -> list[torch.Tensor]:
        return [cache[list(blocks)].clone() for cache in self._of_group(group)]

    def write(self, request: Request, blocks: Sequence[int], seed: int) -> None:
        """Compute a request and have it saved."""
        self.fill(blocks, seed)
        self.write_tables(request, [blocks])

    def write_tables(self, request: Request, tables: Sequence[Sequence[int]]) -> None:
        """The same with a block table for each group, which are filled."""
        self.schedule_tables(request, tables, 0)
        self.step()
        assert self.scheduler.request_finished(request, tables, request.num_tokens)
        sent: set[str] = set()
        eventually(lambda: sent.update(self.step()[0]) or request.request_id in sent, what="the save to end")

    def _of_group(self, group: int) -> list[torch.Tensor]:
        return [cache for caches in self.caches.values() for name, cache in caches.items() if f".{group}." in name]
