"""One client of the admin database, once PostgreSQL has let it in. Made by `Relay`, started by its session after the login.

PostgreSQL is asked what the client may see, and its connection is closed; from then on the DB node answers by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbnode.sql.admin.login import Viewer, viewer, viewer_exchange
from dbnode.sql.admin.protocol import AdminProtocol
from dbnode.sql.admin.tables import Show
from dbnode.sql.errors import GatewayFailed, ProtocolViolation
from dbnode.sql.messages import message
from stratakv.log import EventLogger

if TYPE_CHECKING:
    from dbnode.sql.session import Session

log = EventLogger(__name__)


class AdminConsole:
    """Answers of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._held = b""
        self._protocol: AdminProtocol | None = None

    @property
    def is_open(self) -> bool:
        """PostgreSQL is not needed any more."""
        return self._protocol is not None

    def start(self) -> None:
        """The login is done."""
        self._session.client.stop_reading()
        exchange = viewer_exchange()
        self._session.run_own(exchange, lambda: self._open(viewer(exchange)))

    def _open(self, who: Viewer | None) -> None:
        session = self._session
        if who is None:
            session.end(GatewayFailed("PostgreSQL does not say what this role may see"))
            return
        log.info("admin_session", session=session.name, user=who.user)
        self._protocol = AdminProtocol(Show(session.relay, who).run)
        session.backend.write(message(b"X"))
        session.backend.close()
        session.client.read_on()
        held, self._held = self._held, b""
        if held:
            self.feed(held)

    def feed(self, data: bytes) -> None:
        """From the client. Raises ProtocolViolation."""
        if self._protocol is None:
            self._held += data
            return
        self._protocol.feed(data)
        self._go_on()

    def resume(self) -> None:
        """The client has read what it was sent."""
        try:
            self._go_on()
        except ProtocolViolation as error:
            self._session.end(error)
        else:
            if not self._session.client.is_full:
                self._session.client.read_on()

    def _go_on(self) -> None:
        """Answer what has been asked, as long as the client reads. Raises ProtocolViolation."""
        session, protocol = self._session, self._protocol
        assert protocol is not None
        while not session.client.is_full and (answers := protocol.answers()):
            session.client.write(answers)
        if session.client.is_full:
            session.client.stop_reading()
        if protocol.has_ended:
            session.client_left()
