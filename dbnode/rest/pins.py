"""POST /v1/stratakv/pin: keep a prompt's blocks in the pool. Only the DB node can tell which blocks a text has."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from msgspec.structs import replace

from dbnode.inference import InferenceService
from dbnode.rest.door import caller_of
from dbnode.rest.parse import parse_pin
from dbnode.scheduler.pool_view import PoolView
from stratakv.http_body import read_body
from stratakv.settings import RestSettings


class Pins:
    """The endpoint; the meta server keeps the pins."""

    def __init__(self, settings: RestSettings, service: InferenceService, pool: PoolView) -> None:
        self._settings = settings
        self._service = service
        self._pool = pool

    async def pin(self, request: Request) -> dict[str, Any]:
        """Pin the leading blocks that are in the pool, in each namespace of the model's workers."""
        asked, seconds = parse_pin(await read_body(request, self._settings.body_bytes_max))
        keys = await self._service.keys_of(replace(asked, caller=caller_of(request)))
        facts = [r.facts for r in self._service.scheduler.directory.usable(self._service.model) if r.facts]
        pins: list[dict[str, Any]] = []
        for namespace, block_size in sorted({(f.namespace, f.block_size) for f in facts}):
            pinned = await self._pool.pin(bytes.fromhex(namespace), keys.of_size(block_size), seconds)
            if pinned.num_blocks:
                # As text: ids need 63 bits, of which JavaScript keeps 53.
                pins.append({"id": str(pinned.pin_id), "namespace": namespace, "blocks": pinned.num_blocks})
        return {
            "object": "stratakv.pin",
            "prompt_tokens": len(keys.token_ids),
            "blocks": max((pin["blocks"] for pin in pins), default=0),
            "pins": pins,
        }
