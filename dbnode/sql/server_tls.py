"""The TLS that we offer as a server: to clients from configured files, at the private listener from a certificate of our own.

`ClientTls` keeps what is offered to new clients and reads its files again when it is told to.
"""

from __future__ import annotations

import asyncio
import ssl
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from dbnode.sql.certificates import end_point_digest, first_certificate, make_certificate
from dbnode.sql.tls_transport import ALPN, EndPoint, TlsTransport
from stratakv.errors import SetupError
from stratakv.settings import SqlSettings, TlsMode

_OTHERS = 0o007


@dataclass(frozen=True, slots=True)
class ServerTls:
    """One certificate, ready to be shown."""

    context: ssl.SSLContext = field(repr=False)
    end_point: EndPoint

    @classmethod
    def load(cls, certificate: Path, key: Path) -> ServerTls:
        """Raises OSError, ssl.SSLError, ValueError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([ALPN])
        context.num_tickets = 0  # libpq resumes no sessions
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.load_cert_chain(certificate, key, password="")  # else an encrypted key would ask at the terminal
        return cls(context, EndPoint(end_point_digest(first_certificate(certificate.read_bytes()))))

    def wrap(
        self, lower: asyncio.Transport, protocol: asyncio.BaseProtocol, *, alpn_required: bool = False
    ) -> TlsTransport:
        """To be started."""
        return TlsTransport(
            lower, protocol, self.context, lambda _: self.end_point, server_side=True, alpn_required=alpn_required
        )


def own_tls(name: str) -> ServerTls:
    """With a certificate made now. Its key is on disk only while OpenSSL reads it, which takes files only."""
    made = make_certificate(name)
    with tempfile.TemporaryDirectory(prefix="stratakv-") as directory:  # 0700
        certificate, key = Path(directory, "certificate"), Path(directory, "key")
        certificate.write_bytes(made.certificate)
        key.write_bytes(made.key)
        return ServerTls.load(certificate, key)


class ClientTls:
    """TLS with clients, as configured."""

    def __init__(self, settings: SqlSettings) -> None:
        """Raises SetupError."""
        self.mode = settings.tls_mode
        self._certificate, self._key = settings.tls_cert, settings.tls_key
        if (self._certificate is None) != (self._key is None):
            raise SetupError("sql.tls_cert and sql.tls_key go together: one of them is not set")
        if self.mode is TlsMode.REQUIRE and self._certificate is None:
            raise SetupError(
                "sql.tls_mode = require: there is no certificate", hint="Set sql.tls_cert and sql.tls_key."
            )
        self.current: ServerTls | None = None
        """What a new client gets; None: no TLS of ours."""
        self.reload()

    def reload(self) -> None:
        """Read the files again; what is in use stays if they are wrong. Raises SetupError."""
        if self._certificate is None or self._key is None or self.mode not in (TlsMode.ALLOW, TlsMode.REQUIRE):
            return
        try:
            self._certificate.open("rb").close()  # load_cert_chain would not say which file is missing
            if stat.S_IMODE(self._key.stat().st_mode) & _OTHERS:
                raise SetupError(f"sql.tls_key: {self._key} may be read by others", hint=f"chmod 600 {self._key}")
            self.current = ServerTls.load(self._certificate, self._key)
        except ssl.SSLError as error:
            raise SetupError(
                f"sql.tls_cert, sql.tls_key: {self._certificate} and {self._key} are no certificate and its key",
                hint=f"OpenSSL says: {error.reason or error}; the key must not be encrypted.",
            ) from error
        except OSError as error:
            raise SetupError(f"sql.tls_cert, sql.tls_key: {error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise SetupError(f"sql.tls_cert: {self._certificate}: {error}") from error
