"""Prefix keys: golden values shared with vLLM's sha256_cbor, and the properties routers and caches rely on."""

from __future__ import annotations

import hashlib

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.keys import (
    NONE_HASH,
    BlockKey,
    ExtraKey,
    NamespaceScope,
    block_keys,
    chained_key,
    pack_keys,
    salt_extra,
    unpack_keys,
)

FIRST_16 = "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749"
SECOND_16 = "c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c"
FIRST_16_SALTED = "1708d232e5ddcdef9cacf181a634fac79ecbebd13df829ddbe8bcd406fbb083b"

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=70)


def test_keys_equal_those_of_vllm() -> None:
    assert NONE_HASH.hex() == "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"
    assert [key.hex() for key in block_keys(range(32), 16)] == [FIRST_16, SECOND_16]


def test_a_salt_enters_the_first_block_as_in_vllm() -> None:
    salted = block_keys(range(32), 16, first_block_extra=salt_extra("t1"))
    assert salted[0].hex() == FIRST_16_SALTED
    assert salted[1:] == block_keys(range(16, 32), 16, parent=salted[0])


@given(
    st.lists(st.integers(0, 2**63), max_size=300),
    st.none() | st.text(min_size=1).map(salt_extra),
    st.binary(min_size=32, max_size=32).map(BlockKey),
)
def test_a_key_is_the_digest_of_canonical_cbor(
    token_ids: list[int], extra: tuple[ExtraKey, ...] | None, parent: BlockKey
) -> None:
    encoded = cbor2.dumps((parent, tuple(token_ids), extra), canonical=True)
    assert chained_key(parent, token_ids, extra) == hashlib.sha256(encoded).digest()
    if token_ids:
        (key,) = block_keys(token_ids, len(token_ids), first_block_extra=extra, parent=parent)
        assert key == chained_key(parent, token_ids, extra)


@given(tokens, st.integers(1, 20))
def test_only_full_blocks_have_keys(token_ids: list[int], block_size: int) -> None:
    assert len(block_keys(token_ids, block_size)) == len(token_ids) // block_size


@given(tokens, tokens, st.integers(1, 20))
def test_a_shared_prefix_has_the_same_keys(prefix: list[int], rest: list[int], block_size: int) -> None:
    whole = block_keys(prefix + rest, block_size)
    alone = block_keys(prefix, block_size)
    assert whole[: len(alone)] == alone


@given(tokens, st.integers(1, 20), st.integers(0, 69))
def test_a_changed_token_changes_its_block_and_all_after_it(token_ids: list[int], block_size: int, at: int) -> None:
    if at >= len(token_ids):
        return
    changed = [*token_ids[:at], token_ids[at] + 1, *token_ids[at + 1 :]]
    before, after = block_keys(token_ids, block_size), block_keys(changed, block_size)
    untouched = min(at // block_size, len(before))
    assert before[:untouched] == after[:untouched]
    assert all(a != b for a, b in zip(before[untouched:], after[untouched:], strict=True))


@given(tokens, st.integers(1, 20))
def test_keys_can_be_continued_from_any_block(token_ids: list[int], block_size: int) -> None:
    whole = block_keys(token_ids, block_size)
    for i, parent in enumerate(whole):
        assert block_keys(token_ids[(i + 1) * block_size :], block_size, parent=parent) == whole[i + 1 :]


@given(tokens)
def test_packing_is_reversible(token_ids: list[int]) -> None:
    keys = block_keys(token_ids, 4)
    assert unpack_keys(pack_keys(keys)) == keys


def test_a_torn_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        unpack_keys(b"x" * 33)


def test_every_part_of_the_scope_changes_the_namespace() -> None:
    scope = NamespaceScope("model", "tokenizer", "bf16", "layout", 16)
    others = [
        NamespaceScope("other", "tokenizer", "bf16", "layout", 16),
        NamespaceScope("model", "other", "bf16", "layout", 16),
        NamespaceScope("model", "tokenizer", "fp32", "layout", 16),
        NamespaceScope("model", "tokenizer", "bf16", "other", 16),
        NamespaceScope("model", "tokenizer", "bf16", "layout", 32),
        NamespaceScope("model", "tokenizer", "bf16", "layout", 16, "tenant"),
    ]
    assert len({scope.namespace(), *(other.namespace() for other in others)}) == 1 + len(others)
    assert len(scope.namespace()) == 16
