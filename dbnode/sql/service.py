"""What the SQL face asks of the DB node: the answer to one prompt. Implemented by `dbnode.inference`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dbnode.charge import Charge
from dbnode.tenants.account import Reservation
from stratakv.errors import StrataError


@dataclass(frozen=True, slots=True)
class CallCost:
    """What one inference took, whatever its end."""

    prompt_tokens: int
    l1_tokens: int
    l2_tokens: int
    pool_tokens: int
    """Prompt tokens that were not computed, by where their KV came from."""
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Login:
    """The role that a session has logged in as; SET ROLE does not change it."""

    role: str
    oid: int
    cluster: str
    """System identifier, in digits; empty if the functions do not tell it."""
    caller_oid: int | None = None
    """Of the role that calls, which SET ROLE does change; None if the functions do not tell it."""


@dataclass(frozen=True, slots=True)
class InferCall:
    """One infer() of a statement, as the function's definer body reports it."""

    prompt: str = field(repr=False)
    model: str | None
    options: Mapping[str, Any]
    """The jsonb object as it was given: whoever runs the call checks names and types."""
    role: str
    """The PostgreSQL role that called: SET ROLE if there was one, else the session's user."""
    database: str
    session: str
    """Names the gateway's session, or the connection if the call came from a session that is not the gateway's."""
    login: Login | None = None
    """None if the functions do not tell it."""
    on_cost: Callable[[CallCost], None] | None = field(default=None, repr=False, compare=False)
    """Told when an inference has ended; infer_agg() may make several."""
    charge: Charge | None = field(default=None, repr=False, compare=False)
    """Of a call made ahead of its statement; others are charged in any case."""
    reservation: Reservation | None = field(default=None, repr=False, compare=False)
    """Of the quota of its tenant, if that was made for several calls together."""


class NullAnswer(StrataError):
    """No failure of the call: its value is NULL, as `on_error` asks for."""


class InferenceService(Protocol):
    """Runs calls. Cancelling the task stops the work."""

    async def infer_text(self, call: InferCall) -> str:
        """The answer. Raises StrataError, or NullAnswer."""
        ...

    async def reserve(self, calls: Sequence[InferCall]) -> list[InferCall]:
        """The calls, with room for all of them in the quota of their tenant, or for none. Raises StrataError."""
        ...
