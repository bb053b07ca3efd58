"""Who may come in at the REST face, and to which paths: the operator's key of the settings, and the keys of tenants."""

from __future__ import annotations

import hmac

from starlette.requests import Request
from starlette.types import Scope

from dbnode.errors import Unauthenticated
from dbnode.generate import Caller
from dbnode.tenants.directory import Directory
from dbnode.tenants.principal import Principal
from dbnode.tenants.quotas import Quotas
from stratakv.errors import Unavailable
from stratakv.settings import RestSettings
from stratakv.tenancy.api_key import MARK
from stratakv.tenancy.values import Permission

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no API key."""
_ANY_KEY = frozenset({"/ready", "/version", "/v1/models"})
_BEARER = "Bearer "


class Door:
    """Asked once for each request."""

    def __init__(self, settings: RestSettings, directory: Directory, quotas: Quotas) -> None:
        self._expected = None if settings.api_key is None else settings.api_key.encode()
        self._directory = directory
        self._quotas = quotas

    def headers(self, principal: Principal) -> list[tuple[bytes, bytes]]:
        """What is left of the limits of who asks; none without limits."""
        told = self._quotas.headers(principal.tenant)
        return [(name.encode(), value.encode()) for name, value in told.items()]

    def admit(self, path: str, authorization: bytes, host: str | None) -> Principal:
        """Who asks for this path. Raises Unauthenticated, PermissionDenied, Unavailable."""
        if path in OPEN_PATHS:
            return Principal(self._directory.default, frozenset())
        principal = self._known(authorization)
        principal.demand_address(host)
        if (needed := needed_permission(path)) is not None:
            principal.demand(needed)
        return principal

    def _known(self, authorization: bytes) -> Principal:
        given = authorization.decode("latin-1")
        key = given.removeprefix(_BEARER) if given.startswith(_BEARER) else ""
        if self._expected is not None and hmac.compare_digest(key.encode("latin-1"), self._expected):
            return Principal.operator(self._directory.default)
        if key.startswith(MARK):
            return self._directory.of_key(key)
        if self._expected is None and not self._directory.is_read:
            raise Unavailable("the DB node does not know its tenants yet: the metadata database does not answer")
        if self._expected is None and not self._directory.has_keys:
            return Principal.operator(self._directory.default)
        hint = None if self._expected is not None else "Tenants have keys, so the operator needs one too: rest.api_key."
        raise Unauthenticated("the API key is missing or wrong; send it as `Authorization: Bearer KEY`", hint=hint)


def needed_permission(path: str) -> Permission | None:
    """None: any key will do."""
    if path.startswith("/admin") or path == "/metrics":
        return Permission.ADMIN
    if path == "/v1/stratakv/pin":
        return Permission.PIN
    if path in _ANY_KEY or path.startswith("/v1/models/"):
        return None
    return Permission.INFER


def caller_of(request: Request) -> Caller:
    """Who the door let in, as requests of inference name them."""
    return caller_in(request.scope)


def caller_in(scope: Scope) -> Caller:
    """The same of a request that is not wrapped."""
    principal: Principal = scope["state"]["principal"]
    return Caller(principal.tenant, principal.models)
