"""Which shard a namespace belongs to, and whom the settings of a shard name."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.errors import SetupError
from stratakv.pool.shards import all_shards, of_namespace, of_shard, shard_of
from stratakv.settings import MetaSettings

GOLDEN = [1, 2, 3, 2, 0, 3, 1, 4, 4, 1]
SHARDED = MetaSettings(shards=("a1:1+a2:1", "b1:1"))


@given(st.binary(min_size=16, max_size=16), st.integers(1, 20))
def test_with_one_shard_more_a_namespace_stays_or_moves_there(namespace: bytes, num_shards: int) -> None:
    assert shard_of(namespace, num_shards + 1) in (shard_of(namespace, num_shards), num_shards)


def test_shards_get_about_as_many_namespaces_each() -> None:
    counts = Counter(shard_of(number.to_bytes(16, "big"), 4) for number in range(4000))
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 800


def test_a_namespace_keeps_its_shard_across_releases() -> None:
    assert [shard_of(bytes([number]) * 16, 5) for number in range(10)] == GOLDEN


def test_a_shard_is_a_group_of_meta_servers() -> None:
    assert [shard.addresses for shard in all_shards(SHARDED)] == [("a1:1", "a2:1"), ("b1:1",)]
    namespace = b"n" * 16
    assert of_namespace(SHARDED, namespace) == of_shard(SHARDED, shard_of(namespace, 2))


def test_without_shards_the_settings_stay_as_they_are() -> None:
    settings = MetaSettings(addresses=("a:1",))
    assert of_namespace(settings, b"n" * 16) is settings
    assert all_shards(settings) == [settings]
    with pytest.raises(SetupError, match="names 0 shards"):
        of_shard(settings, 1)
