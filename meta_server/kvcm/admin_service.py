"""AdminService: storages, instance groups, instances, metrics. One method per call; each answers without its header."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from meta_server.call_times import CallSummary
from meta_server.kvcm import snapshots
from meta_server.kvcm.accounts import Account, Accounts
from meta_server.kvcm.doorman import Doorman
from meta_server.kvcm.entities import (
    GROUPS_MAX,
    STORAGES_MAX,
    Group,
    Storage,
    check_candidates,
    check_group,
    check_storage,
)
from meta_server.kvcm.errors import Duplicate, NoSuchInstance
from meta_server.kvcm.meta_service import MetaService
from meta_server.kvcm.metrics import Metrics
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.state import KvcmState
from stratakv.errors import InvalidRequest, Overloaded

MessageT = TypeVar("MessageT", bound=Message)


class AdminService:
    """The calls, on the same state as MetaService."""

    def __init__(
        self,
        state: KvcmState,
        meta_service: MetaService,
        metrics: Metrics,
        forget_reports: Callable[[str], None],
        accounts: Accounts,
        doorman: Doorman,
    ) -> None:
        """`forget_reports` is called with the id of an instance that was removed."""
        self._state = state
        self._forget_reports = forget_reports
        self._meta = meta_service
        self._metrics = metrics
        self._accounts = accounts
        self._doorman = doorman

    async def add_storage(self, request: admin.AddStorageRequest) -> admin.CommonResponse:
        """Adding the same storage again does nothing."""
        check_storage(request.storage)
        known = self._state.storages.get(request.storage.global_unique_name)
        if known is not None and known.config != request.storage:
            raise Duplicate(f"storage {known.name} is there already, with other data")
        if known is None:
            if len(self._state.storages) >= STORAGES_MAX:
                raise Overloaded(f"there are {STORAGES_MAX} storages, which is the limit")
            storage = Storage(_copy(request.storage))
            await self._open(storage)
            self._state.storages[storage.name] = storage
            self._state.changes.set_storage(storage)
        return await self._done()

    async def enable_storage(self, request: admin.EnableStorageRequest) -> admin.CommonResponse:
        return await self._set_enabled(request.storage_unique_name, True)

    async def disable_storage(self, request: admin.DisableStorageRequest) -> admin.CommonResponse:
        """It takes no new blocks; those that it has stay."""
        return await self._set_enabled(request.storage_unique_name, False)

    async def remove_storage(self, request: admin.RemoveStorageRequest) -> admin.CommonResponse:
        """With all its blocks and their files."""
        storage = self._storage(request.storage_unique_name)
        for group in self._state.groups.values():
            if storage.name in group.config.storage_candidates:
                raise InvalidRequest(f"group {group.name} has storage {storage.name} among its candidates")
        self._state.changes.check_room()
        await self._state.to_the_end(self._state.remove_storage(storage.name))
        return await self._done()

    async def update_storage(self, request: admin.UpdateStorageRequest) -> admin.CommonResponse:
        """For blocks written from now on; those that are there stay where they are."""
        check_storage(request.storage)
        storage = self._storage(request.storage.global_unique_name)
        changed = Storage(_copy(request.storage), storage.enabled)
        if not request.force_update:
            await self._open(changed)
        self._state.changes.check_room()
        self._state.storages[changed.name] = changed
        self._state.changes.set_storage(changed)
        return await self._done()

    async def list_storage(self, _: admin.ListStorageRequest) -> admin.ListStorageResponse:
        return admin.ListStorageResponse(storage=[storage.config for storage in self._state.storages.values()])

    async def create_instance_group(self, request: admin.CreateInstanceGroupRequest) -> admin.CommonResponse:
        config = _copy(request.instance_group)
        self._check_group(config)
        config.version = 1
        known = self._state.groups.get(config.name)
        if known is not None:
            raise Duplicate(f"group {known.name} is there already")
        if len(self._state.groups) >= GROUPS_MAX:
            raise Overloaded(f"there are {GROUPS_MAX} instance groups, which is the limit")
        self._state.changes.check_room()
        self._state.groups[config.name] = group = Group(config)
        self._state.changes.set_group(group)
        return await self._done()

    async def update_instance_group(self, request: admin.UpdateInstanceGroupRequest) -> admin.CommonResponse:
        config = _copy(request.instance_group)
        self._check_group(config)
        group = self._state.group(config.name)
        if request.current_version != group.config.version:
            raise InvalidRequest(
                f"group {group.name} is at version {group.config.version}, not {request.current_version}",
                param="current_version",
            )
        self._state.changes.check_room()
        config.version = group.config.version + 1
        group.config = config
        group.ranking.set_policy(group.policy)
        self._state.changes.set_group(group)
        return await self._done()

    async def remove_instance_group(self, request: admin.RemoveInstanceGroupRequest) -> admin.CommonResponse:
        group = self._state.group(request.name)
        if any(instance.group == group.name for instance in self._state.instances.values()):
            raise InvalidRequest(f"group {group.name} has instances; remove them first", param="name")
        self._state.changes.check_room()
        del self._state.groups[group.name]
        self._state.changes.remove_group(group.name)
        return await self._done()

    async def get_instance_group(self, request: admin.GetInstanceGroupRequest) -> admin.GetInstanceGroupResponse:
        return admin.GetInstanceGroupResponse(instance_group=self._state.group(request.name).config)

    async def get_cache_meta(self, request: admin.GetCacheMetaRequest) -> admin.GetCacheMetaResponse:
        answer = await self._meta.get_cache_meta(_as(request, meta.GetCacheMetaRequest))
        return _as(answer, admin.GetCacheMetaResponse)

    async def remove_cache(self, request: admin.RemoveCacheRequest) -> admin.CommonResponse:
        await self._meta.remove_cache(_as(request, meta.RemoveCacheRequest))
        return admin.CommonResponse()

    async def register_instance(self, request: admin.RegisterInstanceRequest) -> admin.CommonResponse:
        await self._meta.register_instance(_as(request, meta.RegisterInstanceRequest))
        return admin.CommonResponse()

    async def remove_instance(self, request: admin.RemoveInstanceRequest) -> admin.CommonResponse:
        instance = self._state.instance(request.instance_id)
        if request.instance_group and request.instance_group != instance.group:
            raise NoSuchInstance(f"instance {instance.id} is not in group {request.instance_group!r}")
        self._state.changes.check_room()
        await self._state.to_the_end(self._state.remove_instance(instance))
        self._forget_reports(instance.id)
        return await self._done()

    async def get_instance_info(self, request: admin.GetInstanceInfoRequest) -> admin.GetInstanceInfoResponse:
        answer = await self._meta.get_instance_info(_as(request, meta.GetInstanceInfoRequest))
        return admin.GetInstanceInfoResponse(instance_info=_as(answer.instance_info, admin.InstanceInfo))

    async def list_instance_info(self, request: admin.ListInstanceInfoRequest) -> admin.ListInstanceInfoResponse:
        """Of one group, or of all; none of a group that does not exist."""
        wanted = request.instance_group_name
        infos = [i.info() for i in self._state.instances.values() if wanted in ("", i.group)]
        return admin.ListInstanceInfoResponse(instance_info=[_as(info, admin.InstanceInfo) for info in infos])

    async def add_account(self, request: admin.AddAccountRequest) -> admin.CommonResponse:
        """Adding the same account again does nothing."""
        name, password, role = request.user_name, request.password, request.role
        self._accounts.check_new(name, password, role)
        self._state.changes.check_room()
        known = self._accounts.get(name)
        if known is None or known.role != role or not await self._doorman.is_right(password, known):
            account = Account(name, role, await self._doorman.hash(password))
            self._accounts.add(account)
            self._state.changes.add_account(account)
        return await self._done()

    async def delete_account(self, request: admin.DeleteAccountRequest) -> admin.CommonResponse:
        self._state.changes.check_room()
        self._accounts.remove(request.user_name)
        self._state.changes.remove_account(request.user_name)
        return await self._done()

    async def list_account(self, _: admin.ListAccountRequest) -> admin.ListAccountResponse:
        """Names and roles."""
        accounts = [
            admin.Account(user_name=account.name, role=account.role)  # type: ignore[arg-type]
            for account in self._accounts.all()
        ]
        return admin.ListAccountResponse(accounts=accounts)

    async def gen_config_snapshot(self, _: admin.GenConfigSnapshotRequest) -> admin.ConfigSnapShotResponse:
        """Storages, groups and instances."""
        return admin.ConfigSnapShotResponse(config_snapshot=snapshots.taken(self._state))

    async def load_config_snapshot(self, request: admin.LoadConfigSnapshotRequest) -> admin.CommonResponse:
        """Add what is missing of it; loading the same again does nothing."""
        self._state.changes.check_room()
        snapshots.load(self._state, request.config_snapshot)
        return await self._done()

    async def get_metrics(self, _: admin.GetMetricsRequest) -> admin.GetMetricsResponse:
        metrics = []
        for prefix, label, times in (
            ("service.query", "api_name", self._metrics.calls),
            ("native.call", "call", self._metrics.native),
        ):
            for call in times.summaries():
                metrics += _call_metrics(prefix, label, call)
        for group in self._state.groups.values():
            tags = [admin.MetricsTag(tag_key="instance_group", tag_value=group.name)]
            metrics.append(_metric("group.used_bytes", admin.MetricValue(int_value=group.used(None)), tags))
            metrics.append(_metric("group.key_count", admin.MetricValue(int_value=group.num_keys), tags))
        return admin.GetMetricsResponse(timestamp=int(time.time()), metrics=metrics)

    async def _set_enabled(self, name: str, enabled: bool) -> admin.CommonResponse:
        storage = self._storage(name)
        self._state.changes.check_room()
        storage.enabled = enabled
        self._state.changes.set_storage(storage)
        return await self._done()

    async def _open(self, storage: Storage) -> None:
        self._state.changes.check_room()
        if storage.config.check_storage_available_when_open:
            await self._state.files.check(storage.place)

    async def _done(self) -> admin.CommonResponse:
        await self._state.changes.written()
        return admin.CommonResponse()

    def _storage(self, name: str) -> Storage:
        if (storage := self._state.storages.get(name)) is None:
            raise InvalidRequest(f"there is no storage {name!r}", param="storage_unique_name")
        return storage

    def _check_group(self, config: admin.InstanceGroup) -> None:
        check_group(config)
        check_candidates(config, self._state.storages)


def _call_metrics(prefix: str, label: str, call: CallSummary) -> list[admin.MetricsData]:
    tags = [admin.MetricsTag(tag_key=label, tag_value=call.name)]
    times = {"rt_us": call.mean_s, "rt_p50_us": call.p50_s, "rt_p99_us": call.p99_s}
    counter = _metric(f"{prefix}_counter", admin.MetricValue(int_value=call.count), tags)
    values = [_metric(f"{prefix}_{n}", admin.MetricValue(float_value=v * 1e6), tags) for n, v in times.items()]
    return [counter, *values]


def _metric(name: str, value: admin.MetricValue, tags: list[admin.MetricsTag]) -> admin.MetricsData:
    return admin.MetricsData(metric_name=name, metric_value=value, metric_tags=tags)


def _as(message: Message, message_type: type[MessageT]) -> MessageT:
    """The same message of the other service: their fields have the same numbers."""
    return message_type.FromString(message.SerializeToString())


def _copy(message: MessageT) -> MessageT:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied
