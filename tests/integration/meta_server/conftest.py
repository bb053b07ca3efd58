"""Fixtures of the meta server's integration tests."""

from __future__ import annotations

import pytest

from stratakv import migrate


@pytest.fixture
def migrated_url(postgres_url: str) -> str:
    """URL of a database with the newest schema."""
    migrate.upgrade(postgres_url)
    return postgres_url
