"""A pool of real services, and what a vLLM without connector answers to the prompts of these tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from benchmarks.harness import words
from benchmarks.vllm_process import BLOCK_SIZE, vllm_engine
from stratakv import models
from stratakv.errors import StrataError
from stratakv.migrate import upgrade
from stratakv.pool.meta_client import MetaClient
from stratakv.postgres import EmbeddedPostgres
from stratakv.text import load_tokenizer
from stratakv.wire import GetStats, ListNodes, Message, Nodes, NodeState, ReplyT, Stats
from tests.integration.fleet.processes import Fleet
from tests.service_process import ServiceProcess

MODEL = "smollm2-135m"
CACHE_DIR = Path("~/.cache/stratakv").expanduser()
BLOCK = BLOCK_SIZE
MAX_TOKENS = 12
ENGINE = {"dtype": "float32", "max_model_len": 1024, "num_gpu_blocks_override": 21, "max_num_seqs": 8}
"""Room for 20 blocks: five prompts or fewer at once, so that blocks are evicted and requests preempted all the time."""


@dataclass(frozen=True)
class Questions:
    """Prompts, and what greedy decoding answers to each."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]

    def some(self) -> Questions:
        """A part of them, of all beginnings."""
        return Questions(self.prompts[:20], self.answers[:20])


@dataclass
class Pool:
    """A meta server and daemons that can be killed."""

    fleet: Fleet
    meta: ServiceProcess
    daemons: dict[str, ServiceProcess]

    @property
    def port(self) -> int:
        return self.fleet.meta_port

    def stats(self) -> Stats:
        return self._ask(GetStats(), Stats)

    def nodes(self) -> Sequence[NodeState]:
        return self._ask(ListNodes(), Nodes).nodes

    def are_daemons_listed(self) -> bool:
        try:
            return {node.segment.node for node in self.nodes()} == set(self.daemons)
        except StrataError:
            return False

    def _ask(self, request: Message, reply: type[ReplyT]) -> ReplyT:
        async def ask() -> ReplyT:
            async with MetaClient(f"tcp://127.0.0.1:{self.port}") as client:
                return await client.call(request, reply)

        return asyncio.run(ask())


@pytest.fixture(scope="session")
def model() -> Path:
    return models.pull(MODEL, CACHE_DIR)


@pytest.fixture(scope="package")
def pool(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE vllm")
    upgrade(postgres.database_url("vllm"))
    fleet = Fleet(postgres.database_url("vllm"), tmp_path_factory.mktemp("pool"))
    fleet.env["STRATAKV_DMP_SEGMENT_BYTES"] = "768MiB"
    pool = Pool(fleet, fleet.meta(), {node: fleet.daemon(node) for node in ("dmp-0", "dmp-1")})
    yield pool
    fleet.stop()


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="package")
def questions(model: Path, directory: Path) -> Questions:
    """Fifty prompts of five beginnings, some of which end just before a block does; answered without any connector."""
    rng = random.Random(5)
    tokenizer = load_tokenizer(model)
    beginnings = [tokenizer.encode(words(400, rng))[: 2 * BLOCK] for _ in range(5)]
    ends = [tokenizer.encode(words(200, rng))[: rng.choice((40, 90, BLOCK - 6, BLOCK - 4))] for _ in range(50)]
    prompts = [[*beginnings[n % 5], *end] for n, end in enumerate(ends)]
    with vllm_engine(directory, "plain", model=str(model), **ENGINE) as engine:
        answers = [answer.token_ids for answer in engine.generate(prompts, MAX_TOKENS)]
    assert all(len(answer) == MAX_TOKENS for answer in answers)
    return Questions(prompts, answers)
