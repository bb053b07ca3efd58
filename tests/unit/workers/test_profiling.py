"""A worker measures itself in the time it is given, leaves nothing behind, and does not do it again soon."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stratakv.models import model_identity
from stratakv.profile_store import ProfileStore
from stratakv.worker_profile import Curves, WorkerProfile
from tests.unit.workers.engine.harness import fp32, running, save_tiny
from workers import profiling
from workers.engine import Engine
from workers.profiling import measure, profile_key
from workers.rates import Rates
from workers.warmup import Profiling, warm_up


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    with running(fp32(tiny, num_blocks=256)) as engine:
        yield engine


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "PREFILLS", ((64, 0), (16, 0), (128, 0), (16, 256), (5000, 0)))
    monkeypatch.setattr(profiling, "DECODES", ((1, 32), (4, 256), (4, 32), (1000, 16)))


async def test_what_fits_is_measured_and_nothing_stays_cached(engine: Engine, small: None) -> None:
    profile = await measure(engine, budget_s=60.0)
    assert [(p.num_tokens, p.num_cached) for p in profile.prefill] == [(64, 0), (16, 0), (128, 0), (16, 256)]
    assert [(p.num_sequences, p.context_tokens) for p in profile.decode] == [(1, 32), (4, 256), (4, 32)]
    assert all(p.seconds > 0 for p in profile.prefill)
    assert all(p.step_s > 0 for p in profile.decode)
    assert Curves(profile).prefill_s(64) > 0
    use = engine.kv_cache.use
    assert (use.cached, use.referenced) == (0, 0)


async def test_cached_tokens_are_not_computed(engine: Engine, small: None) -> None:
    before = engine.stats().prefill_tokens
    await measure(engine, budget_s=60.0)
    assert engine.stats().prefill_tokens - before < 700


async def test_no_more_is_measured_than_there_is_time_for(engine: Engine, small: None) -> None:
    assert await measure(engine, budget_s=0.0) == WorkerProfile()


async def test_a_fresh_profile_is_used_instead(
    engine: Engine, tiny: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = profile_key("tiny", model_identity(tiny), engine)

    async def tiers() -> dict[str, float]:
        return {"l2": 4e9}

    how = Profiling(ProfileStore(tmp_path), key, 30.0, tiers)
    first, second = Rates(), Rates()
    await warm_up(engine, first, how)
    assert first.profile.prefill
    assert first.load_bytes_per_s() == {"l2": 4e9}
    monkeypatch.setattr("workers.warmup.measure", None)
    await asyncio.wait_for(warm_up(engine, second, how), 60)
    assert second.profile == first.profile
    assert second.prefill_tokens_per_s > 0


async def test_none_is_made_where_it_is_switched_off(engine: Engine, tiny: Path, tmp_path: Path) -> None:
    key = profile_key("tiny", model_identity(tiny), engine)
    rates = Rates()
    await warm_up(engine, rates, Profiling(ProfileStore(tmp_path), key, 0.0, None))
    assert rates.profile == WorkerProfile()
    assert rates.prefill_tokens_per_s > 0
    assert not (tmp_path / "profiles").exists()


async def test_a_small_l1_is_warmed_up_too(tiny: Path, tmp_path: Path) -> None:
    rates = Rates()
    with running(fp32(tiny, num_blocks=12)) as engine:
        key = profile_key("tiny", model_identity(tiny), engine)
        await warm_up(engine, rates, Profiling(ProfileStore(tmp_path), key, 0.0, None))
    assert rates.prefill_tokens_per_s > 0
