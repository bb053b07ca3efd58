"""MetaService: what engines and their connectors ask. One method per call; each answers without its header."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from meta_server.kvcm.entities import (
    INSTANCES_MAX,
    Instance,
    Storage,
    check_instance,
    storage_configs,
)
from meta_server.kvcm.errors import CapacityReached, Duplicate, NoSuchInstance, NotSupported, StorageFailed
from meta_server.kvcm.masks import pack, unpack, visible
from meta_server.kvcm.matching import match
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.report_events import report
from meta_server.kvcm.reported import Reports
from meta_server.kvcm.state import NOTHING_TO_WRITE, KvcmState
from meta_server.kvcm.writes import Location, Place, State
from meta_server.own_blocks import OwnBlock, OwnBlocks
from meta_server.validate import KEYS_MAX
from stratakv.errors import InvalidRequest, Unavailable
from stratakv.keys import block_keys

WRITE_TIMEOUT_S = 60
"""Of a session that names none."""
WRITE_TIMEOUT_S_MAX = 3600
OWN_SPEC = "page"
_STRATEGIES = {
    admin.CPS_ALWAYS_3FS: (admin.ST_3FS, True),
    admin.CPS_PREFER_3FS: (admin.ST_3FS, False),
    admin.CPS_ALWAYS_MOONCAKE: (admin.ST_MOONCAKE, True),
    admin.CPS_PREFER_MOONCAKE: (admin.ST_MOONCAKE, False),
    admin.CPS_ALWAYS_TAIR_MEMPOOL: (admin.ST_TAIRMEMPOOL, True),
    admin.CPS_PREFER_TAIR_MEMPOOL: (admin.ST_TAIRMEMPOOL, False),
    admin.CPS_ALWAYS_VCNS_3FS: (admin.ST_VCNS_3FS, True),
    admin.CPS_PREFER_VCNS_3FS: (admin.ST_VCNS_3FS, False),
}
"""Strategy → storage type, and whether no other will do."""


class MetaService:
    """The calls, on the state and on the pool's own blocks."""

    def __init__(self, state: KvcmState, own_blocks: OwnBlocks, reports: Reports) -> None:
        self._state = state
        self._own = own_blocks
        self._reports = reports

    async def register_instance(self, request: meta.RegisterInstanceRequest) -> meta.RegisterInstanceResponse:
        check_instance(request)
        config = meta.RegisterInstanceRequest()
        config.CopyFrom(request)
        config.ClearField("trace_id")
        if self._own.namespace_of(config.instance_id) is not None:
            raise Duplicate(f"instance {config.instance_id} is one of the pool's own")
        group = self._state.group(config.instance_group)
        known = self._state.instances.get(config.instance_id)
        if known is not None and known.config != config:
            raise Duplicate(f"instance {config.instance_id} is registered with other data")
        if known is None:
            self._state.changes.check_room()
            members = sum(instance.group == group.name for instance in self._state.instances.values())
            if members >= (group.config.max_instance_count or INSTANCES_MAX):
                raise CapacityReached(f"group {group.name} has {members} instances, which is its limit")
            self._state.instances[config.instance_id] = instance = Instance(config)
            self._state.changes.set_instance(instance)
        await self._state.changes.written()
        candidates = [self._state.storages.get(name) for name in group.config.storage_candidates]
        return meta.RegisterInstanceResponse(storage_configs=storage_configs([s for s in candidates if s is not None]))

    async def get_instance_info(self, request: meta.GetInstanceInfoRequest) -> meta.GetInstanceInfoResponse:
        namespace = self._own.namespace_of(request.instance_id)
        if namespace is not None:
            info = self._own_info(namespace, request.instance_id)
        else:
            info = self._state.instance(request.instance_id).info()
        return meta.GetInstanceInfoResponse(instance_group=info.instance_group_name, instance_info=info)

    async def get_cache_location(self, request: meta.GetCacheLocationRequest) -> meta.GetCacheLocationResponse:
        found, as_message = self._matched(request)
        return meta.GetCacheLocationResponse(locations=[as_message(one) for one in found])

    async def get_cache_location_len(
        self, request: meta.GetCacheLocationLenRequest
    ) -> meta.GetCacheLocationLenResponse:
        """The number of hits that GetCacheLocation would tell of."""
        asked = meta.GetCacheLocationRequest(
            instance_id=request.instance_id,
            query_type=request.query_type,
            block_keys=request.block_keys,
            token_ids=request.token_ids,
            sw_size=request.sw_size,
        )
        found, _ = self._matched(asked)
        return meta.GetCacheLocationLenResponse(cache_location_len=sum(one is not None for one in found))

    def _matched(
        self, request: meta.GetCacheLocationRequest
    ) -> tuple[Sequence[object], Callable[[Any], meta.CacheLocation]]:
        """What is found, None where nothing is to be told; and how it is told."""
        names = frozenset(request.location_spec_names)
        if (namespace := self._own.namespace_of(request.instance_id)) is not None:
            if names - {OWN_SPEC}:
                raise InvalidRequest(f"the pool's own blocks have one spec, {OWN_SPEC}", param="location_spec_names")
            keys = visible(request.block_mask, self._own_keys(request, namespace))
            query_type = request.query_type or meta.QT_PREFIX_MATCH
            own = match(query_type, keys, request.sw_size, lambda asked: self._own.find(namespace, asked))
            return own, _own_message
        instance = self._state.instance(request.instance_id)
        instance.check_spec_names(names)
        keys = visible(request.block_mask, _keys(request, instance.config.block_size))
        query_type = request.query_type or instance.config.default_query_type
        found = match(query_type, keys, request.sw_size, lambda asked: _serving(instance, asked, names))
        self._state.group(instance.group).ranking.touch([location for location in found if location is not None])
        return found, lambda location: location.message(names) if location is not None else meta.CacheLocation()

    async def get_cache_meta(self, request: meta.GetCacheMetaRequest) -> meta.GetCacheMetaResponse:
        """Of each block the location that is furthest, whatever its state, and what is known of it as JSON."""
        if (namespace := self._own.namespace_of(request.instance_id)) is not None:
            own = self._own.find(namespace, visible(request.block_mask, self._own_keys(request, namespace)))
            states = ["SERVING" if block is not None else "NOT_FOUND" for block in own]
            return meta.GetCacheMetaResponse(
                locations=[_own_message(block) for block in own], metas=[_json({"status": state}) for state in states]
            )
        instance = self._state.instance(request.instance_id)
        answer = meta.GetCacheMetaResponse()
        for key in visible(request.block_mask, _keys(request, instance.config.block_size)):
            found = max(instance.by_key.get(key, ()), key=lambda location: location.state, default=None)
            answer.locations.append(found.message() if found is not None else meta.CacheLocation())
            answer.metas.append(_json(_described(found, request.detail_level)))
        return answer

    async def start_write_cache(self, request: meta.StartWriteCacheRequest) -> meta.StartWriteCacheResponse:
        self._refuse_own(request.instance_id)
        instance = self._state.instance(request.instance_id)
        keys = _keys(request, instance.config.block_size)
        groups: Sequence[str] = request.location_spec_group_names or [""] * len(keys)
        if len(groups) != len(keys):
            raise InvalidRequest(f"{len(groups)} spec groups for {len(keys)} blocks", param="location_spec_group_names")
        timeout_s = request.write_timeout_seconds or WRITE_TIMEOUT_S
        if not 0 < timeout_s <= WRITE_TIMEOUT_S_MAX:
            raise InvalidRequest(f"expected 1 to {WRITE_TIMEOUT_S_MAX} seconds", param="write_timeout_seconds")
        if request.min_replica_count < 0:
            raise InvalidRequest("min_replica_count is negative", param="min_replica_count")
        layouts = {group: instance.layout(group) for group in set(groups)}
        wanted = [(key, layouts[group]) for key, group in zip(keys, groups, strict=True)]
        min_replicas = request.min_replica_count or 1
        self._state.changes.check_room()
        try:
            place = await self._place(instance)
        except StorageFailed:
            if not self._state.holds(instance, wanted, min_replicas):
                raise
            return meta.StartWriteCacheResponse(
                write_session_id=NOTHING_TO_WRITE, block_mask=meta.BlockMask(offset=len(keys))
            )
        instance = self._state.instance(request.instance_id)
        write, held = self._state.start(instance, wanted, place, timeout_s=timeout_s, min_replicas=min_replicas)
        if write is not None:
            try:
                await self._state.changes.written()
            except (Unavailable, asyncio.CancelledError):
                # Nobody was told of the session, so nobody will finish it.
                self._state.abandon(write)
                raise
        return meta.StartWriteCacheResponse(
            write_session_id=write.session_id if write is not None else NOTHING_TO_WRITE,
            block_mask=pack(held),
            locations=[location.message() for location in write.locations] if write is not None else [],
        )

    async def finish_write_cache(self, request: meta.FinishWriteCacheRequest) -> meta.CommonResponse:
        """Everything is checked before anything changes; safe to repeat."""
        self._refuse_own(request.instance_id)
        self._state.instance(request.instance_id)
        if request.write_session_id == NOTHING_TO_WRITE:
            return meta.CommonResponse()
        write = self._state.writes.get(request.write_session_id)
        count = len(write.keys) if write is not None else 0
        if write is not None:
            self._check_locations(request, write.locations)
        success = unpack(request.success_blocks, count, "success_blocks") if write is not None else []
        self._state.finish(request.instance_id, request.write_session_id, bytes(success))
        await self._state.changes.written()
        return meta.CommonResponse()

    async def remove_cache(self, request: meta.RemoveCacheRequest) -> meta.CommonResponse:
        self._refuse_own(request.instance_id)
        instance = self._state.instance(request.instance_id)
        keys = visible(request.block_mask, _keys(request, instance.config.block_size))
        self._state.changes.check_room()
        found = [location for key in keys for location in instance.by_key.get(key, ())]
        await self._state.to_the_end(self._state.remove_in_turns(found))
        await self._state.changes.written()
        return meta.CommonResponse()

    async def trim_cache(self, request: meta.TrimCacheRequest) -> meta.CommonResponse:
        self._refuse_own(request.instance_id)
        served = self._state.served(self._state.instance(request.instance_id))
        if request.strategy == meta.TS_TIMESTAMP:
            if request.begin_timestamp > request.end_timestamp:
                raise InvalidRequest("begin_timestamp is after end_timestamp", param="begin_timestamp")
            first, last = request.begin_timestamp, request.end_timestamp
            served = [location for location in served if first <= location.write.created_s <= last]
        elif request.strategy not in (meta.TS_REMOVE_ALL_CACHE, meta.TS_REMOVE_ALL_META):
            raise InvalidRequest("strategy is not given, or unknown", param="strategy")
        self._state.changes.check_room()
        delete_files = request.strategy != meta.TS_REMOVE_ALL_META
        await self._state.to_the_end(self._state.remove_in_turns(served, delete_files=delete_files))
        await self._state.changes.written()
        return meta.CommonResponse()

    async def get_host_cache_state(self, request: meta.GetHostCacheStateRequest) -> meta.GetHostCacheStateResponse:
        """For a router: what each host has of a prompt's prefix. Hosts of the pool's own blocks are its workers."""
        namespace = self._own.namespace_of(request.instance_id)
        if namespace is None:
            self._state.instance(request.instance_id)
        if request.query_type not in (meta.QT_UNSPECIFIED, meta.QT_PREFIX_MATCH):
            raise NotSupported(f"query type {request.query_type} is not supported; QT_PREFIX_MATCH is")
        if not 0 < len(request.block_cache_keys) <= KEYS_MAX:
            raise InvalidRequest(f"expected 1 to {KEYS_MAX} keys", param="block_cache_keys")
        keys, media = request.block_cache_keys, frozenset(request.medium)
        if namespace is not None:
            found = self._own.hosts(namespace, keys, media)
        else:
            found = self._reports.matches(request.instance_id, list(keys), media)
        return meta.GetHostCacheStateResponse(
            hosts=[
                meta.HostCacheMatch(
                    host_ip_port=match.host, local=match.local, p2p_1_fetch=match.fetched, p2p_1_total_match=match.total
                )
                for match in found
            ]
        )

    async def report_event(self, request: meta.ReportEventRequest) -> meta.ReportEventResponse:
        """What a host has in its own cache."""
        self._refuse_own(request.instance_id)
        return await report(self._reports, self._state.instance(request.instance_id), request)

    async def _place(self, instance: Instance) -> Place:
        """Of the group's storages the first that can be written to. Raises StorageFailed."""
        group = self._state.group(instance.group).config
        storages = [self._state.storages.get(name) for name in group.storage_candidates]
        kind, only = _STRATEGIES.get(group.cache_config.data_storage_strategy, (0, False))
        usable = [s for s in storages if s is not None and s.enabled and (not only or s.place.type == kind)]
        failure = StorageFailed(f"group {group.name} has no enabled storage of the kind it asks for")
        for storage in sorted(usable, key=lambda s: _preference(s, kind)):
            if not storage.health.takes_blocks:
                why = storage.health.detail or f"storage {storage.name} is full"
                failure = StorageFailed(why)
                continue
            try:
                await self._state.files.prepare(storage.place, instance.id)
            except StorageFailed as error:
                failure = error
            else:
                if storage.name in self._state.storages:
                    return storage.place
        raise failure

    def _check_locations(self, request: meta.FinishWriteCacheRequest, granted: Sequence[Location]) -> None:
        if request.locations and list(request.locations) != [location.message() for location in granted]:
            raise NotSupported("locations other than those that StartWriteCache gave are not supported")

    def _refuse_own(self, instance_id: str) -> None:
        if self._own.namespace_of(instance_id) is not None:
            raise NotSupported("the pool's own blocks are written and removed by its workers only")

    def _own_info(self, namespace: bytes, instance_id: str) -> meta.InstanceInfo:
        worker = self._own.worker_of(namespace)
        if worker is None:
            raise NoSuchInstance(f"no worker of namespace {namespace.hex()} is known")
        return meta.InstanceInfo(
            instance_id=instance_id,
            block_size=worker.block_size,
            location_spec_infos=[meta.LocationSpecInfo(name=OWN_SPEC)],
            model_deployment=meta.ModelDeployment(model_name=worker.model),
            default_query_type=meta.QT_PREFIX_MATCH,
        )

    def _own_keys(
        self, request: meta.GetCacheLocationRequest | meta.GetCacheMetaRequest, namespace: bytes
    ) -> list[int]:
        worker = self._own.worker_of(namespace) if not request.block_keys else None
        return _keys(request, worker.block_size if worker is not None else 0)


def _serving(instance: Instance, keys: Sequence[int], names: frozenset[str]) -> list[Location | None]:
    return [_first_serving(instance.by_key.get(key), names) for key in keys]


def _first_serving(locations: list[Location] | None, names: frozenset[str]) -> Location | None:
    for location in locations or ():
        if location.is_serving and location.covers(names):
            return location
    return None


def _keys(
    request: meta.GetCacheLocationRequest
    | meta.GetCacheMetaRequest
    | meta.StartWriteCacheRequest
    | meta.RemoveCacheRequest,
    block_size: int,
) -> list[int]:
    """The keys asked for, or those of the tokens' full blocks: the pool's own, their low 64 bits. Raises InvalidRequest."""
    if request.block_keys:
        if len(request.block_keys) > KEYS_MAX:
            raise InvalidRequest(f"at most {KEYS_MAX} blocks in one request", param="block_keys")
        return list(request.block_keys)
    if not request.token_ids:
        raise InvalidRequest("neither block_keys nor token_ids are given", param="block_keys")
    if not block_size:
        raise InvalidRequest("the block size is not known; give block_keys", param="token_ids")
    if len(request.token_ids) > KEYS_MAX * block_size:
        raise InvalidRequest(f"at most {KEYS_MAX} blocks in one request", param="token_ids")
    if min(request.token_ids) < 0:
        raise InvalidRequest("a token id is negative", param="token_ids")
    keys = block_keys(list(request.token_ids), block_size)
    return [int.from_bytes(key[-8:], "big", signed=True) for key in keys]


def _own_message(block: OwnBlock | None) -> meta.CacheLocation:
    if block is None:
        return meta.CacheLocation()
    spec = meta.LocationSpec(name=OWN_SPEC, uri=block.uri)
    return meta.CacheLocation(spec_size=1, location_specs=[spec])


def _described(location: Location | None, detail_level: int) -> dict[str, object]:
    if location is None:
        return {"status": "NOT_FOUND"}
    described: dict[str, object] = {"status": State(location.state).name}
    if detail_level > 0:
        write = location.write
        described |= {"storage": write.place.storage, "created_s": write.created_s, "size_bytes": location.size_bytes}
    return described


def _json(value: dict[str, object]) -> str:
    return msgspec.json.encode(value).decode()


def _preference(storage: Storage, kind: int) -> int:
    return int(storage.place.type != kind) if kind else 0
