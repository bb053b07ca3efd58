"""A client that does not read gives its place up."""

from __future__ import annotations

import asyncio

import pytest

from dbnode.rest import completions
from stratakv.errors import Cancelled


async def test_a_client_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "SEND_TIMEOUT_S", 0.01)

    async def never_sent(message: object) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Cancelled):
        await completions._send_part(never_sent, b"data: x\n\n")
