"""What a DB node counts of conversations. Told by `dbnode.conversations.service`; never ids, texts or tenants."""

from __future__ import annotations

import enum

from prometheus_client import CollectorRegistry, Counter, Gauge

from dbnode.generate import Source
from stratakv.errors import Cancelled, StrataError


class TurnOutcome(enum.StrEnum):
    """How a turn ended."""

    COMPLETED = "completed"
    """Its messages and the answer were added."""
    REPEATED = "repeated"
    """It had been taken already; its answer was told again."""
    CANCELLED = "cancelled"
    FAILED = "failed"


class ConversationMetrics:
    """Of one DB node; how many are open is the same at all of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._turns = Counter(
            "stratakv_conversation_turns",
            "Turns of conversations that ended.",
            ["source", "outcome", "error"],
            registry=registry,
        )
        self._expired = Counter(
            "stratakv_conversations_expired",
            "Conversations that nobody added to for long, cleared away by this DB node.",
            registry=registry,
        )
        self._open = Gauge("stratakv_conversations_open", "Conversations that have not ended.", registry=registry)

    def turn_ended(self, source: Source, outcome: TurnOutcome, error: StrataError | None) -> None:
        if isinstance(error, Cancelled):
            outcome, error = TurnOutcome.CANCELLED, None
        self._turns.labels(source.value, outcome.value, error.code if error else "").inc()

    def swept(self, num_expired: int, num_open: int) -> None:
        self._expired.inc(num_expired)
        self._open.set(num_open)
