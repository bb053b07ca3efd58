"""Page layout and header: where layers lie, and that no damaged header is ever believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.keys import BlockKey, Namespace
from stratakv.layout import (
    ALIGNMENT_BYTES,
    HEADER_BYTES,
    LAYERS_MAX,
    CorruptPage,
    KVLayout,
    LayerSpec,
    PageHeader,
    RangeSpec,
    layer_checksum,
)

SMOLLM2 = KVLayout.for_attention(
    num_layers=30, num_kv_heads=3, head_dim=64, page_tokens=16, dtype="bf16", element_bytes=2
)
HEADER = PageHeader(Namespace(b"n" * 16), BlockKey(b"k" * 32), 7, SMOLLM2.data_bytes, tuple(range(30)))


def test_a_page_of_the_default_model_has_the_known_size() -> None:
    assert SMOLLM2.data_bytes == 16 * 23_040
    assert SMOLLM2.page_bytes % ALIGNMENT_BYTES == 0
    assert SMOLLM2.page_bytes >= HEADER_BYTES + SMOLLM2.data_bytes


@given(st.lists(st.lists(st.integers(1, 10_000), min_size=1, max_size=3), min_size=1, max_size=8))
def test_layers_follow_each_other_without_gap_or_overlap(sizes: list[list[int]]) -> None:
    layers = tuple(LayerSpec(tuple(RangeSpec(f"r{i}", size) for i, size in enumerate(layer))) for layer in sizes)
    layout = KVLayout(page_tokens=16, dtype="fp32", layers=layers)
    at = HEADER_BYTES
    for layer, offset in zip(layout.layers, layout.layer_offsets(), strict=True):
        assert offset == at
        at += layer.size_bytes
    assert at == HEADER_BYTES + layout.data_bytes <= layout.page_bytes < at + ALIGNMENT_BYTES


def test_layouts_that_differ_have_different_digests() -> None:
    other = KVLayout.for_attention(
        num_layers=30, num_kv_heads=3, head_dim=64, page_tokens=32, dtype="bf16", element_bytes=2
    )
    assert other.digest() != SMOLLM2.digest()


@pytest.mark.parametrize("num_layers", [0, LAYERS_MAX + 1])
def test_a_layout_whose_header_has_no_room_is_refused(num_layers: int) -> None:
    with pytest.raises(ValueError, match="room"):
        KVLayout(page_tokens=16, dtype="bf16", layers=(LayerSpec((RangeSpec("k", 1),)),) * num_layers)


def test_a_header_is_read_back_as_written() -> None:
    packed = HEADER.pack()
    assert len(packed) <= HEADER_BYTES
    assert PageHeader.unpack(packed.ljust(HEADER_BYTES, b"\0")) == HEADER


def test_every_flipped_bit_of_a_header_is_found() -> None:
    packed = HEADER.pack()
    for bit in range(len(packed) * 8):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptPage):
            PageHeader.unpack(bytes(damaged))


def test_every_truncation_of_a_header_is_found() -> None:
    packed = HEADER.pack()
    for length in range(len(packed)):
        with pytest.raises(CorruptPage):
            PageHeader.unpack(packed[:length])


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_header(raw: bytes) -> None:
    with pytest.raises(CorruptPage):
        PageHeader.unpack(raw)


def test_a_checksum_depends_on_the_bytes_and_not_on_how_they_are_split() -> None:
    assert layer_checksum([b"ab", b"c"]) == layer_checksum([memoryview(b"abc")]) != layer_checksum([b"abd"])
