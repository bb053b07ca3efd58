"""Errors of the PostgreSQL face.

StrataError
├── ProtocolViolation       bytes that are no PostgreSQL protocol; the connection is closed
│   └── DirectTls           a TLS handshake without SSLRequest; closed without an answer
├── PasswordlessLogin       PostgreSQL let a session in without asking for credentials
├── NotSupported            what the admin database does not know
├── AuthenticationFailed    the client does not know the password
├── CertificatesDiffer      the client's login is bound to a certificate that PostgreSQL does not show
├── TlsRequired             the client came without TLS
├── TooManyClients          the limit on connections is reached
├── IdleTimeout             the session was idle for too long
└── BackendUnreachable      PostgreSQL does not answer
"""

from __future__ import annotations

from stratakv.errors import InvalidRequest, Overloaded, PermissionDenied, Unavailable


class ProtocolViolation(InvalidRequest):
    """The bytes are not PostgreSQL's protocol."""

    sqlstate = "08P01"


class MessageTooLong(ProtocolViolation):
    """A message exceeds a limit of ours; it was read over."""

    sqlstate = "54000"


class UnsupportedProtocol(ProtocolViolation):
    """The client speaks another major version of the protocol."""

    sqlstate = "0A000"


class DirectTls(ProtocolViolation):
    """The client starts with a TLS handshake."""


class PasswordlessLogin(PermissionDenied):
    """PostgreSQL trusts the gateway's host, so anybody could be anyone."""

    sqlstate = "28000"


class NotSupported(InvalidRequest):
    """It is understood, and cannot be done."""

    sqlstate = "0A000"


class AuthenticationFailed(PermissionDenied):
    """Wrong password, in the words of PostgreSQL."""

    sqlstate = "28P01"


class CertificatesDiffer(PermissionDenied):
    """Channel binding cannot work across two TLS connections with different certificates."""

    sqlstate = "28000"


class TlsRequired(PermissionDenied):
    """Nobody is let in without TLS."""

    sqlstate = "28000"


class TooManyClients(Overloaded):
    """No more client connections are taken."""

    sqlstate = "53300"


class BackendUnreachable(Unavailable):
    """The PostgreSQL behind the gateway cannot be connected to."""

    sqlstate = "08006"


class BackendLost(BackendUnreachable):
    """PostgreSQL closed the connection of this session."""


class StartupTimeout(InvalidRequest):
    """The client did not finish logging in."""

    sqlstate = "08006"


class GatewayFailed(Unavailable):
    """A statement of the gateway's own did not end as it must."""

    sqlstate = "08006"


class IdleTimeout(InvalidRequest):
    """The session was idle for too long."""

    sqlstate = "57P05"


class AdminShutdown(Unavailable):
    """The DB node ends this session."""

    sqlstate = "57P01"
