"""What holds for every file of `migrations/versions`."""

from __future__ import annotations

import re

from alembic.config import Config
from alembic.script import Script, ScriptDirectory

from tests.unit.test_repository_rules import ROOT

FLOORS_SINCE = "0009"


def revisions() -> list[Script]:
    """Oldest first."""
    config = Config(str(ROOT / "migrations" / "alembic.ini"))
    return list(reversed(list(ScriptDirectory.from_config(config).walk_revisions())))


def test_revisions_are_numbered_in_one_line() -> None:
    names = [script.revision for script in revisions()]
    assert names == [f"{number:04}" for number in range(1, len(names) + 1)]
    assert [script.down_revision for script in revisions()] == [None, *names[:-1]]


def test_every_revision_says_which_releases_may_work_on_it_and_none_lets_in_what_one_before_shut_out() -> None:
    since = [script for script in revisions() if script.revision >= FLOORS_SINCE]
    floors = [script.module.compatible for script in since]
    assert all(re.fullmatch(r"\d{4}", floor) for floor in floors)
    assert floors == sorted(floors)
    assert all(floor <= script.revision for script, floor in zip(since, floors, strict=True))
