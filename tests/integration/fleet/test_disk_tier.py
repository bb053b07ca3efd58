"""Promise P1 for the disk tier: what was demoted and read again, also after kill -9 of its daemon, answers alike."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerBase

from stratakv.migrate import upgrade
from stratakv.postgres import EmbeddedPostgres
from tests.integration.fleet.processes import Completion, Fleet, Worker
from tests.integration.fleet.test_reuse import OUTPUT_TOKENS, prompt_of, published
from tests.support import eventually


@pytest.fixture
def fleet(postgres: EmbeddedPostgres, tmp_path: Path) -> Iterator[Fleet]:
    """No service started yet."""
    with psycopg.connect(postgres.database_url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE fleet_disk")
    upgrade(postgres.database_url("fleet_disk"))
    fleet = Fleet(postgres.database_url("fleet_disk"), tmp_path)
    yield fleet
    fleet.stop()


def _from_disk(worker: Worker, prompt: list[int]) -> Completion:
    """The answer, once all of the prompt's blocks come from the disk."""
    answers: list[Completion] = []

    def is_from_disk() -> bool:
        worker.drop("l1", "l2")
        answers.append(worker.complete(prompt, OUTPUT_TOKENS))
        return set(answers[-1].tiers) == {"computed", "disk"}

    eventually(is_from_disk, timeout_s=40, what="the prompt's blocks to be read from disk")
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    return answers[-1]


def test_blocks_from_disk_answer_alike_and_outlive_their_daemon(
    fleet: Fleet, tokenizer: PreTrainedTokenizerBase
) -> None:
    # Whatever a daemon holds in memory is too much: less than a page may stay, and none comes back.
    fleet.meta("--demote-high", "0.001", "--demote-low", "0")
    daemon = fleet.daemon("dmp-0", "--disk-dir", str(fleet.directory / "disk"))
    worker = fleet.worker("worker", "--node", "dmp-0", "--l1-tokens", "2048")
    eventually(worker.is_ready, timeout_s=90, what="worker ready")
    prompt = prompt_of(tokenizer, 400, seed=21)

    cold = worker.complete(prompt, OUTPUT_TOKENS)
    assert cold.tiers == {"computed": 400}
    published(worker, prompt)
    warm = _from_disk(worker, prompt)
    daemon.kill()
    daemon.start()
    after = _from_disk(worker, prompt)
    for answer in (warm, after):
        assert answer.token_ids == cold.token_ids
        assert answer.tiers == {"computed": 16, "disk": 384}
    told = _told_by_tier(worker)
    assert told["stratakv_kv_loaded_pages_total", "disk"] >= 2 * 384 // 16
    assert told["stratakv_kv_load_seconds_total", "disk"] > 0
    assert told["stratakv_kv_pages_found_total", "disk"] >= told["stratakv_kv_loaded_pages_total", "disk"]
    assert told["stratakv_kv_cached_blocks", "l1"] >= 384 // 16
    assert told["stratakv_kv_evicted_blocks_total", "l1"] == 0


def _told_by_tier(worker: Worker) -> dict[tuple[str, str], float]:
    """The worker's metrics by name and tier."""
    with urllib.request.urlopen(f"{worker.url}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {(s.name, s.labels["tier"]): s.value for f in families for s in f.samples if "tier" in s.labels}
