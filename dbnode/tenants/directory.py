"""Tenants, keys and roles as the metadata has them: read at the start, then whenever they have changed.

Asked by the faces for every request, without I/O. Keeps the last state that was read, and goes on with it while the database is
away. Without a database there is the tenant `default` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from dbnode.errors import Unauthenticated
from dbnode.own_connection import AWAY
from dbnode.tenants.principal import Principal
from stratakv.errors import PermissionDenied, SetupError, Unavailable
from stratakv.log import EventLogger
from stratakv.queries import load_queries
from stratakv.settings import DatabaseSettings
from stratakv.tenancy.api_key import KEY_CHARS_MAX, MARK, hash_of
from stratakv.tenancy.values import (
    DEFAULT_TENANT,
    DEFAULT_TENANT_NAME,
    TOKEN_MICROS,
    ApiKey,
    Limits,
    Network,
    Permission,
    RoleMapping,
    Tenant,
)

log = EventLogger("dbnode.tenants")

CHANNEL = "stratakv_tenancy"
POLL_S = 5.0
"""A notification that is lost costs so long."""
RETRY_S = 2.0
QUERY_TIMEOUT_S = 10.0
ROWS_MAX = 20_000
"""Tenants, keys and roles, each; more are not read, and what was read before stays."""

_queries = load_queries("dbnode.tenants")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was read at one time."""

    version: int = -1
    tenants: Mapping[int, Tenant] = field(default_factory=lambda: {DEFAULT_TENANT.id: DEFAULT_TENANT})
    keys: Mapping[bytes, ApiKey] = field(default_factory=dict)
    roles: Mapping[tuple[str, str], RoleMapping] = field(default_factory=dict)
    role_names: frozenset[str] = frozenset()
    """Of any cluster."""
    database_now: datetime | None = None
    read_at_s: float = 0.0


class Directory:
    """Answers who somebody is. `run` keeps it up to date."""

    def __init__(self, settings: DatabaseSettings | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings or DatabaseSettings()
        self._clock = clock
        self._snapshot = Snapshot()
        self._by_name = {DEFAULT_TENANT_NAME: DEFAULT_TENANT}

    @property
    def is_read(self) -> bool:
        """Whether it is known who there is; until then nobody is taken for anybody."""
        return self._settings.url is None or self._snapshot.version >= 0

    @property
    def has_keys(self) -> bool:
        """Whether tenants have keys: then nobody is let in without one."""
        return bool(self._snapshot.keys)

    @property
    def default(self) -> Tenant:
        """Whose all are who are nobody else's."""
        return self._by_name.get(DEFAULT_TENANT_NAME, DEFAULT_TENANT)

    def tenants(self) -> list[Tenant]:
        return list(self._by_name.values())

    def tenant(self, tenant_id: int) -> Tenant | None:
        return self._snapshot.tenants.get(tenant_id)

    def of_key(self, key: str) -> Principal:
        """Raises Unauthenticated, Unavailable, PermissionDenied."""
        self._demand_read()
        found = self._snapshot.keys.get(hash_of(key)) if key.startswith(MARK) and len(key) <= KEY_CHARS_MAX else None
        if found is None or self._has_ended(found):
            raise Unauthenticated("the API key is not known, has expired or was revoked")
        tenant = self._snapshot.tenants.get(found.tenant_id)
        if tenant is None or not tenant.is_enabled:
            raise PermissionDenied("the tenant of this key is disabled")
        return Principal.of_key(tenant, found)

    def of_role(self, role: str, oid: int | None, cluster: str) -> Tenant:
        """Whose a session is that has logged in as a role. Raises PermissionDenied, Unavailable.

        A mapping says nothing of another role that has come to the name. Without an OID or a cluster it cannot be told.
        """
        self._demand_read()
        snapshot = self._snapshot
        if oid is None or not cluster:
            if role in snapshot.role_names:
                raise PermissionDenied(
                    f"the database does not say which role {role} is, which logs in for a tenant",
                    hint="Run `stratakv install` again, with this release.",
                )
            return self._enabled(self.default)
        mapping = snapshot.roles.get((cluster, role))
        if mapping is None or mapping.role_oid != oid:
            return self._enabled(self.default)
        return self._enabled(snapshot.tenants.get(mapping.tenant_id))

    @staticmethod
    def _enabled(tenant: Tenant | None) -> Tenant:
        if tenant is None or not tenant.is_enabled:
            raise PermissionDenied(f"the tenant {tenant.name if tenant else 'of this role'} is disabled")
        if Permission.INFER not in tenant.permissions:
            raise PermissionDenied(f"the tenant {tenant.name} has no permission to infer")
        return tenant

    def _demand_read(self) -> None:
        if not self.is_read:
            raise Unavailable("the DB node does not know its tenants yet: the metadata database does not answer")

    def _has_ended(self, key: ApiKey) -> bool:
        now = self._snapshot.database_now
        if key.expires_at is None or now is None:
            return False
        return key.expires_at <= now + timedelta(seconds=self._clock() - self._snapshot.read_at_s)

    # Reading

    async def load(self) -> None:
        """Read once, at the start. Raises SetupError."""
        if self._settings.url is None:
            return
        try:
            connection = await asyncpg.connect(self._settings.url, timeout=self._settings.connect_timeout_s)
            try:
                await self._refresh(connection)
            finally:
                await connection.close(timeout=QUERY_TIMEOUT_S)
        except AWAY as error:
            raise SetupError(f"the tenants cannot be read from the metadata database: {error}") from error

    async def run(self) -> None:
        """Follow changes until cancelled."""
        if self._settings.url is None:
            return
        is_warned = False
        while True:
            try:
                connection = await asyncpg.connect(self._settings.url, timeout=self._settings.connect_timeout_s)
                try:
                    is_warned = False
                    await self._follow(connection)
                finally:
                    with contextlib.suppress(*AWAY):
                        connection.terminate()
            except AWAY as error:
                if not is_warned:
                    log.warning("tenants_not_read", error=type(error).__name__, version=self._snapshot.version)
                is_warned = True
                await asyncio.sleep(RETRY_S)

    async def _follow(self, connection: asyncpg.Connection) -> None:
        changed = asyncio.Event()
        await connection.add_listener(CHANNEL, lambda *_: changed.set())
        while True:
            changed.clear()
            await self._refresh(connection)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await changed.wait()

    async def _refresh(self, connection: asyncpg.Connection) -> None:
        version, _ = await connection.fetchrow(_queries["tenancy_version"], timeout=QUERY_TIMEOUT_S)
        if version == self._snapshot.version:
            return
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            version, now = await connection.fetchrow(_queries["tenancy_version"], timeout=QUERY_TIMEOUT_S)
            rows = {
                name: await connection.fetch(_queries[name], ROWS_MAX + 1, timeout=QUERY_TIMEOUT_S)
                for name in ("tenants", "api_keys", "tenant_roles")
            }
        if too_many := [name for name, found in rows.items() if len(found) > ROWS_MAX]:
            log.error("too_many_tenants", of=", ".join(too_many), rows_max=ROWS_MAX)
            return
        tenants = [_tenant(row) for row in rows["tenants"]]
        keys = [_key(row) for row in rows["api_keys"]]
        roles = [RoleMapping(*row) for row in rows["tenant_roles"]]
        self._snapshot = Snapshot(
            version,
            {tenant.id: tenant for tenant in tenants},
            {key.key_hash: key for key in keys},
            {(role.cluster, role.role_name): role for role in roles},
            frozenset(role.role_name for role in roles),
            now,
            self._clock(),
        )
        self._by_name = {tenant.name: tenant for tenant in tenants}
        log.info("tenants_read", version=version, tenants=len(tenants), keys=len(keys), roles=len(roles))


def _tenant(row: Mapping[str, Any]) -> Tenant:
    return Tenant(
        id=row["id"],
        name=row["name"],
        salt="" if row["shares_cache"] else row["salt"],
        weight=row["weight"],
        permissions=frozenset(map(Permission, row["permissions"])),
        models=_set(row["models"]),
        networks=_networks(row["networks"]),
        limits=Limits(
            row["requests_per_minute"],
            row["tokens_per_minute"],
            row["parallel_requests"],
            row["tokens_per_month"],
            TOKEN_MICROS if row["cached_token_micros"] is None else row["cached_token_micros"],
            row["cache_memory_bytes"],
            row["cache_disk_bytes"],
        ),
        is_enabled=row["is_enabled"],
    )


def _key(row: Mapping[str, Any]) -> ApiKey:
    return ApiKey(
        tenant_id=row["tenant_id"],
        name=row["name"],
        prefix=row["prefix"],
        key_hash=row["key_hash"],
        permissions=None if row["permissions"] is None else frozenset(map(Permission, row["permissions"])),
        models=_set(row["models"]),
        networks=_networks(row["networks"]),
        expires_at=row["expires_at"],
    )


def _set(values: list[str] | None) -> frozenset[str] | None:
    return None if values is None else frozenset(values)


def _networks(values: list[str] | None) -> tuple[Network, ...] | None:
    return None if values is None else tuple(ipaddress.ip_network(value, strict=False) for value in values)
