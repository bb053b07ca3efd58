"""All storages, groups and instances as one JSON text, and back: GenConfigSnapshot and LoadConfigSnapshot of AdminService.

Accounts are not a part of it, nor is anything that was written. Loading adds what is missing, all of it or nothing; what is
there with other data is an error.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from google.protobuf.message import Message

from meta_server.kvcm.entities import (
    GROUPS_MAX,
    INSTANCES_MAX,
    STORAGES_MAX,
    Group,
    Instance,
    Storage,
    check_candidates,
    check_group,
    check_instance,
    check_storage,
)
from meta_server.kvcm.errors import CapacityReached, Duplicate
from meta_server.kvcm.json_form import parse, render
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.state import KvcmState
from stratakv.errors import InvalidRequest

MessageT = TypeVar("MessageT", bound=Message)


class _StorageEntry(msgspec.Struct):
    storage: msgspec.Raw
    is_enabled: bool = True


class _Snapshot(msgspec.Struct):
    """Messages in their JSON form."""

    storages: list[_StorageEntry] = []
    instance_groups: list[msgspec.Raw] = []
    instances: list[msgspec.Raw] = []


def taken(state: KvcmState) -> str:
    """What is registered now."""
    snapshot = _Snapshot(
        [_StorageEntry(msgspec.Raw(render(one.config)), one.enabled) for one in state.storages.values()],
        [msgspec.Raw(render(one.config)) for one in state.groups.values()],
        [msgspec.Raw(render(one.config)) for one in state.instances.values()],
    )
    return msgspec.json.encode(snapshot).decode()


def load(state: KvcmState, text: str) -> None:
    """Add what is missing. Everything is checked before anything changes. Raises KvcmError, InvalidRequest."""
    try:
        snapshot = msgspec.json.decode(text, type=_Snapshot)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the snapshot is not valid: {error}", param="config_snapshot") from None
    storages = [Storage(_read(one.storage, admin.StorageConfig), one.is_enabled) for one in snapshot.storages]
    groups = [Group(_read(raw, admin.InstanceGroup)) for raw in snapshot.instance_groups]
    instances = [Instance(_read(raw, meta.RegisterInstanceRequest)) for raw in snapshot.instances]
    for storage in storages:
        check_storage(storage.config)
    for group in groups:
        check_group(group.config)
        check_candidates(group.config, {*state.storages, *(one.name for one in storages)})
    names = {*state.groups, *(one.name for one in groups)}
    for instance in instances:
        check_instance(instance.config)
        if instance.group not in names:
            raise InvalidRequest(f"there is no instance group {instance.group!r}", param="instance_group")
    new_storages = _missing("storage", state.storages, {one.name: one for one in storages})
    new_groups = _missing("group", state.groups, {one.name: one for one in groups})
    new_instances = _missing("instance", state.instances, {one.id: one for one in instances})
    for kind, known, new, most in (
        ("storages", state.storages, new_storages, STORAGES_MAX),
        ("instance groups", state.groups, new_groups, GROUPS_MAX),
        ("instances", state.instances, new_instances, INSTANCES_MAX),
    ):
        if len(known) + len(new) > most:
            raise CapacityReached(f"there would be {len(known) + len(new)} {kind}; {most} is the limit")
    for storage in new_storages.values():
        state.storages[storage.name] = storage
        state.changes.set_storage(storage)
    for group in new_groups.values():
        state.groups[group.name] = group
        state.changes.set_group(group)
    for instance in new_instances.values():
        state.instances[instance.id] = instance
        state.changes.set_instance(instance)


def _read(raw: msgspec.Raw, message_type: type[MessageT]) -> MessageT:
    return parse(bytes(raw), message_type)


def _missing(kind: str, known: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Those that are not there. Raises Duplicate."""
    for name, one in wanted.items():
        if name in known and _same(known[name].config) != _same(one.config):
            raise Duplicate(f"{kind} {name} is there already, with other data")
    return {name: one for name, one in wanted.items() if name not in known}


def _same(config: Any) -> bytes:
    """What must be equal: a group's version counts its changes and says nothing of it."""
    plain = type(config)()
    plain.CopyFrom(config)
    if isinstance(plain, admin.InstanceGroup):
        plain.version = 0
    return bytes(plain.SerializeToString(deterministic=True))
