"""Checks on what clients send, before anything is done with it: lengths, ranges, names that PostgreSQL can hold."""

from __future__ import annotations

from collections.abc import Sequence

from stratakv.errors import InvalidRequest
from stratakv.keys import KEY_BYTES, NAMESPACE_BYTES
from stratakv.pool.meta_errors import ProtocolMismatch
from stratakv.version import version
from stratakv.wire import (
    EPOCH_BYTES,
    PROTOCOL_VERSION,
    PUT_ID_BYTES,
    CacheRule,
    Hello,
    OwnerLimit,
    PutStart,
    ReportMoves,
    Segment,
    WorkerInfo,
)

KEYS_MAX = 131_072
"""In one request: two million tokens of 16-token blocks."""
NAME_CHARS_MAX = 200
PAGE_BYTES_MAX = 1 << 40
SIZE_BYTES_MAX = 1 << 60
INT32_MAX = (1 << 31) - 1
TTL_S_MAX = 7 * 24 * 3600.0
INT64_MAX = (1 << 63) - 1
OWNER_LIMITS_MAX = 20_000
"""Told at one time."""


def check_protocol(hello: Hello) -> None:
    """Raises ProtocolMismatch."""
    if hello.protocol != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"{hello.role} {hello.name} speaks protocol {hello.protocol}, "
            f"this meta server (version {version()}) speaks {PROTOCOL_VERSION}"
        )


def check_segment(segment: Segment) -> None:
    """Raises InvalidRequest."""
    _check_name("node", segment.node)
    _check_length("epoch", segment.epoch, EPOCH_BYTES)
    _check_name("host", segment.host)
    _check_name("socket_name", segment.socket_name, empty=True)
    check_range("port", segment.port, 0, 65_535)
    check_range("size_bytes", segment.size_bytes, 1, SIZE_BYTES_MAX)
    _check_name("disk_of", segment.disk_of, empty=True)


def check_worker(info: WorkerInfo) -> None:
    """Raises InvalidRequest."""
    _check_name("worker", info.worker)
    _check_length("epoch", info.epoch, EPOCH_BYTES)
    _check_name("url", info.url)
    _check_name("model", info.model)
    _check_length("namespace", info.namespace, NAMESPACE_BYTES)
    check_range("block_size", info.block_size, 1, INT32_MAX)
    check_range("max_model_len", info.max_model_len, 1, INT32_MAX)
    if info.node is not None:
        _check_name("node", info.node)


def check_keys(namespace: bytes, keys: bytes) -> None:
    """Raises InvalidRequest."""
    _check_length("namespace", namespace, NAMESPACE_BYTES)
    if len(keys) % KEY_BYTES or len(keys) > KEYS_MAX * KEY_BYTES:
        raise InvalidRequest(f"keys must be at most {KEYS_MAX} times {KEY_BYTES} bytes, got {len(keys)}", param="keys")


def check_put(request: PutStart) -> None:
    """Raises InvalidRequest."""
    check_put_id(request.put_id)
    check_keys(request.namespace, request.keys)
    check_range("page_bytes", request.page_bytes, 1, PAGE_BYTES_MAX)
    check_range("block_size", request.block_size, 0 if request.copies_from else 1, INT32_MAX)
    _check_name("worker", request.worker, empty=True)
    _check_name("copies_from", request.copies_from, empty=True)
    check_range("cost_us", request.cost_us, 0, INT64_MAX)
    check_range("owner", request.owner, 0, INT64_MAX)


def check_put_id(put_id: bytes) -> None:
    """Raises InvalidRequest."""
    _check_length("put_id", put_id, PUT_ID_BYTES)


def check_rule(rule: CacheRule) -> None:
    """Raises InvalidRequest."""
    check_keys(rule.namespace, b"")
    if not 0 <= rule.ttl_s <= TTL_S_MAX:
        raise InvalidRequest(f"ttl_s must be between 0 and {TTL_S_MAX:g}, got {rule.ttl_s}", param="ttl_s")
    check_range("memory_bytes_max", rule.memory_bytes_max, 0, SIZE_BYTES_MAX)
    check_range("disk_bytes_max", rule.disk_bytes_max, 0, SIZE_BYTES_MAX)


def check_owner_limits(limits: Sequence[OwnerLimit]) -> None:
    """Raises InvalidRequest."""
    check_range("limits", len(limits), 0, OWNER_LIMITS_MAX)
    for limit in limits:
        check_range("owner", limit.owner, 1, INT64_MAX)
        _check_name("name", limit.name)
        check_range("memory_bytes_max", limit.memory_bytes_max or 0, 0, INT64_MAX)
        check_range("disk_bytes_max", limit.disk_bytes_max or 0, 0, INT64_MAX)


def check_moves(request: ReportMoves) -> None:
    """Raises InvalidRequest."""
    for page in request.pages:
        check_keys(page.namespace, page.key)
        _check_length("key", page.key, KEY_BYTES)
        check_range("page_bytes", page.page_bytes, 1, PAGE_BYTES_MAX)
        for extent in (page.source, page.target):
            check_range("offset", extent.offset, 0, INT64_MAX)
            check_range("generation", extent.generation, 0, INT64_MAX)


def _check_name(field: str, value: str, *, empty: bool = False) -> None:
    if len(value) > NAME_CHARS_MAX or (not value and not empty) or "\0" in value:
        raise InvalidRequest(f"{field} must have 1 to {NAME_CHARS_MAX} characters", param=field)


def _check_length(field: str, value: bytes, size_bytes: int) -> None:
    if len(value) != size_bytes:
        raise InvalidRequest(f"{field} must have {size_bytes} bytes, got {len(value)}", param=field)


def check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{field} must be between {low} and {high}, got {value}", param=field)
