"""What the clients of a run saw, in order, and whether any correct meta server could have shown them that."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


class Kind(enum.StrEnum):
    """Of an event; those of a write in the order in which they can come."""

    GRANTED = "granted"
    ENDING = "ending"
    """The writer asks for the end of the write; it may ask again and again."""
    ENDED = "ended"
    """Acknowledged."""
    REFUSED = "refused"
    """Nothing of it will be found, the server has said."""
    SEEN = "seen"
    """A lookup has told how many of the write's blocks there are."""
    FINAL = "final"
    """The same, after everything has come to rest."""
    FAULT = "fault"
    """Something was killed, frozen or started again."""


@dataclass(frozen=True, slots=True)
class Event:
    at_s: float
    kind: Kind
    write: str = ""
    """The write it is about."""
    blocks: int = 0
    """Granted, or found."""
    timeout_s: float = 0.0
    """Of the grant."""
    began_s: float = 0.0
    """When the answer that tells of it was asked for."""
    what: str = ""

    def __str__(self) -> str:
        about = f"{self.write} {self.blocks} blocks" if self.write else self.what
        return f"{self.at_s:9.3f} {self.kind:8} {about}"


@dataclass(slots=True)
class History:
    """Events in the order of their ends."""

    events: list[Event] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        return time.monotonic() - self._began

    def add(self, kind: Kind, write: str = "", **details: object) -> None:
        self.events.append(Event(self.now(), kind, write, **details))  # type: ignore[arg-type]

    def count(self, kind: Kind) -> int:
        return sum(event.kind is kind for event in self.events)

    def of(self, write: str) -> list[Event]:
        return [event for event in self.events if event.write == write or event.kind is Kind.FAULT]

    def violations(self, slack_s: float) -> list[str]:
        """What no correct meta server could have answered; `slack_s` is how late a deadline may be noticed."""
        writes: dict[str, list[Event]] = {}
        for event in self.events:
            if event.write:
                writes.setdefault(event.write, []).append(event)
        return [f"{name}: {what}" for name, events in writes.items() for what in _violations(events, slack_s)]


def _violations(events: list[Event], slack_s: float) -> Iterator[str]:
    """Of one write."""
    first = {kind: next((e for e in events if e.kind is kind), None) for kind in Kind}
    granted, ending, ended, refused = (first[k] for k in (Kind.GRANTED, Kind.ENDING, Kind.ENDED, Kind.REFUSED))
    assert granted is not None, "a write is recorded from its grant on"
    if ended is not None and refused is not None:
        yield "acknowledged, and refused"
    if ended is not None and ending is not None and ending.at_s > granted.at_s + granted.timeout_s + slack_s:
        yield "acknowledged after its time was over"
    for event in events:
        if event.kind not in (Kind.SEEN, Kind.FINAL):
            continue
        if event.blocks not in (0, granted.blocks):
            yield f"{event.blocks} of {granted.blocks} blocks found: it is all or nothing"
        if event.blocks and (ending is None or event.at_s < ending.at_s):
            yield "found before anybody finished it"
        if event.blocks and refused is not None:
            yield "found though it was refused"
        if event.kind is Kind.FINAL and ended is not None and not event.blocks:
            yield "acknowledged, and lost"
