"""What is known of tenants: plain values, as the metadata has them."""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

DEFAULT_TENANT_NAME = "default"
"""Everybody who is nobody else's; it cannot be deleted."""
TOKEN_MICROS = 1_000_000
"""Tokens and requests are counted in millionths."""

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Permission(enum.StrEnum):
    """What a tenant or a key may do."""

    INFER = "infer"
    """Ask the model."""
    PIN = "pin"
    """Keep prompts in the pool."""
    ADMIN = "admin"
    """See what the DB node does for all, and order it to."""


class LimitKind(enum.StrEnum):
    """What is limited."""

    REQUESTS_MINUTE = "requests_minute"
    TOKENS_MINUTE = "tokens_minute"
    PARALLEL = "parallel"
    TOKENS_MONTH = "tokens_month"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one tenant; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None
    tokens_per_month: int | None = None
    cached_token_micros: int = TOKEN_MICROS
    """What a prompt token counts whose KV was cached."""
    cache_memory_bytes: int | None = None
    cache_disk_bytes: int | None = None
    """Noted, not enforced: the pool cannot tell tenants apart."""

    def of(self, kind: LimitKind) -> int | None:
        """In requests or tokens."""
        match kind:
            case LimitKind.REQUESTS_MINUTE:
                return self.requests_per_minute
            case LimitKind.TOKENS_MINUTE:
                return self.tokens_per_minute
            case LimitKind.PARALLEL:
                return self.parallel_requests
            case LimitKind.TOKENS_MONTH:
                return self.tokens_per_month

    @property
    def is_limited(self) -> bool:
        """Whether requests must be counted."""
        return not (
            self.requests_per_minute is None
            and self.tokens_per_minute is None
            and self.parallel_requests is None
            and self.tokens_per_month is None
        )


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who is served."""

    id: int
    name: str
    salt: str = field(default="", repr=False)
    """Scopes its KV and all else that is kept by content; empty: it shares with all whose is empty."""
    weight: int = 100
    """Its share of the workers while others wait too."""
    permissions: frozenset[Permission] = frozenset({Permission.INFER})
    models: frozenset[str] | None = None
    """None: all."""
    networks: tuple[Network, ...] | None = None
    """Of REST clients; None: any."""
    limits: Limits = Limits()
    is_enabled: bool = True


OWNER_HEADER = "X-StrataKV-Owner"
"""Of a DB node's request to a worker: the id of the tenant whose the blocks are that it fills."""
DEFAULT_TENANT = Tenant(1, DEFAULT_TENANT_NAME)
"""While nothing else is known of it."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key of a tenant, without the key."""

    tenant_id: int
    name: str
    prefix: str
    key_hash: bytes = field(repr=False)
    permissions: frozenset[Permission] | None = None
    """None: the tenant's; else what both have. So with models and networks."""
    models: frozenset[str] | None = None
    networks: tuple[Network, ...] | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RoleMapping:
    """A PostgreSQL role that logs in for a tenant."""

    cluster: str
    """System identifier, in digits."""
    role_name: str
    role_oid: int
    tenant_id: int
