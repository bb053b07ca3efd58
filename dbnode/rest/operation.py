"""What the OpenAPI document says of one endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from dbnode.rest.answer_schemas import Schema

WITH_BODY = (400, 404, 408, 413)
GENERATED = (*WITH_BODY, 502, 504)
"""Errors of endpoints that take a body, and of those whose answer workers make."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint."""

    summary: str
    answer: str
    """Name of its schema."""
    body: Schema | None = None
    body_is_optional: bool = False
    event: str | None = None
    """Name of the schema of what it streams."""
    errors: tuple[int, ...] = ()
    """Beside those that any endpoint can have."""
    media_type: str = "application/json"
    parameters: tuple[Schema, ...] = ()
    """Beside those that FastAPI has found out."""
    more: dict[int, str] = field(default_factory=dict)
    """Other statuses → names of schemas."""
