"""Changes of tenants, keys, roles and limits, each a transaction on the metadata that is noted in its log of changes.

Used by `stratakv tenant`, `stratakv key` and `stratakv quota`; DB nodes see a change within seconds. Keeps one connection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from stratakv.errors import InvalidRequest, SetupError
from stratakv.migrate import driver_url, masked_url
from stratakv.queries import load_queries
from stratakv.tenancy.api_key import NewKey, new_key, shown_part
from stratakv.tenancy.values import DEFAULT_TENANT_NAME

CONNECT_TIMEOUT_S = 10
NAME_CHARS_MAX = 128
MODEL_CHARS_MAX = 512
LIFETIME_S_MAX = 100 * 365 * 86400.0
LIMIT_MAX = 10**12
"""Requests or tokens."""
LIMIT_BYTES_MAX = 2**60
AUDIT_ROWS_MAX = 10_000
Row = dict[str, Any]
_queries = load_queries("stratakv.tenancy")
_TENANT_COLUMNS = {"shares_cache", "weight", "permissions", "models", "networks", "is_enabled"}
_LIMIT_COLUMNS = {
    "requests_per_minute",
    "tokens_per_minute",
    "parallel_requests",
    "tokens_per_month",
    "cached_token_micros",
    "cache_memory_bytes",
    "cache_disk_bytes",
}


class NoSuchThing(InvalidRequest):
    """Nothing has this name."""

    code = "not_found"
    http_status = 404


class Administration:
    """One connection to the metadata; `actor` is whom the log of changes names."""

    def __init__(self, url: str, actor: str) -> None:
        """Raises SetupError."""
        self._actor = actor
        try:
            self._connection = psycopg.connect(driver_url(url), connect_timeout=CONNECT_TIMEOUT_S, row_factory=dict_row)
        except psycopg.Error as error:
            raise SetupError(f"cannot connect to database {masked_url(url)}: {str(error).strip()}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    # Tenants

    def tenants(self, *, deleted: bool = False) -> list[Row]:
        """All; with `deleted` also those that only their usage keeps."""
        with self._transaction() as ask:
            return ask("tenants", name=None, deleted=deleted)

    def tenant(self, name: str) -> Row:
        """Raises NoSuchThing."""
        with self._transaction() as ask:
            return _one(ask("tenants", name=name, deleted=False), f"tenant {name}")

    def create_tenant(self, name: str, changes: Mapping[str, Any]) -> Row:
        """With a salt of its own. Raises InvalidRequest."""
        _check_name(name)
        _check_models(changes.get("models"))
        with self._transaction() as ask:
            try:
                created = ask("create_tenant", name=name)
            except psycopg.errors.UniqueViolation:
                raise InvalidRequest(f"there is a tenant {name} already, or its usage is still kept") from None
            self._set("tenants", "id", created[0]["id"], changes, _TENANT_COLUMNS)
            return ask("tenants", name=name, deleted=False)[0]

    def update_tenant(self, name: str, changes: Mapping[str, Any]) -> Row:
        """Raises NoSuchThing, InvalidRequest."""
        _check_models(changes.get("models"))
        with self._transaction() as ask:
            self._set("tenants", "id", self._id_of(ask, name), changes, _TENANT_COLUMNS)
            return ask("tenants", name=name, deleted=False)[0]

    def delete_tenant(self, name: str) -> bool:
        """With its keys, roles and limits; False if it has to stay, disabled, because usage names it. Raises NoSuchThing."""
        if name == DEFAULT_TENANT_NAME:
            raise InvalidRequest("the default tenant cannot be deleted")
        with self._transaction() as ask:
            its_id = self._id_of(ask, name)
            for query in ("delete_keys", "delete_roles", "delete_limits"):
                ask(query, id=its_id)
            try:
                with self._connection.transaction():
                    ask("delete_tenant", id=its_id)
                return True
            except psycopg.errors.ForeignKeyViolation:
                ask("bury_tenant", id=its_id)
                return False

    # Keys

    def keys(self, tenant: str | None = None) -> list[Row]:
        """Without the keys themselves. Raises NoSuchThing."""
        with self._transaction() as ask:
            self._demand(ask, tenant)
            return ask("keys", tenant=tenant, prefix=None)

    def create_key(
        self,
        tenant: str,
        name: str,
        lifetime_s: float | None = None,
        permissions: Sequence[str] | None = None,
        models: Sequence[str] | None = None,
        networks: Sequence[str] | None = None,
    ) -> NewKey:
        """The only time that the key is told. Raises NoSuchThing, InvalidRequest."""
        _check_name(name)
        _check_models(models)
        if lifetime_s is not None and not 0 < lifetime_s <= LIFETIME_S_MAX:
            raise InvalidRequest("a key ends after more than 0 seconds and at most 100 years, or never")
        made = new_key()
        narrowing = {"permissions": permissions, "models": models, "networks": networks}
        with self._transaction() as ask:
            its_id = self._id_of(ask, tenant)
            known = {"tenant_id": its_id, "name": name, "prefix": made.prefix, "key_hash": made.key_hash}
            ask("create_key", **known, lifetime_s=lifetime_s, **narrowing)
        return made

    def revoke_key(self, prefix: str, after_s: float = 0.0) -> Row:
        """It is let in no longer, or not after so long. Raises NoSuchThing."""
        prefix = shown_part(prefix)
        with self._transaction() as ask:
            _one(ask("keys", tenant=None, prefix=prefix), f"key {prefix}")
            ask("revoke_key", prefix=prefix, after_s=after_s)
            return ask("keys", tenant=None, prefix=prefix)[0]

    def rotate_key(self, prefix: str, grace_s: float) -> NewKey:
        """Another key for the same, and the old one ends after `grace_s`. Raises NoSuchThing, InvalidRequest."""
        made = new_key()
        prefix = shown_part(prefix)
        if grace_s > LIFETIME_S_MAX:
            raise InvalidRequest("the old key goes on for at most 100 years")
        with self._transaction() as ask:
            found = _one(ask("keys", tenant=None, prefix=prefix), f"key {prefix}")
            if found["state"] != "valid":
                raise InvalidRequest(f"key {prefix} is {found['state']}", hint="Create a new one.")
            ask("copy_key", prefix=prefix, new_prefix=made.prefix, key_hash=made.key_hash)
            ask("revoke_key", prefix=prefix, after_s=grace_s)
        return made

    # Roles

    def roles(self, tenant: str | None = None) -> list[Row]:
        """PostgreSQL roles that log in for a tenant. Raises NoSuchThing."""
        with self._transaction() as ask:
            self._demand(ask, tenant)
            return ask("roles", tenant=tenant)

    def map_role(self, tenant: str, role: str, data_url: str) -> Row:
        """`role` of the cluster at `data_url` logs in for `tenant` from now on. Raises NoSuchThing, SetupError."""
        cluster, oid = look_up_role(data_url, role)
        with self._transaction() as ask:
            ask("map_role", cluster=cluster, role=role, oid=oid, tenant_id=self._id_of(ask, tenant))
        return {"cluster": cluster, "role": role, "oid": oid, "tenant": tenant}

    def unmap_role(self, role: str, cluster: str | None = None) -> None:
        """It logs in for the default tenant again. Raises NoSuchThing, InvalidRequest if several clusters have it."""
        with self._transaction() as ask:
            known = [
                one for one in ask("roles", tenant=None) if one["role"] == role and cluster in (None, one["cluster"])
            ]
            if len(known) > 1:
                raise InvalidRequest(f"{len(known)} clusters have a role {role}", hint="Name one with --cluster.")
            ask("unmap_role", cluster=_one(known, f"role {role}")["cluster"], role=role)

    # Limits

    def quotas(self, tenant: str | None = None) -> list[Row]:
        """Limits of all tenants or one, and what is taken of them."""
        with self._transaction() as ask:
            return ask("quotas", tenant=tenant)

    def set_limits(self, tenant: str, changes: Mapping[str, int | None]) -> Row:
        """What is not named stays as it is; None: no limit. Raises NoSuchThing, InvalidRequest."""
        for name, value in changes.items():
            most = LIMIT_BYTES_MAX if name.endswith("_bytes") else LIMIT_MAX
            if value is not None and not 0 <= value <= most:
                raise InvalidRequest(f"{name} is 0 to {most:,}, or none")
        with self._transaction() as ask:
            its_id = self._id_of(ask, tenant)
            ask("ensure_limits", id=its_id)
            self._set("tenant_limits", "tenant_id", its_id, changes, _LIMIT_COLUMNS)
            return ask("quotas", tenant=tenant)[0]

    def clear_limits(self, tenant: str) -> None:
        """Raises NoSuchThing."""
        with self._transaction() as ask:
            ask("delete_limits", id=self._id_of(ask, tenant))

    def audit(self, tenant: str | None, limit: int) -> list[Row]:
        """The last changes, newest first; of a tenant that has gone too, as long as they are kept. Raises NoSuchThing."""
        with self._transaction() as ask:
            found = ask("audit", tenant=tenant, limit=min(limit, AUDIT_ROWS_MAX))
            if not found:
                self._demand(ask, tenant)
            return found

    @contextmanager
    def _transaction(self) -> Iterator[_Ask]:
        """Gives what runs a query by its name. Raises InvalidRequest for what the schema refuses, SetupError."""
        try:
            with self._connection.transaction(), self._connection.cursor() as cursor:
                cursor.execute(_queries["set_actor"].encode(), {"actor": self._actor})
                yield _Ask(cursor)
        except (psycopg.errors.CheckViolation, psycopg.errors.DataError) as error:
            raise InvalidRequest(f"the metadata refuses it: {error.diag.message_primary or error}") from error
        except (
            psycopg.errors.UndefinedTable,
            psycopg.errors.UndefinedColumn,
            psycopg.errors.InvalidSchemaName,
        ) as error:
            raise SetupError(
                f"the database has no metadata of this release: {error.diag.message_primary}",
                hint="Name another database, or run `stratakv migrate upgrade`.",
            ) from error
        except psycopg.Error as error:
            raise SetupError(f"the database refused: {error.diag.message_primary or str(error).strip()}") from error

    @staticmethod
    def _id_of(ask: _Ask, tenant: str) -> int:
        return int(_one(ask("tenants", name=tenant, deleted=False), f"tenant {tenant}")["id"])

    def _demand(self, ask: _Ask, tenant: str | None) -> None:
        if tenant is not None:
            self._id_of(ask, tenant)

    def _set(self, table: str, key: str, value: int, changes: Mapping[str, Any], columns: set[str]) -> None:
        """Enter what was given."""
        assert changes.keys() <= columns
        if not changes:
            return
        cast = {"networks": "::text[]::inet[]"}
        parts = [
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name) + sql.SQL(cast.get(name, "")))
            for name in changes
        ]
        update = sql.SQL("UPDATE {} SET {} WHERE {} = {}").format(
            sql.Identifier("stratakv", table), sql.SQL(", ").join(parts), sql.Identifier(key), sql.Placeholder("of_key")
        )
        self._connection.execute(update, {**changes, "of_key": value})


class _Ask:
    """Runs named queries."""

    def __init__(self, cursor: psycopg.Cursor[Row]) -> None:
        self._cursor = cursor

    def __call__(self, query: str, /, **parameters: Any) -> list[Row]:
        self._cursor.execute(_queries[query].encode(), parameters)
        return self._cursor.fetchall() if self._cursor.description is not None else []


def look_up_role(url: str, role: str) -> tuple[str, int]:
    """System identifier of a cluster, and the OID of its role. Raises NoSuchThing, SetupError."""
    try:
        with psycopg.connect(driver_url(url), connect_timeout=CONNECT_TIMEOUT_S) as connection:
            found = connection.execute(_queries["look_up_role"].encode(), {"role": role}).fetchone()
    except psycopg.Error as error:
        raise SetupError(f"database {masked_url(url)}: {str(error).strip()}") from error
    if found is None:
        raise NoSuchThing(f"there is no role {role} in the cluster of {masked_url(url)}")
    return str(found[0]), int(found[1])


def _one(rows: list[Row], what: str) -> Row:
    if not rows:
        raise NoSuchThing(f"there is no {what}")
    return rows[0]


def _check_name(name: str) -> None:
    if not _is_name(name, NAME_CHARS_MAX):
        raise InvalidRequest(f"a name has 1 to {NAME_CHARS_MAX} printable characters, and no space at its ends")


def _check_models(names: Sequence[str] | None) -> None:
    for name in names or ():
        if not _is_name(name, MODEL_CHARS_MAX):
            raise InvalidRequest(f"a model's name has 1 to {MODEL_CHARS_MAX} printable characters")


def _is_name(text: str, chars_max: int) -> bool:
    return 0 < len(text) <= chars_max and text.isprintable() and text == text.strip()
