"""Who somebody is who has shown a key, or has logged in as a role, and what they may do. Plain values."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from stratakv.errors import PermissionDenied
from stratakv.tenancy.values import ApiKey, Network, Permission, Tenant

_EVERYTHING = frozenset(Permission)


@dataclass(frozen=True, slots=True)
class Principal:
    """A tenant by one of its keys."""

    tenant: Tenant
    permissions: frozenset[Permission]
    models: frozenset[str] | None = None
    """None: all."""
    networks: tuple[tuple[Network, ...], ...] = ()
    """An address must be in one of each."""

    @classmethod
    def operator(cls, tenant: Tenant) -> Principal:
        """Who has the key of the settings, or comes where none is needed."""
        return cls(tenant, _EVERYTHING)

    @classmethod
    def of_key(cls, tenant: Tenant, key: ApiKey) -> Principal:
        """What tenant and key both allow."""
        return cls(
            tenant,
            tenant.permissions if key.permissions is None else tenant.permissions & key.permissions,
            both(tenant.models, key.models),
            tuple(networks for networks in (tenant.networks, key.networks) if networks is not None),
        )

    def demand(self, permission: Permission) -> None:
        """Raises PermissionDenied."""
        if permission not in self.permissions:
            raise PermissionDenied(f"this key has no permission to {_WORDS[permission]}")

    def demand_address(self, host: str | None) -> None:
        """Raises PermissionDenied unless clients at this address are let in."""
        if not self.networks:
            return
        try:
            address = ipaddress.ip_address(host or "")
        except ValueError:
            raise PermissionDenied("this key is for certain networks, and the client's address is not known") from None
        mapped = getattr(address, "ipv4_mapped", None)
        if not all(any((mapped or address) in network for network in networks) for networks in self.networks):
            raise PermissionDenied("this key may not be used from the client's address")


_WORDS = {Permission.INFER: "infer", Permission.PIN: "pin prompts", Permission.ADMIN: "administer the DB node"}


def both(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    """What two restrictions let through, where None lets all."""
    if one is None or other is None:
        return one if other is None else other
    return one & other
