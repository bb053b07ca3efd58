"""Follows a request on another worker: its messages, as that worker's HTTP face streams them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import aiohttp
import msgspec

from stratakv.pool.auth import PoolCredentials, RequestSigner
from workers.handover.errors import HandoverFailed
from workers.handover.messages import PATH, AnyMessage, FrameReader

CONNECT_TIMEOUT_S = 2.0
SILENT_S_MAX = 5.0
"""The other worker says every second that it lives."""


class HandoverClient:
    """Connections to other workers. Used from one event loop."""

    def __init__(self, credentials: PoolCredentials | None) -> None:
        self._signer = RequestSigner(credentials) if credentials is not None else None
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def follow(self, url: str, request_id: str) -> AsyncGenerator[AnyMessage, None]:
        """Messages until the other worker has told all. Raises HandoverFailed, MalformedMessage."""
        body = msgspec.json.encode({"request_id": request_id})
        try:
            async with await self._ask(url, body) as response:
                if response.status != 200:
                    raise HandoverFailed(f"{url} does not hand this request over: status {response.status}")
                reader = FrameReader()
                async for data in response.content.iter_any():
                    for message in reader.feed(data):
                        yield message
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise HandoverFailed(f"{url} went away: {type(error).__name__}") from error

    async def _ask(self, url: str, body: bytes) -> aiohttp.ClientResponse:
        """Signed again, once, where the worker has a new challenge."""
        session = self._open_session()
        if self._signer is None:
            return await session.post(url + PATH, data=body)
        for _ in range(2):
            signed = self._signer.sign(url, "POST", PATH, body)
            response = await session.post(url + PATH, data=body, headers=signed.headers)
            challenge = response.headers.get("WWW-Authenticate")
            if response.status != 401 or not self._signer.learn(url, signed, challenge):
                break
            response.release()
        return response

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENT_S_MAX)
            connector = aiohttp.TCPConnector(limit=0)  # the requests of this worker bound the connections
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self._session
