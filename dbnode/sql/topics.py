"""What SQL functions can ask the DB node besides answers of the model: a handler for each topic.

Made by whoever knows the answer, and handed to `SqlFront`; the private listener runs them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dbnode.sql.service import Login


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and who asks."""

    payload: Mapping[str, Any] = field(repr=False)
    role: str
    """SET ROLE if there was one, else the session's user."""
    database: str
    session: str
    login: Login | None
    """None if the functions do not tell it."""


@dataclass(frozen=True, slots=True)
class Topic:
    """How questions are answered. Cancelling the task stops the work."""

    answer: Callable[[Asked], Awaitable[str]]
    """The answer's text. Raises StrataError, or NullAnswer."""
    has_effects: bool = False
    """Then it is refused while the gateway only looks ahead."""


Topics = Mapping[str, Topic]
