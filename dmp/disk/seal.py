"""The seal of a page on disk: its length, and one checksum over all of it, in the reserved end of its header.

What a page's own header says (`stratakv.layout`) needs the model's layout to be checked; the seal needs nothing.
"""

from __future__ import annotations

import struct

import xxhash

from stratakv.layout import ALIGNMENT_BYTES, HEADER_BYTES, RESERVED_BYTES

SEAL_MAGIC = b"SKVDISK1"
_SEAL = struct.Struct("<8sQQ")
"""magic, page length in bytes, checksum"""
_SEAL_AT = HEADER_BYTES - RESERVED_BYTES
_PAGE_BYTES_MAX = 1 << 31


def seal(page: bytearray) -> None:
    """Seal a whole page, in place."""
    _SEAL.pack_into(page, _SEAL_AT, SEAL_MAGIC, len(page), _checksum(page))


def sealed_bytes(header: bytes | bytearray | memoryview) -> int | None:
    """How long the page is that this header begins; None if it is no sealed page's."""
    if len(header) < HEADER_BYTES:
        return None
    magic, page_bytes, _ = _SEAL.unpack_from(header, _SEAL_AT)
    is_length = HEADER_BYTES < page_bytes <= _PAGE_BYTES_MAX and page_bytes % ALIGNMENT_BYTES == 0
    return int(page_bytes) if magic == SEAL_MAGIC and is_length else None


def is_whole(page: bytes | bytearray | memoryview) -> bool:
    """Whether every bit is as it was sealed."""
    if sealed_bytes(page) != len(page):
        return False
    return bool(_SEAL.unpack_from(page, _SEAL_AT)[2] == _checksum(page))


def _checksum(page: bytes | bytearray | memoryview) -> int:
    view = memoryview(page)
    state = xxhash.xxh3_64(len(page).to_bytes(8, "little"))
    state.update(view[:_SEAL_AT])
    state.update(view[_SEAL_AT + _SEAL.size :])
    return state.intdigest()
