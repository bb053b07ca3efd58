"""What a simulated worker takes its rates from, if an operator names a profile: a file, or the model of a kept one.

Read by `dbnode.simulation.__main__`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec

from dbnode.simulation.errors import ProfileError
from dbnode.simulation.run import SimSettings
from stratakv.profile_store import ProfileStore, StoredProfile
from stratakv.worker_profile import Curves, WorkerProfile

_HINT = "give --profile what `stratakv profile --json` prints, in a file, or the name of a model that it shows"


def find_profile(named: str, store: ProfileStore) -> StoredProfile:
    """The newest one in a file of that name, else the newest kept one of that model. Raises ProfileError."""
    path = Path(named).expanduser()
    found = _read(path) if path.is_file() else [kept for kept in store.all() if kept.key.model == named]
    models = sorted({kept.key.model for kept in found})
    if len(models) > 1:
        raise ProfileError(f"{named}: profiles of several models: {', '.join(models)}", hint="keep one of them")
    if not found:
        raise ProfileError(f"{named}: neither a file nor a model of a kept profile", hint=_HINT)
    newest = max(found, key=lambda kept: kept.measured_at_unix_s)
    if not _says_enough(newest.profile):
        raise ProfileError(
            f"{named}: the profile has too few prefills or no decode step",
            hint="have the worker measure itself for longer",
        )
    return newest


def with_rates_of(settings: SimSettings, profile: WorkerProfile) -> SimSettings:
    """A fleet of such workers. The pool is as fast as another host's daemon, else the own host's; without either there is none."""
    longest = max((p for p in profile.prefill if not p.num_cached), key=lambda p: p.num_tokens)
    rates = profile.load_bytes_per_s
    return replace(
        settings,
        prefill_tokens_per_s=longest.num_tokens / longest.seconds,
        decode_step_s=Curves(profile).decode_step_s(1, longest.num_tokens),
        pool_bytes_per_s=rates.get("pool") or rates.get("l2") or 0.0,
        profile=profile,
    )


def _says_enough(profile: WorkerProfile) -> bool:
    times_s = [p.seconds for p in profile.prefill] + [p.step_s for p in profile.decode]
    return Curves(profile).is_complete and bool(profile.decode) and min(times_s) > 0


def _read(path: Path) -> list[StoredProfile]:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[StoredProfile] | StoredProfile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: {error}", hint=_HINT) from None
    return found if isinstance(found, list) else [found]
