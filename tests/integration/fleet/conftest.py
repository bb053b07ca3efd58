"""A meta server, two daemons and workers in fp32, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stratakv import models
from stratakv.migrate import upgrade
from stratakv.postgres import EmbeddedPostgres
from tests.integration.fleet.processes import Fleet, Worker
from tests.service_process import ServiceProcess
from tests.support import eventually

MODEL = "smollm2-135m"
CACHE_DIR = Path("~/.cache/stratakv").expanduser()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(models.pull(MODEL, CACHE_DIR))


@pytest.fixture(scope="package")
def fleet(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory, tokenizer: object) -> Iterator[Fleet]:
    """No service started yet."""
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS fleet WITH (FORCE)")
        connection.execute("CREATE DATABASE fleet")
    upgrade(postgres.database_url("fleet"))
    fleet = Fleet(postgres.database_url("fleet"), tmp_path_factory.mktemp("fleet"))
    yield fleet
    fleet.stop()


@dataclass(frozen=True)
class Pool:
    """Two daemons, a prefill and a decode worker on different ones, and a worker with no cache below L1."""

    fleet: Fleet
    meta: ServiceProcess
    daemons: tuple[ServiceProcess, ServiceProcess]
    prefill: Worker
    decode: Worker
    alone: Worker


@pytest.fixture(scope="package")
def pool(fleet: Fleet) -> Pool:
    meta = fleet.meta()
    daemons = (fleet.daemon("dmp-0"), fleet.daemon("dmp-1"))
    prefill = fleet.worker("prefill", "--role", "prefill", "--node", "dmp-0", "--l1-tokens", "4096")
    decode = fleet.worker("decode", "--role", "decode", "--node", "dmp-1", "--l1-tokens", "4096")
    alone = fleet.worker("alone", "--pool-enabled", "false", "--block-size", "32", "--l1-tokens", "4096")
    for worker in (prefill, decode, alone):
        eventually(worker.is_ready, timeout_s=90, what=f"{worker.url} ready")
    return Pool(fleet, meta, daemons, prefill, decode, alone)
