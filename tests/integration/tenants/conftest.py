"""Databases with the metadata's schema, copied from a template, and an administration of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from stratakv.tenancy.administration import Administration

_numbers = count()


@pytest.fixture
def metadata(migrated_url: str) -> str:
    """URL of a migrated database, the test's own."""
    return migrated_url


@pytest.fixture
def admin(metadata: str) -> Iterator[Administration]:
    with Administration(metadata, "test") as opened:
        yield opened
