"""Which of a request's blocks are there: by prefix, each by itself, or the last window of so many.

Works on any list of findings, an instance's own locations or pages of the pool; None is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from meta_server.kvcm.errors import NotSupported
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from stratakv.errors import InvalidRequest

T = TypeVar("T")


def match(
    query_type: int, keys: Sequence[int], window: int, find: Callable[[Sequence[int]], list[T | None]]
) -> list[T | None]:
    """The findings to answer with. Raises InvalidRequest, NotSupported.

    QT_PREFIX_MATCH: as many as there are before the first miss; else one for each key, with None where nothing is to be told.
    """
    if query_type == meta.QT_BATCH_GET:
        return find(keys)
    if query_type == meta.QT_PREFIX_MATCH:
        return _before_first_miss(find(keys))
    if query_type == meta.QT_REVERSE_ROLL_SW_MATCH:
        if window < 1:
            raise InvalidRequest("sw_size must be at least 1", param="sw_size")
        return _last_window(find(keys), window)
    if query_type == meta.QT_UNSPECIFIED:
        raise InvalidRequest("query_type is not given, and the instance has no default", param="query_type")
    raise NotSupported(f"query type {query_type} is not supported")


def _before_first_miss(found: list[T | None]) -> list[T | None]:
    end = next((i for i, item in enumerate(found) if item is None), len(found))
    return found[:end]


def _last_window(found: list[T | None], window: int) -> list[T | None]:
    run = 0
    for i in range(len(found) - 1, -1, -1):
        run = run + 1 if found[i] is not None else 0
        if run == window:
            return [*[None] * i, *found[i : i + window], *[None] * (len(found) - i - window)]
    return [None] * len(found)
