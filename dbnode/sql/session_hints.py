"""The hints of one session: of the statement that runs, of cursors that are open, and what its transaction remembers.

Its owner is the session, which tells when a statement and when a transaction has ended; the private listener asks it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dbnode.sql.hints import HintStats, StatementHints
from dbnode.sql.memo import KeptAnswers, TransactionMemo
from stratakv.errors import StrataError


class SessionHints:
    """Begins and ends the hints of statements."""

    def __init__(
        self, make_statement: Callable[[TransactionMemo], StatementHints], stats: HintStats, kept: KeptAnswers
    ) -> None:
        self._make_statement = make_statement
        self._stats = stats
        self._kept = kept
        self._memo = TransactionMemo(kept)
        self._statement: StatementHints | None = None
        self._lasting: list[StatementHints] = []
        """Of cursors that are open."""
        self._has_failed = False
        self.is_used = False
        """A statement has asked for hints in this transaction; else there is nothing to end."""

    @property
    def statement(self) -> StatementHints:
        """Of the statement that runs, or is about to."""
        if self._statement is None:
            self.is_used = True
            self._statement = self._make_statement(self._memo)
        return self._statement

    def abort(self, failure: StrataError) -> None:
        """The client has cancelled the statement."""
        if self._statement is not None:
            self._statement.abort(failure)

    @property
    def is_aborted(self) -> bool:
        """Whether the statement has not ended since."""
        return self._statement is not None and self._statement.failure is not None

    def note_failure(self) -> None:
        """PostgreSQL has refused something: the answers are worth keeping when the transaction has ended."""
        self._has_failed = True

    def end_statement(self) -> None:
        statement, self._statement = self._statement, None
        if statement is None:
            return
        if statement.is_lasting and statement.failure is None:
            self._lasting.append(statement)
        else:
            statement.close()

    def end_transaction(self) -> None:
        """The session is outside a transaction, or has ended."""
        self.end_statement()
        for statement in self._lasting:
            statement.close()
        self._lasting.clear()
        self._stats.wasted += self._memo.end(failed=self._has_failed)
        if self._has_failed and len(self._kept):
            asyncio.get_running_loop().call_later(self._kept.limits.ttl_s, self._kept.trim)
        self._has_failed = False
        self.is_used = False
