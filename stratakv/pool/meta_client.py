"""Client of the meta server: many calls at once, each with its own deadline, always to the one that leads.

    client = MetaClient(settings.meta, role="worker", name="decode-0")
    match = await client.call(MatchPrefix(namespace, keys, lease_s=5.0), Match)

A call that gets no answer in time costs its caller that time once: from then on `available` is False and calls fail at
once, while a background task greets all servers every second until the leader answers. A server that no longer leads says so
at once: then the call is sent again to its successor, which is safe, as every message may be repeated. One event loop owns a
client.
"""

from __future__ import annotations

import asyncio

from stratakv.errors import StrataError, Unavailable
from stratakv.log import EventLogger
from stratakv.pool.auth import PoolCredentials
from stratakv.pool.fence import TermFence
from stratakv.pool.meta_errors import NotLeader, ProtocolMismatch
from stratakv.pool.meta_link import Elsewhere, MetaLink, NoAnswer
from stratakv.settings import MetaSettings
from stratakv.wire import PROTOCOL_VERSION, Hello, Message, ReplyT, Welcome

PROBE_S = 1.0
"""How often servers that do not answer are greeted."""
ELECTION_PROBE_S = 0.1
"""The same, while one that answers says that it does not lead."""
RETRY_S = 0.25
"""Between two calls of `insist`."""
_log = EventLogger("stratakv.meta_client")


class MetaClient:
    """Connects, and reconnects, by itself."""

    def __init__(
        self,
        server: MetaSettings | str,
        *,
        role: str = "client",
        name: str = "",
        credentials: PoolCredentials | None = None,
        fence: TermFence | None = None,
    ) -> None:
        """`server` is an endpoint (tcp://host:port) or the settings that name it, or several.

        With `credentials` only a server that has the same ones is spoken to; one that has others never answers. With a `fence`
        answers of leaders that it knows to be succeeded are not taken.
        """
        settings = MetaSettings() if isinstance(server, str) else server
        self.endpoints = [server] if isinstance(server, str) else meta_endpoints(settings)
        self._timeout_s = settings.request_timeout_s
        self._hello = Hello(protocol=PROTOCOL_VERSION, role=role, name=name)
        self._credentials = credentials
        self._fence = fence or TermFence()
        self._link: MetaLink | None = None
        self._doubted: MetaLink | None = None
        """The link before: until its server is greeted again, what is in progress there may still be answered."""
        self._search: asyncio.Task[None] | None = None
        self._round = asyncio.Event()
        """Set when the first round of greetings is over."""
        self._hints: set[str] = set()
        self._closed = False
        self.welcome: Welcome | None = None
        """What the leader said of itself last; a new `epoch` means that it was started anew, or is another one."""
        self.mismatch: ProtocolMismatch | None = None
        """Set while the servers refuse this client's protocol version."""

    async def __aenter__(self) -> MetaClient:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def available(self) -> bool:
        """False from a call that timed out (or before the first greeting) until a leader answers again."""
        return self._link is not None

    @property
    def endpoint(self) -> str:
        """Of the leader; while there is none, of all servers."""
        return self._link.endpoint if self._link is not None else ", ".join(self.endpoints)

    async def start(self) -> bool:
        """Connect and greet; whether a leader answered (if not, greeting goes on). The first call does so by itself.

        Raises ProtocolMismatch.
        """
        self._look_for_leader()
        await self._round.wait()
        if self.mismatch is not None:
            raise self.mismatch
        return self.available

    async def close(self) -> None:
        """Fail what is in progress, and disconnect."""
        self._closed = True
        if self._search is not None:
            self._search.cancel()
            await asyncio.gather(self._search, return_exceptions=True)
        self._round.set()
        for link in (self._link, self._doubted):
            if link is not None:
                link.close("the client was closed")
        self._link = self._doubted = None

    async def call(self, request: Message, reply_type: type[ReplyT], timeout_s: float | None = None) -> ReplyT:
        """Send one request; its reply.

        Waits at most `timeout_s`, and never longer than `meta.request_timeout_s`. Raises Unavailable if no answer came (what
        was asked may have been done), else what the server said: the classes of `stratakv.pool.meta_errors` and
        `stratakv.errors`.
        """
        if self._link is None and self._search is None:
            await self.start()
        limit_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        deadline = asyncio.get_running_loop().time() + limit_s
        while True:
            link = self._link
            if link is None:
                raise self.mismatch or Unavailable(
                    f"the meta server at {self.endpoint} does not answer",
                    hint="If it runs, compare pool.secret of both.",
                )
            try:
                return self._fenced(link, await link.exchange(request, reply_type, self._left_s(deadline)))
            except Elsewhere as error:
                self._lost(link, error.leader)
                if not await self._found(deadline):
                    raise
            except NoAnswer:
                self._lost(link)
                raise

    async def insist(self, request: Message, reply_type: type[ReplyT], *, for_s: float) -> ReplyT:
        """`call`, again and again while no meta server answers. Raises Unavailable when that has taken `for_s`."""
        deadline = asyncio.get_running_loop().time() + for_s
        while True:
            try:
                return await self.call(request, reply_type)
            except Unavailable:
                if asyncio.get_running_loop().time() + RETRY_S > deadline:
                    raise
            await asyncio.sleep(RETRY_S)

    def _fenced(self, link: MetaLink, reply: ReplyT) -> ReplyT:
        term = link.welcome.term if link.welcome is not None else 0
        if not self._fence.admits(term):
            self._lost(link)
            raise NotLeader(f"the meta server at {link.endpoint} has been succeeded by another leader")
        return reply

    async def _found(self, deadline: float) -> bool:
        """Whether another leader is found until then."""
        try:
            async with asyncio.timeout(self._left_s(deadline)):
                while self._link is None and not self._closed:
                    self._round.clear()
                    await self._round.wait()
        except TimeoutError:
            return False
        return self._link is not None

    def _left_s(self, deadline: float) -> float:
        return max(0.0, deadline - asyncio.get_running_loop().time())

    def _lost(self, link: MetaLink, hint: str = "") -> None:
        if link is not self._link:
            return
        _log.warning("meta_server_lost", endpoint=link.endpoint)
        self._link, self._doubted = None, link
        self._look_for_leader(hint)

    def _look_for_leader(self, hint: str = "") -> None:
        if hint:
            self._hints = {f"tcp://{hint}"}
        if self._link is None and not self._closed and (self._search is None or self._search.done()):
            self._search = asyncio.get_running_loop().create_task(self._greet_until_answered())

    async def _greet_until_answered(self) -> None:
        loop = asyncio.get_running_loop()
        while self._link is None:
            began = loop.time()
            asked = {*self.endpoints, *self._hints}
            is_election = await self._greet_all()
            if self._link is None and not self._hints <= asked:
                continue  # one that stands by has told of a leader
            self._round.set()
            if self._link is None:
                pause_s = ELECTION_PROBE_S if is_election else PROBE_S
                await asyncio.sleep(max(0.0, began + pause_s - loop.time()))
        _log.info("meta_server_found", endpoint=self.endpoint)

    async def _greet_all(self) -> bool:
        """Take the leader, if one answers; whether any other server answered."""
        endpoints = list(dict.fromkeys([*self.endpoints, *self._hints]))
        doubted, self._doubted = self._doubted, None
        links = [doubted] if doubted is not None else []
        links += [MetaLink(e, self._credentials) for e in endpoints if doubted is None or e != doubted.endpoint]
        for link in links:
            link.welcome = None
        greetings = [asyncio.create_task(self._greet(link)) for link in links]
        try:
            # The first leader that answers is taken: nobody waits for those that are silent.
            for next_greeting in asyncio.as_completed(greetings):
                await next_greeting
                leaders = [link for link in links if _leads(link)]
                if leaders:
                    self._take(leaders[0])
                    break
        finally:
            for greeting in greetings:
                greeting.cancel()
            await asyncio.gather(*greetings, return_exceptions=True)
            for link in links:
                if link is not self._link:
                    link.close("the greeting was given up")
        answered = [link.welcome for link in links if link.welcome is not None]
        self._hints = {f"tcp://{welcome.leader}" for welcome in answered if welcome.leader}
        return bool(answered)

    def _take(self, link: MetaLink) -> None:
        assert link.welcome is not None
        if self._fence.admits(link.welcome.term):
            self._link, self.welcome, self.mismatch = link, link.welcome, None

    async def _greet(self, link: MetaLink) -> None:
        try:
            link.welcome = await link.exchange(self._hello, Welcome, min(PROBE_S, self._timeout_s))
        except ProtocolMismatch as error:
            self.mismatch = error
        except StrataError as error:
            _log.debug("meta_server_silent", endpoint=link.endpoint, error=error.message)


def _leads(link: MetaLink) -> bool:
    return link.welcome is not None and link.welcome.is_leader


def meta_endpoints(settings: MetaSettings) -> list[str]:
    """Where the meta servers are that the settings name."""
    addresses = settings.addresses or (f"{settings.host}:{settings.native_port}",)
    return [f"tcp://{address}" for address in addresses]
