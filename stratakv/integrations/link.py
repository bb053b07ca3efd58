"""A pool client for code that has threads and no event loop: what runs inside another engine.

    link = PoolLink("tcp://127.0.0.1:6383", credentials=None, role="vllm", name="host-1")
    answer = link.call(MatchPrefix(…), Match)          a future; nothing blocks
    link.tell(ReleaseLease(lease_id))                  nobody waits for the answer

One background thread runs the client of the meta server; connections to daemons are shared by all threads.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from stratakv.errors import SetupError, StrataError, Unavailable
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.dmp_client import ConnectionCache
from stratakv.pool.meta_client import MetaClient
from stratakv.settings import MetaSettings
from stratakv.wire import Done, ListNodes, Message, Nodes, ReplyT

log = EventLogger("stratakv.integrations.link")

START_S = 2.0
"""How long the first greeting may take before the engine goes on without."""
CLOSE_S = 2.0
TOLD_MAX = 4096
"""Messages on their way that nobody waits for; more are dropped (leases end by themselves)."""
DIAL_S = 0.2

ResultT = TypeVar("ResultT")


def read_credentials(secret_file: str | None) -> PoolCredentials | None:
    """Of a file that holds nothing but the pool's secret. Raises SetupError."""
    if not secret_file:
        return None
    try:
        secret = Path(secret_file).expanduser().read_text().strip()
    except OSError as error:
        raise SetupError(f"pool_secret_file {secret_file} cannot be read: {error.strerror}") from error
    return PoolCredentials(secret)


class PoolLink:
    """The meta server and the daemons of one pool. Thread-safe."""

    def __init__(self, meta: str, *, credentials: PoolCredentials | None, role: str, name: str) -> None:
        """`meta`: tcp://host:port of the meta server, or of several that stand by for each other, with commas between them."""
        self.connections = ConnectionCache(credentials=credentials)
        addresses = tuple(address.strip().removeprefix("tcp://") for address in meta.split(","))
        self.meta = MetaClient(MetaSettings(addresses=addresses), role=role, name=name, credentials=credentials)
        """For coroutines of `submit`."""
        self._addresses = addresses
        self._loop = asyncio.new_event_loop()
        self._told: set[Future[Done]] = set()
        self._thread = threading.Thread(target=self._run, name="stratakv-link", daemon=True)
        self._thread.start()
        self._await_greeting()

    @property
    def is_available(self) -> bool:
        """Whether the meta server answered last."""
        return self.meta.available

    def submit(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """Run on the link's event loop. Raises Unavailable once the link is closed."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise Unavailable("the connection to the pool was closed") from None

    def call(self, request: Message, reply_type: type[ReplyT], timeout_s: float | None = None) -> Future[ReplyT]:
        """Ask the meta server; the future fails with what `MetaClient.call` raises."""
        return self.submit(self.meta.call(request, reply_type, timeout_s))

    def tell(self, request: Message) -> None:
        """Send what needs no answer; lost if the meta server is away."""
        if len(self._told) >= TOLD_MAX or self._loop.is_closed():
            return
        told = self.call(request, Done)
        self._told.add(told)
        told.add_done_callback(self._was_told)

    def local_node(self) -> str | None:
        """The daemon of this host: the one whose socket can be reached from here; None if there is none."""
        try:
            nodes = self.call(ListNodes(), Nodes).result(START_S)
        except (StrataError, TimeoutError) as error:
            log.info("no_local_node", error=str(error))
            return None
        for node in nodes.nodes:
            if node.segment.socket_name and _is_reachable(node.segment.socket_name):
                return node.segment.node
        return None

    def close(self) -> None:
        """Let go of everything; safe to call more than once."""
        if self._loop.is_closed():
            return
        try:
            self.submit(self.meta.close()).result(CLOSE_S)
        except TimeoutError:
            log.warning("close_timed_out")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        self.connections.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _await_greeting(self) -> None:
        """Raises ProtocolMismatch; a server that is away is greeted on in the background."""
        try:
            if not self.submit(self.meta.start()).result(START_S):
                log.warning("meta_server_away", addresses=self._addresses)
        except TimeoutError:
            log.warning("meta_server_away", addresses=self._addresses)

    def _was_told(self, told: Future[Done]) -> None:
        self._told.discard(told)
        error = None if told.cancelled() else told.exception()
        if error is not None:
            log.debug("not_told", error=str(error))


def _is_reachable(socket_name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(DIAL_S)
        try:
            sock.connect("\0" + socket_name)
        except OSError:
            return False
        return True
