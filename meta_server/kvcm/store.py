"""Rows of the KVCM API's tables and what they mean: reads everything at the start, hands changes to the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

import asyncpg
import msgspec
import numpy as np
from numpy.typing import NDArray

from meta_server.journal import Journal, confirmed
from meta_server.kvcm.accounts import Account
from meta_server.kvcm.entities import Group, Instance, Storage
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.writes import Layout, Place, Write
from meta_server.store import Store
from stratakv.queries import load_queries

QUERIES = load_queries("meta_server.kvcm")
ACCOUNTS_TIMEOUT_S = 2.0
_PACKED = np.dtype(">i8")


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that was registered and written."""

    storages: list[Storage]
    groups: list[Group]
    instances: list[Instance]
    writes: list[Write]
    accounts: list[Account]


async def load(store: Store, now: float) -> Loaded:
    """Everything as of one moment; `now` on the process's clock."""
    async with store.pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
        storages = await connection.fetch(QUERIES["storages"])
        groups = await connection.fetch(QUERIES["groups"])
        instances = await connection.fetch(QUERIES["instances"])
        writes = await connection.fetch(QUERIES["writes"], timeout=None)
        accounts = await connection.fetch(QUERIES["accounts"])
    return Loaded(
        [Storage(admin.StorageConfig.FromString(row["config"]), row["is_enabled"]) for row in storages],
        [Group(admin.InstanceGroup.FromString(row["config"])) for row in groups],
        [Instance(meta.RegisterInstanceRequest.FromString(row["config"])) for row in instances],
        # On a thread, since it takes time for each block, and the lease must be renewed meanwhile.
        await asyncio.to_thread(lambda: [_write(dict(row), now) for row in writes]),
        [Account(*row) for row in accounts],
    )


async def read_accounts(url: str) -> list[Account]:
    """As a meta server that stands by does. Raises CONNECTION_ERRORS."""
    connection = await asyncpg.connect(url, timeout=ACCOUNTS_TIMEOUT_S)
    try:
        return [Account(*row) for row in await connection.fetch(QUERIES["accounts"], timeout=ACCOUNTS_TIMEOUT_S)]
    finally:
        connection.terminate()


def _write(row: dict[str, object], now: float) -> Write:
    raw = msgspec.convert(row, _WriteRow)
    keys: NDArray[np.int64] = np.frombuffer(raw.keys, _PACKED).astype(np.int64)
    return Write(
        session_id=raw.session_id,
        instance_id=raw.instance_id,
        group=raw.group_name,
        place=msgspec.json.decode(raw.place, type=Place),
        layouts=msgspec.json.decode(raw.layouts, type=tuple[Layout, ...]),
        layout_of=raw.layout_of,
        keys=tuple(keys.tolist()),
        status=bytearray(raw.status),
        created_s=raw.created_s,
        ends_at=now + raw.left_s,
        success=raw.success,
    )


class _WriteRow(msgspec.Struct):
    session_id: str
    instance_id: str
    group_name: str
    place: str
    layouts: str
    layout_of: bytes
    keys: bytes
    status: bytes
    success: bytes | None
    created_s: int
    left_s: float


class Changes:
    """What the state has changed, on its way to PostgreSQL in order."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def check_room(self) -> None:
        """Raises Unavailable or Overloaded if nothing should be begun now."""
        self._journal.check_room()

    async def written(self) -> None:
        """Return once everything handed in so far is written. Raises Unavailable: it may still be, later."""
        await confirmed(self._journal.all_written())

    def when_written(self) -> asyncio.Future[None]:
        """Done once everything handed in so far is written, however long that takes."""
        return self._journal.all_written()

    def set_storage(self, storage: Storage) -> None:
        self._journal.execute(QUERIES["set_storage"], storage.name, storage.config.SerializeToString(), storage.enabled)

    def remove_storage(self, name: str) -> None:
        self._journal.execute(QUERIES["remove_storage"], name)

    def set_group(self, group: Group) -> None:
        self._journal.execute(QUERIES["set_group"], group.name, group.config.SerializeToString())

    def remove_group(self, name: str) -> None:
        self._journal.execute(QUERIES["remove_group"], name)

    def set_instance(self, instance: Instance) -> None:
        self._journal.execute(QUERIES["set_instance"], instance.id, instance.config.SerializeToString())

    def remove_instance(self, instance_id: str) -> None:
        self._journal.execute(QUERIES["remove_instance"], instance_id)

    def add_account(self, account: Account) -> None:
        self._journal.execute(QUERIES["add_account"], account.name, account.role, account.password_hash)

    def remove_account(self, name: str) -> None:
        self._journal.execute(QUERIES["remove_account"], name)

    def add_write(self, write: Write, left_s: float) -> None:
        self._journal.execute(
            QUERIES["add_write"],
            write.session_id,
            write.instance_id,
            write.group,
            msgspec.json.encode(write.place).decode(),
            msgspec.json.encode(write.layouts).decode(),
            write.layout_of,
            np.array(write.keys, _PACKED).tobytes(),
            bytes(write.status),
            write.created_s,
            left_s,
        )

    def end_write(self, write: Write, status: bytes, kept_s: float) -> None:
        self._journal.execute(QUERIES["end_write"], write.session_id, status, write.success, kept_s)

    def set_status(self, writes: Collection[Write]) -> None:
        ids, statuses = [w.session_id for w in writes], [bytes(w.status) for w in writes]
        self._journal.execute(QUERIES["set_status"], ids, statuses)

    def remove_writes(self, writes: Collection[Write]) -> None:
        self._journal.execute(QUERIES["remove_writes"], [w.session_id for w in writes])
