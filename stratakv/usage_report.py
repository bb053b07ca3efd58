"""What was used, in sums of days, months, tenants and models: what `stratakv usage` shows. Reads the metadata database.

Every command of the command line imports this module, so what it takes long to import is imported where it is used.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, LiteralString

from stratakv.errors import InvalidRequest, SetupError

if TYPE_CHECKING:
    import psycopg

CONNECT_TIMEOUT_S = 10


class GroupBy(enum.StrEnum):
    """What the sums are of."""

    DAY = "day"
    MONTH = "month"
    TENANT = "tenant"
    MODEL = "model"


_KEYS: dict[GroupBy, LiteralString] = {
    GroupBy.DAY: "day",
    GroupBy.MONTH: "to_char(day, 'YYYY-MM')",
    GroupBy.TENANT: "tenant",
    GroupBy.MODEL: "model",
}
COUNTS = (
    "requests",
    "failed",
    "cancelled",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "unused_requests",
    "unused_tokens",
)
_SUMS: LiteralString = (
    "sum(requests)::bigint AS requests, sum(failed)::bigint AS failed, sum(cancelled)::bigint AS cancelled,"
    " sum(prompt_tokens)::bigint AS prompt_tokens, sum(cached_tokens)::bigint AS cached_tokens,"
    " sum(generated_tokens)::bigint AS generated_tokens, sum(unused_requests)::bigint AS unused_requests,"
    " sum(unused_tokens)::bigint AS unused_tokens"
)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Whose usage of what, when. Days are those of UTC; the last one is part of it."""

    by: Sequence[GroupBy] = (GroupBy.TENANT,)
    tenant: str | None = None
    model: str | None = None
    since: datetime.date | None = None
    until: datetime.date | None = None


def read_usage(url: str, query: UsageQuery) -> list[dict[str, Any]]:
    """One row for each group, sorted by it. Raises SetupError, or InvalidRequest for a tenant that is not there."""
    import psycopg
    from psycopg.rows import dict_row

    from stratakv.migrate import driver_url, masked_url

    keys = list(dict.fromkeys(query.by))
    columns: list[LiteralString] = [f"{_KEYS[key]} AS {key.value}" for key in keys]
    places = ", ".join(str(number) for number in range(1, len(keys) + 1))
    statement = (
        f"SELECT {', '.join(columns)}, {_SUMS} FROM stratakv.usage_by_day"
        " WHERE (%(tenant)s::text IS NULL OR tenant = %(tenant)s) AND (%(model)s::text IS NULL OR model = %(model)s)"
        " AND (%(since)s::date IS NULL OR day >= %(since)s) AND (%(until)s::date IS NULL OR day <= %(until)s)"
        f" GROUP BY {places} ORDER BY {places}"
    )
    given = {"tenant": query.tenant, "model": query.model, "since": query.since, "until": query.until}
    try:
        with psycopg.connect(driver_url(url), connect_timeout=CONNECT_TIMEOUT_S, row_factory=dict_row) as connection:
            if query.tenant is not None:
                _require_tenant(connection, query.tenant)
            return connection.execute(statement.encode(), given).fetchall()
    except psycopg.errors.UndefinedTable as error:
        raise SetupError(
            f"database {masked_url(url)} has no sums of usage", hint="run `stratakv migrate upgrade`"
        ) from error
    except psycopg.Error as error:
        raise SetupError(f"database {masked_url(url)}: {str(error).strip().splitlines()[0]}") from error


def _require_tenant(connection: psycopg.Connection[dict[str, Any]], name: str) -> None:
    if connection.execute("SELECT FROM stratakv.tenants WHERE name = %s", (name,)).rowcount == 0:
        raise InvalidRequest(f"there is no tenant {name!r}")
