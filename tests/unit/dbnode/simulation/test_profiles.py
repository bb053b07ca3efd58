"""A simulated fleet with the rates that workers have measured of themselves."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from dbnode.simulation.errors import ProfileError
from dbnode.simulation.profiles import find_profile, with_rates_of
from dbnode.simulation.run import SimSettings, simulate
from stratakv.profile_store import ProfileKey, ProfileStore, StoredProfile
from stratakv.settings import RouterPolicy
from stratakv.worker_profile import Curves, DecodePoint, PrefillPoint, WorkerProfile
from tests.unit.dbnode.simulation.test_run import BLOCK, conversations, fleet, request

PROFILE = WorkerProfile(
    prefill=(
        PrefillPoint(128, 0, 0.1),
        PrefillPoint(512, 0, 0.3),
        PrefillPoint(2048, 0, 1.5),
        PrefillPoint(64, 2048, 0.11),
    ),
    decode=(DecodePoint(1, 128, 0.02), DecodePoint(8, 128, 0.05)),
    load_bytes_per_s={"l2": 4e9, "pool": 1e9},
)


def stored(model: str = "a-model", at_unix_s: float = 1.0, profile: WorkerProfile = PROFILE) -> StoredProfile:
    return StoredProfile(ProfileKey(model, "r", "bf16", "cpu", 2, "k"), at_unix_s, profile)


def write(path: Path, *profiles: StoredProfile) -> str:
    path.write_bytes(msgspec.json.encode(profiles))
    return str(path)


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "cache")


def test_a_profile_is_found_by_its_model_and_in_a_file(tmp_path: Path, store: ProfileStore) -> None:
    key = stored().key
    store.keep(key, PROFILE)
    assert find_profile("a-model", store).profile == PROFILE
    newest = stored(at_unix_s=5.0)
    printed = write(tmp_path / "printed.json", stored(), newest, stored(at_unix_s=3.0))
    assert find_profile(printed, store) == newest
    kept = next(store.directory.glob("*.json"))
    assert find_profile(str(kept), store).key == key


def test_what_cannot_be_gone_by_is_refused_with_the_reason(tmp_path: Path, store: ProfileStore) -> None:
    store.keep(stored().key, PROFILE)
    several = write(tmp_path / "several.json", stored("one"), stored("two"))
    few = write(
        tmp_path / "few.json", stored(profile=WorkerProfile(prefill=PROFILE.prefill[:2], decode=PROFILE.decode))
    )
    no_time = PrefillPoint(4096, 0, 0.0)
    wrong = write(tmp_path / "wrong.json", stored(profile=WorkerProfile((*PROFILE.prefill, no_time), PROFILE.decode)))
    (tmp_path / "text.json").write_text("no profile")
    for named, why in [
        ("another-model", "neither a file nor a model"),
        (str(tmp_path / "absent.json"), "neither a file nor a model"),
        (several, "several models: one, two"),
        (few, "too few prefills"),
        (wrong, "too few prefills"),
        (str(tmp_path / "text.json"), "text.json"),
    ]:
        with pytest.raises(ProfileError, match=why):
            find_profile(named, store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, store: ProfileStore) -> None:
    path = Path(write(tmp_path / "closed.json", stored()))
    path.chmod(0)
    with pytest.raises(ProfileError, match=r"closed\.json"):
        find_profile(str(path), store)


def test_rates_are_those_of_the_profile() -> None:
    found = with_rates_of(SimSettings(), PROFILE)
    assert found.prefill_tokens_per_s == pytest.approx(2048 / 1.5)
    assert found.decode_step_s == pytest.approx(0.02)
    assert found.pool_bytes_per_s == 1e9
    alone = msgspec.structs.replace(PROFILE, load_bytes_per_s={"l2": 4e9})
    assert with_rates_of(SimSettings(), alone).pool_bytes_per_s == 4e9
    assert with_rates_of(SimSettings(), msgspec.structs.replace(PROFILE, load_bytes_per_s={})).pool_bytes_per_s == 0


def test_a_prompt_takes_what_the_curves_say_of_its_new_and_cached_tokens() -> None:
    settings = with_rates_of(fleet(), msgspec.structs.replace(PROFILE, load_bytes_per_s={}))
    curves = Curves(PROFILE)
    found = simulate([request(0, [1, 2]), request(60, [1, 2, 3])], settings)
    assert found.ttft_p99_s == pytest.approx(curves.prefill_s(2 * BLOCK + 88))
    assert found.ttft_p50_s == pytest.approx(curves.prefill_s(BLOCK + 88, 2 * BLOCK))


def test_from_the_pool_comes_what_is_quicker_loaded_than_computed() -> None:
    """Two blocks are 134 MB, and take 0.6 s to compute."""
    trace = [request(at_s, [1, 2], rest=1) for at_s in range(0, 600, 60)]
    settings = replace(with_rates_of(fleet(RouterPolicy.ROUND_ROBIN), PROFILE), l1_blocks=1)
    quick, slow = (simulate(trace, replace(settings, pool_bytes_per_s=rate)) for rate in (1e9, 1e8))
    assert quick.pool_share > 0.4
    assert slow.pool_share == 0


def test_the_same_trace_gives_the_same_report() -> None:
    settings = with_rates_of(fleet(), PROFILE)
    first, second = (simulate(conversations(2), settings) for _ in range(2))
    assert first == second
