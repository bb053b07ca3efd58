"""The shape of KV bytes outside an engine: which named ranges a page holds, and where they lie.

    page   = header (4 KiB) · layer 0 · layer 1 · …          data starts on 4 KiB, stride a multiple of 4 KiB
    layer  = range · range · …                              for attention: k, then v, each [page_tokens, kv_heads, head_dim]

A page is `page_tokens` tokens of one spec (group, tensor-parallel rank, pipeline rank), keyed by its last block's key.
One layer of a page is one contiguous range of bytes with one checksum. Used by workers, daemons and integrations.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import xxhash

from stratakv.keys import BlockKey, Namespace

ALIGNMENT_BYTES = 4096
HEADER_BYTES = 4096
HEADER_MAGIC = b"STRATAKV"
HEADER_VERSION = 1

_FIXED = struct.Struct("<8sHHI16s32sQQ")
"""magic, version, reserved, number of layers, namespace, key, generation, data length."""
RESERVED_BYTES = 64
"""The end of a header belongs to the tier that keeps the page; writers and readers of KV leave it alone."""
LAYERS_MAX = (HEADER_BYTES - RESERVED_BYTES - _FIXED.size - 8) // 8


def align_up(size_bytes: int) -> int:
    """The next multiple of 4 KiB."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def packed_header_bytes(num_layers: int) -> int:
    """How many bytes of a header mean something; the rest of its 4 KiB is padding."""
    return _FIXED.size + 8 * num_layers + 8


@dataclass(frozen=True, slots=True)
class RangeSpec:
    """One named run of bytes within a layer of a page."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The ranges of one layer, in order."""

    ranges: tuple[RangeSpec, ...]

    @property
    def size_bytes(self) -> int:
        return sum(r.size_bytes for r in self.ranges)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One spec of a model's KV: its layers, in order, and how many tokens a page holds."""

    page_tokens: int
    dtype: str
    layers: tuple[LayerSpec, ...]
    group: int = 0
    tp_rank: int = 0
    pp_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 < len(self.layers) <= LAYERS_MAX:
            raise ValueError(f"a page header has room for 1 to {LAYERS_MAX} layers, not {len(self.layers)}")

    @classmethod
    def for_attention(
        cls, *, num_layers: int, num_kv_heads: int, head_dim: int, page_tokens: int, dtype: str, element_bytes: int
    ) -> KVLayout:
        """Plain grouped-query attention: k and v of equal shape in every layer."""
        size = page_tokens * num_kv_heads * head_dim * element_bytes
        layer = LayerSpec((RangeSpec("k", size), RangeSpec("v", size)))
        return cls(page_tokens=page_tokens, dtype=dtype, layers=(layer,) * num_layers)

    @property
    def data_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def page_bytes(self) -> int:
        """Header and data, rounded up to the alignment: the stride of pages in a segment."""
        return HEADER_BYTES + align_up(self.data_bytes)

    def layer_offsets(self) -> tuple[int, ...]:
        """Where each layer starts, in bytes from the start of the page."""
        offsets, at = [], HEADER_BYTES
        for layer in self.layers:
            offsets.append(at)
            at += layer.size_bytes
        return tuple(offsets)

    def digest(self) -> str:
        """Hex digest that two workers must share for their pages to be interchangeable."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What a page says of itself; written last, after the data it describes."""

    namespace: Namespace
    key: BlockKey
    generation: int
    data_bytes: int
    layer_checksums: tuple[int, ...]

    def pack(self) -> bytes:
        """Header bytes up to and including their own checksum (shorter than HEADER_BYTES)."""
        body = _FIXED.pack(
            HEADER_MAGIC,
            HEADER_VERSION,
            0,
            len(self.layer_checksums),
            self.namespace,
            self.key,
            self.generation,
            self.data_bytes,
        ) + struct.pack(f"<{len(self.layer_checksums)}Q", *self.layer_checksums)
        return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> PageHeader:
        """Read and verify. Raises CorruptPage if any bit is not as written."""
        raw = bytes(raw[:HEADER_BYTES])
        if len(raw) < _FIXED.size + 8:
            raise CorruptPage("header is truncated")
        magic, version, _, layers, namespace, key, generation, data_bytes = _FIXED.unpack_from(raw)
        end = _FIXED.size + 8 * layers
        if magic != HEADER_MAGIC or version != HEADER_VERSION or layers > LAYERS_MAX or len(raw) < end + 8:
            raise CorruptPage("header has the wrong magic, version or length")
        if struct.unpack_from("<Q", raw, end)[0] != xxhash.xxh3_64_intdigest(raw[:end]):
            raise CorruptPage("header does not match its checksum")
        checksums = struct.unpack_from(f"<{layers}Q", raw, _FIXED.size)
        return cls(Namespace(namespace), BlockKey(key), generation, data_bytes, checksums)


class CorruptPage(ValueError):
    """A page's bytes are not those that were written."""


def layer_checksum(ranges: Sequence[bytes | memoryview]) -> int:
    """xxh3-64 over the ranges of one layer, in order."""
    if len(ranges) == 1:
        return xxhash.xxh3_64_intdigest(ranges[0])
    state = xxhash.xxh3_64()
    for part in ranges:
        state.update(part)
    return state.intdigest()
