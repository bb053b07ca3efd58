from meta_server.kvcm.protocol import meta_service_pb2 as _meta_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ALIVE: _ClassVar[EventKind]
    BLOCKS_ADDED: _ClassVar[EventKind]
    BLOCKS_REMOVED: _ClassVar[EventKind]
    BLOCKS_MOVED: _ClassVar[EventKind]
    NODE_UP: _ClassVar[EventKind]
    NODE_DOWN: _ClassVar[EventKind]
    NODE_GONE: _ClassVar[EventKind]
ALIVE: EventKind
BLOCKS_ADDED: EventKind
BLOCKS_REMOVED: EventKind
BLOCKS_MOVED: EventKind
NODE_UP: EventKind
NODE_DOWN: EventKind
NODE_GONE: EventKind

class PoolEvent(_message.Message):
    __slots__ = ("epoch", "sequence", "kind", "node", "medium", "namespace", "keys")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    epoch: bytes
    sequence: int
    kind: EventKind
    node: str
    medium: str
    namespace: bytes
    keys: bytes
    def __init__(self, epoch: _Optional[bytes] = ..., sequence: _Optional[int] = ..., kind: _Optional[_Union[EventKind, str]] = ..., node: _Optional[str] = ..., medium: _Optional[str] = ..., namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetEventSnapshotRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class NodeMark(_message.Message):
    __slots__ = ("node", "medium", "is_up")
    NODE_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    IS_UP_FIELD_NUMBER: _ClassVar[int]
    node: str
    medium: str
    is_up: bool
    def __init__(self, node: _Optional[str] = ..., medium: _Optional[str] = ..., is_up: bool = ...) -> None: ...

class BlockGroup(_message.Message):
    __slots__ = ("namespace", "node", "keys")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    node: str
    keys: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., node: _Optional[str] = ..., keys: _Optional[bytes] = ...) -> None: ...

class GetEventSnapshotResponse(_message.Message):
    __slots__ = ("header", "epoch", "sequence", "nodes", "blocks", "next")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    header: _meta_service_pb2.CommonResponseHeader
    epoch: bytes
    sequence: int
    nodes: _containers.RepeatedCompositeFieldContainer[NodeMark]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockGroup]
    next: int
    def __init__(self, header: _Optional[_Union[_meta_service_pb2.CommonResponseHeader, _Mapping]] = ..., epoch: _Optional[bytes] = ..., sequence: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[NodeMark, _Mapping]]] = ..., blocks: _Optional[_Iterable[_Union[BlockGroup, _Mapping]]] = ..., next: _Optional[int] = ...) -> None: ...
