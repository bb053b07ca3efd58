"""Messages of `stratakv.wire` about what each owner of pages (a tenant) may have in the pool, and has. Import them from there."""

from __future__ import annotations

import msgspec

from stratakv.wire_parts import Message


class OwnerLimit(msgspec.Struct, frozen=True, array_like=True):
    """How many bytes of the pool an owner may have; None is no limit."""

    owner: int
    name: str
    """As people know it."""
    memory_bytes_max: int | None = None
    """In the memory of all daemons of a shard together."""
    disk_bytes_max: int | None = None


class OwnerState(msgspec.Struct, frozen=True, array_like=True):
    """What an owner has, and may have."""

    limit: OwnerLimit
    memory_bytes: int
    disk_bytes: int


class SetOwnerLimits(Message, frozen=True):
    """Takes the place of all limits before. In the meta server's memory only: whoever knows them says so again and again."""

    limits: list[OwnerLimit]


class ListOwners(Message, frozen=True):
    """Owners with pages or limits."""


class OwnerStates(Message, frozen=True):
    owners: list[OwnerState]
    """Of several shards: one for each of them."""
