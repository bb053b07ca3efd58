"""What a tenant sees of its own usage and limits in a database that does not have them: asked for over the private listener.

Where the metadata lie in the user's own database, views there answer instead (migration 0011); both tell the same.
"""

from __future__ import annotations

import json
from functools import partial

from dbnode.metadata import Metadata
from dbnode.sql.topics import Asked, Topic, Topics
from stratakv.queries import load_queries

REQUESTS_MAX = 10_000
"""Single requests told at once, the latest."""

_queries = load_queries("dbnode")


def own_usage_topics(metadata: Metadata) -> Topics:
    """`usage`, `requests` and `limits`."""
    return {
        "usage": Topic(partial(_read, metadata, "own_usage")),
        "requests": Topic(partial(_read, metadata, "own_requests", REQUESTS_MAX)),
        "limits": Topic(partial(_read, metadata, "own_limits")),
    }


async def _read(metadata: Metadata, query: str, *parameters: object | Asked) -> str:
    """Rows as JSON; none for a role that logs in for no tenant."""
    *before, asked = parameters
    assert isinstance(asked, Asked)
    if asked.login is None or not asked.login.cluster:
        return "[]"
    login = asked.login
    async with metadata.connection() as connection:
        rows = await connection.fetch(_queries[query], login.cluster, login.role, login.oid, *before)
    return json.dumps([dict(row) for row in rows], default=str)
