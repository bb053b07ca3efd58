from meta_server.kvcm.protocol import admin_service_pb2 as _admin_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StorageHealth(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOT_PROBED: _ClassVar[StorageHealth]
    HEALTHY: _ClassVar[StorageHealth]
    FULL: _ClassVar[StorageHealth]
    FAILING: _ClassVar[StorageHealth]
NOT_PROBED: StorageHealth
HEALTHY: StorageHealth
FULL: StorageHealth
FAILING: StorageHealth

class ListInstanceGroupsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TypeUsage(_message.Message):
    __slots__ = ("type", "used_bytes")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    type: _admin_service_pb2.StorageType
    used_bytes: int
    def __init__(self, type: _Optional[_Union[_admin_service_pb2.StorageType, str]] = ..., used_bytes: _Optional[int] = ...) -> None: ...

class GroupState(_message.Message):
    __slots__ = ("instance_group", "used_bytes", "key_count", "instance_count", "used_by_type")
    INSTANCE_GROUP_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_COUNT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    USED_BY_TYPE_FIELD_NUMBER: _ClassVar[int]
    instance_group: _admin_service_pb2.InstanceGroup
    used_bytes: int
    key_count: int
    instance_count: int
    used_by_type: _containers.RepeatedCompositeFieldContainer[TypeUsage]
    def __init__(self, instance_group: _Optional[_Union[_admin_service_pb2.InstanceGroup, _Mapping]] = ..., used_bytes: _Optional[int] = ..., key_count: _Optional[int] = ..., instance_count: _Optional[int] = ..., used_by_type: _Optional[_Iterable[_Union[TypeUsage, _Mapping]]] = ...) -> None: ...

class ListInstanceGroupsResponse(_message.Message):
    __slots__ = ("header", "groups")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    header: _admin_service_pb2.CommonResponseHeader
    groups: _containers.RepeatedCompositeFieldContainer[GroupState]
    def __init__(self, header: _Optional[_Union[_admin_service_pb2.CommonResponseHeader, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[GroupState, _Mapping]]] = ...) -> None: ...

class ListStorageStatesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StorageState(_message.Message):
    __slots__ = ("storage", "is_enabled", "health", "detail", "used_share", "used_bytes", "key_count", "deletions_waiting")
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    IS_ENABLED_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    USED_SHARE_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_COUNT_FIELD_NUMBER: _ClassVar[int]
    DELETIONS_WAITING_FIELD_NUMBER: _ClassVar[int]
    storage: _admin_service_pb2.StorageConfig
    is_enabled: bool
    health: StorageHealth
    detail: str
    used_share: float
    used_bytes: int
    key_count: int
    deletions_waiting: int
    def __init__(self, storage: _Optional[_Union[_admin_service_pb2.StorageConfig, _Mapping]] = ..., is_enabled: bool = ..., health: _Optional[_Union[StorageHealth, str]] = ..., detail: _Optional[str] = ..., used_share: _Optional[float] = ..., used_bytes: _Optional[int] = ..., key_count: _Optional[int] = ..., deletions_waiting: _Optional[int] = ...) -> None: ...

class ListStorageStatesResponse(_message.Message):
    __slots__ = ("header", "storages")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STORAGES_FIELD_NUMBER: _ClassVar[int]
    header: _admin_service_pb2.CommonResponseHeader
    storages: _containers.RepeatedCompositeFieldContainer[StorageState]
    def __init__(self, header: _Optional[_Union[_admin_service_pb2.CommonResponseHeader, _Mapping]] = ..., storages: _Optional[_Iterable[_Union[StorageState, _Mapping]]] = ...) -> None: ...

class ListWriteSessionsRequest(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    def __init__(self, instance_id: _Optional[str] = ...) -> None: ...

class WriteSession(_message.Message):
    __slots__ = ("write_session_id", "instance_id", "instance_group", "storage_unique_name", "block_count", "size_bytes", "created_s", "seconds_left")
    WRITE_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_GROUP_FIELD_NUMBER: _ClassVar[int]
    STORAGE_UNIQUE_NAME_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    write_session_id: str
    instance_id: str
    instance_group: str
    storage_unique_name: str
    block_count: int
    size_bytes: int
    created_s: int
    seconds_left: float
    def __init__(self, write_session_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., instance_group: _Optional[str] = ..., storage_unique_name: _Optional[str] = ..., block_count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., created_s: _Optional[int] = ..., seconds_left: _Optional[float] = ...) -> None: ...

class ListWriteSessionsResponse(_message.Message):
    __slots__ = ("header", "sessions", "open_count")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    OPEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    header: _admin_service_pb2.CommonResponseHeader
    sessions: _containers.RepeatedCompositeFieldContainer[WriteSession]
    open_count: int
    def __init__(self, header: _Optional[_Union[_admin_service_pb2.CommonResponseHeader, _Mapping]] = ..., sessions: _Optional[_Iterable[_Union[WriteSession, _Mapping]]] = ..., open_count: _Optional[int] = ...) -> None: ...

class PinCacheRequest(_message.Message):
    __slots__ = ("instance_id", "block_keys", "pin_s")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    PIN_S_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    block_keys: _containers.RepeatedScalarFieldContainer[int]
    pin_s: float
    def __init__(self, instance_id: _Optional[str] = ..., block_keys: _Optional[_Iterable[int]] = ..., pin_s: _Optional[float] = ...) -> None: ...

class PinCacheResponse(_message.Message):
    __slots__ = ("header", "pinned_count")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PINNED_COUNT_FIELD_NUMBER: _ClassVar[int]
    header: _admin_service_pb2.CommonResponseHeader
    pinned_count: int
    def __init__(self, header: _Optional[_Union[_admin_service_pb2.CommonResponseHeader, _Mapping]] = ..., pinned_count: _Optional[int] = ...) -> None: ...
