"""The model of `tests.chaos` knows a wrong history when it sees one."""

from __future__ import annotations

import pytest

from tests.chaos.history import Event, History, Kind

GRANTED = Event(1.0, Kind.GRANTED, "w", blocks=3, timeout_s=5.0)
ENDING = Event(2.0, Kind.ENDING, "w")
ENDED = Event(3.0, Kind.ENDED, "w")
REFUSED = Event(3.0, Kind.REFUSED, "w")


def found(blocks: int, at_s: float, kind: Kind = Kind.SEEN) -> Event:
    return Event(at_s, kind, "w", blocks=blocks)


@pytest.mark.parametrize(
    "events",
    [
        [GRANTED],
        [GRANTED, found(0, 1.5), ENDING, found(3, 2.5), ENDED, found(0, 4.0), found(3, 9.0, Kind.FINAL)],
        [GRANTED, ENDING, REFUSED, found(0, 9.0, Kind.FINAL)],
        [GRANTED, ENDING, found(3, 9.0, Kind.FINAL)],
        [GRANTED, ENDING, found(0, 9.0, Kind.FINAL)],
        [GRANTED, Event(20.0, Kind.ENDING, "w"), Event(21.0, Kind.REFUSED, "w")],
    ],
)
def test_what_may_happen_is_let_through(events: list[Event]) -> None:
    assert History(events).violations(slack_s=1.0) == []


@pytest.mark.parametrize(
    ("events", "violation"),
    [
        ([GRANTED, found(3, 1.5), ENDING], "before anybody finished"),
        ([GRANTED, ENDING, found(2, 2.5)], "all or nothing"),
        ([GRANTED, ENDING, REFUSED, found(3, 4.0)], "though it was refused"),
        ([GRANTED, ENDING, found(3, 2.5), REFUSED], "though it was refused"),
        ([GRANTED, ENDING, ENDED, found(0, 9.0, Kind.FINAL)], "lost"),
        ([GRANTED, ENDING, ENDED, REFUSED], "acknowledged, and refused"),
        ([GRANTED, Event(20.0, Kind.ENDING, "w"), Event(21.0, Kind.ENDED, "w")], "after its time"),
    ],
)
def test_what_must_not_happen_is_found(events: list[Event], violation: str) -> None:
    assert violation in "; ".join(History(events).violations(slack_s=1.0))
