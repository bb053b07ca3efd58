"""The short form of `make chaos`: each victim is struck once, and the history of all writes is checked."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.__main__ import report
from tests.chaos.nemesis import Plan, Victim
from tests.chaos.run import run
from tests.chaos.writers import Step

CHOSEN = (
    Plan(Victim.LEADER, "native", Step.ENDING),
    Plan(Victim.POSTGRES, "kvcm", Step.ENDING),
    Plan(Victim.STANDBY, "kvcm", Step.STARTED),
    Plan(Victim.FROZEN_LEADER, "native", Step.STARTED),
)


async def test_no_write_is_lost_or_found_too_early_whatever_is_killed_in_the_middle_of_it(tmp_path: Path) -> None:
    verdict = await run(tmp_path, seed=1, chosen=CHOSEN, minutes=2.0)
    assert report(verdict) == 0
    assert verdict.rounds == len(CHOSEN)
