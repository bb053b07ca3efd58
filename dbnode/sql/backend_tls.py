"""TLS to PostgreSQL, as the `sslmode` of the backend URL asks for it, with the meanings that libpq gives it."""

from __future__ import annotations

import asyncio
import enum
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from dbnode.sql.certificates import end_point_digest
from dbnode.sql.startup import TLS_REQUEST
from dbnode.sql.tls_transport import ALPN, EndPoint, TlsTransport
from stratakv.errors import SetupError
from stratakv.process import is_loopback

_SYSTEM = "system"
_DEFAULT_ROOT = Path("~/.postgresql/root.crt")


class SslMode(enum.StrEnum):
    """libpq's; `allow` is taken for `prefer`."""

    DISABLE = "disable"
    ALLOW = "allow"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


@dataclass(frozen=True, slots=True)
class BackendTls:
    """How TLS with PostgreSQL is made."""

    context: ssl.SSLContext = field(repr=False)
    is_required: bool
    """Else PostgreSQL may decline."""
    server_hostname: str

    @classmethod
    def from_query(cls, query: Mapping[str, str], host: str) -> BackendTls | None:
        """Of the URL's parameters; None: no TLS. Without sslmode it is preferred, except on this machine. Raises SetupError."""
        try:
            mode = SslMode(query.get("sslmode") or (SslMode.DISABLE if is_loopback(host) else SslMode.PREFER))
        except ValueError:
            raise SetupError(f"sql.backend_url: sslmode: expected one of {', '.join(SslMode)}") from None
        if mode is SslMode.DISABLE:
            return None
        root = query.get("sslrootcert")
        if root and mode is SslMode.REQUIRE:
            mode = SslMode.VERIFY_FULL if root == _SYSTEM else SslMode.VERIFY_CA
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([ALPN])
        context.check_hostname = mode is SslMode.VERIFY_FULL
        if mode in (SslMode.VERIFY_CA, SslMode.VERIFY_FULL):
            _trust(context, root)
        else:
            context.verify_mode = ssl.CERT_NONE
        if query.get("sslcert"):
            _show(context, query["sslcert"], query.get("sslkey"))
        return cls(context, mode not in (SslMode.ALLOW, SslMode.PREFER), host)

    def wrap(self, lower: asyncio.Transport, protocol: asyncio.BaseProtocol) -> TlsTransport:
        """To be started."""
        return TlsTransport(
            lower, protocol, self.context, _end_point, server_side=False, server_hostname=self.server_hostname
        )


def _end_point(connection: ssl.SSLObject) -> EndPoint:
    certificate = connection.getpeercert(binary_form=True)
    return EndPoint(end_point_digest(certificate) if certificate else None)


def _trust(context: ssl.SSLContext, root: str | None) -> None:
    if root == _SYSTEM:
        context.load_default_certs()
        return
    path = Path(root).expanduser() if root else _DEFAULT_ROOT.expanduser()
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:  # the second is one of the first, but says nothing in strerror
        reason = "no certificates in it" if isinstance(error, ssl.SSLError) else error.strerror
        raise SetupError(
            f"sql.backend_url: root certificates: {path}: {reason}",
            hint="Name their file with sslrootcert=…, or take those of this machine with sslrootcert=system.",
        ) from error


def _show(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    try:
        context.load_cert_chain(Path(certificate).expanduser(), Path(key).expanduser() if key else None, password="")
    except (OSError, ssl.SSLError) as error:
        raise SetupError(f"sql.backend_url: sslcert, sslkey: {certificate} cannot be used: {error}") from error


class TlsNegotiation(asyncio.Protocol):
    """Asks PostgreSQL for TLS. Reads no more than is there when the answer comes, and nothing after it."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        """One byte; more is an error message, or has been slipped in by somebody between us."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(TLS_REQUEST)

    def data_received(self, data: bytes) -> None:
        self.transport.pause_reading()
        if not self.answer.done():
            self.answer.set_result(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_exception(error or ConnectionResetError("PostgreSQL closed the connection"))
