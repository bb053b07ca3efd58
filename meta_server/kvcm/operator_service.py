"""OperatorService: what `stratakv meta` shows beyond the KVCM API, which has no call that lists groups or write sessions."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from meta_server.administration import PIN_S_MAX
from meta_server.kvcm.entities import Group
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import operator_service_pb2 as operator
from meta_server.kvcm.state import KvcmState
from meta_server.validate import KEYS_MAX
from stratakv.errors import InvalidRequest

SESSIONS_LISTED_MAX = 10_000


class OperatorService:
    """The calls, on the same state as AdminService."""

    def __init__(self, state: KvcmState) -> None:
        self._state = state

    async def list_instance_groups(self, _: operator.ListInstanceGroupsRequest) -> operator.ListInstanceGroupsResponse:
        """All of them, and what each uses of its quota."""
        instances = Counter(instance.group for instance in self._state.instances.values())
        groups = [_group_state(group, instances[group.name]) for group in self._state.groups.values()]
        return operator.ListInstanceGroupsResponse(groups=groups)

    async def list_storage_states(self, _: operator.ListStorageStatesRequest) -> operator.ListStorageStatesResponse:
        """All of them, and how each was when it was last looked at."""
        states = []
        for storage in self._state.storages.values():
            usage, health = self._state.usage_of(storage.name), storage.health
            states.append(
                operator.StorageState(
                    storage=storage.config,
                    is_enabled=storage.enabled,
                    health=int(health.state),  # type: ignore[arg-type]
                    detail=health.detail,
                    used_share=health.used_share if health.used_share is not None else -1.0,
                    deletions_waiting=self._state.files.waiting(storage.place),
                    used_bytes=usage.size_bytes,
                    key_count=usage.num_keys,
                )
            )
        return operator.ListStorageStatesResponse(storages=states)

    async def list_write_sessions(
        self, request: operator.ListWriteSessionsRequest
    ) -> operator.ListWriteSessionsResponse:
        """Open ones, of one instance or of all; the first to end comes first."""
        wanted = request.instance_id
        writes = [write for write in self._state.open_writes.values() if wanted in ("", write.instance_id)]
        sessions = [
            operator.WriteSession(
                write_session_id=write.session_id,
                instance_id=write.instance_id,
                instance_group=write.group,
                storage_unique_name=write.place.storage,
                block_count=len(write.keys),
                size_bytes=sum(location.size_bytes for location in write.locations),
                created_s=write.created_s,
                seconds_left=max(0.0, self._state.seconds_left(write)),
            )
            for write in islice(sorted(writes, key=lambda write: write.ends_at), SESSIONS_LISTED_MAX)
        ]
        return operator.ListWriteSessionsResponse(sessions=sessions, open_count=len(writes))

    async def pin_cache(self, request: operator.PinCacheRequest) -> operator.PinCacheResponse:
        """Blocks of a prefix are not reclaimed for a while, unless they are removed or the meta server changes."""
        instance = self._state.instance(request.instance_id)
        if not 0 <= request.pin_s <= PIN_S_MAX:
            raise InvalidRequest(f"expected 0 to {PIN_S_MAX} seconds", param="pin_s")
        if len(request.block_keys) > KEYS_MAX:
            raise InvalidRequest(f"at most {KEYS_MAX} blocks in one request", param="block_keys")
        return operator.PinCacheResponse(pinned_count=self._state.pin(instance, request.block_keys, request.pin_s))


def _group_state(group: Group, instance_count: int) -> operator.GroupState:
    by_type = [
        operator.TypeUsage(type=admin.StorageType.Name(kind), used_bytes=used)
        for kind, used in sorted(group.used_bytes.items())
        if used
    ]
    return operator.GroupState(
        instance_group=group.config,
        used_bytes=group.used(None),
        key_count=group.num_keys,
        instance_count=instance_count,
        used_by_type=by_type,
    )
