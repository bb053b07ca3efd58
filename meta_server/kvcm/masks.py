"""Block masks: `offset` n stands for the first n of a list, `bool_masks` has a value for each."""

from __future__ import annotations

from collections.abc import Sequence

from meta_server.kvcm.protocol import meta_service_pb2 as meta
from stratakv.errors import InvalidRequest


def unpack(mask: meta.BlockMask, count: int, field: str) -> list[bool]:
    """[count] values. Raises InvalidRequest for a mask of another length, or none at all."""
    form = mask.WhichOneof("info")
    if form == "bool_masks":
        if len(mask.bool_masks.values) != count:
            raise InvalidRequest(f"{field} has {len(mask.bool_masks.values)} values for {count} blocks", param=field)
        return list(mask.bool_masks.values)
    if form is None:
        raise InvalidRequest(f"{field} is empty; expected offset or bool_masks", param=field)
    if not 0 <= mask.offset <= count:
        raise InvalidRequest(f"{field}.offset is {mask.offset} for {count} blocks", param=field)
    return [True] * mask.offset + [False] * (count - mask.offset)


def visible(mask: meta.BlockMask, keys: Sequence[int]) -> list[int]:
    """The keys that a request's mask does not hide. Raises InvalidRequest."""
    if mask.WhichOneof("info") is None:
        return list(keys)
    hidden = unpack(mask, len(keys), "block_mask")
    return [key for key, is_hidden in zip(keys, hidden, strict=True) if not is_hidden]


def pack(values: Sequence[bool]) -> meta.BlockMask:
    """The shorter form."""
    offset = next((i for i, value in enumerate(values) if not value), len(values))
    if not any(values[offset:]):
        return meta.BlockMask(offset=offset)
    return meta.BlockMask(bool_masks=meta.BoolMasksType(values=values))
