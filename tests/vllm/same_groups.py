"""Runs where vLLM is: prints `same` if what a group needs, and how its blocks are held, is as vLLM's own managers have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupRole,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from stratakv.errors import SetupError
from stratakv.integrations.vllm.group_specs import groups_of
from stratakv.integrations.vllm.holds import Holds

SHAPE = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
CONFIG: Any = SimpleNamespace(
    parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1)
)
NUM_BLOCKS = 12


@dataclass
class Cache:
    """`KVCacheManager`, of which only block tables are asked."""

    block_pool: Any
    table: Sequence[Any]

    def get_blocks(self, request_id: str) -> Any:
        return SimpleNamespace(blocks=(self.table,))


def main() -> None:
    pool = BlockPool(num_gpu_blocks=NUM_BLOCKS, enable_caching=True, hash_block_size=16)
    check_needs(pool)
    check_refusal()
    check_holds(pool)
    print("same")


def check_needs(pool: BlockPool) -> None:
    specs = [FullAttentionSpec(block_size=32, **SHAPE)]
    for span in (1, 15, 16, 17, 40, 64):
        specs.append(SlidingWindowSpec(block_size=16, sliding_window=span, **SHAPE))
        specs.append(ChunkedLocalAttentionSpec(block_size=16, attention_chunk_size=span, **SHAPE))
    specs.append(SlidingWindowSpec(block_size=16, sliding_window=40, extra_retained_tokens=3, **SHAPE))
    uniform = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": specs[1], "b": specs[1]})
    groups = groups_of(CONFIG, config_of([*specs, uniform]))
    for spec, group in zip([*specs, specs[1]], groups.groups, strict=True):
        manager = get_manager_for_kv_cache_spec(
            kv_cache_spec=spec,
            max_in_flight_tokens=512,
            max_model_len=512,
            block_pool=pool,
            role=KVCacheGroupRole.DEFAULT,
            enable_caching=True,
            kv_cache_group_id=0,
            scheduler_block_size=32,
        )
        for num_tokens in range(200):
            theirs = manager.get_num_skipped_tokens(num_tokens) // spec.block_size
            assert group.first_needed(num_tokens) == theirs, (spec, num_tokens)


def check_refusal() -> None:
    state = MambaSpec(block_size=16, shapes=((4,),), dtypes=(torch.float32,))
    for specs in ([state], [FullAttentionSpec(block_size=16, **SHAPE), state]):
        assert "MambaSpec" in refusal_of(specs)


def refusal_of(specs: Sequence[Any]) -> str:
    try:
        groups_of(CONFIG, config_of(specs))
    except SetupError as error:
        return error.message
    return ""


def check_holds(pool: BlockPool) -> None:
    blocks = pool.get_new_blocks(4)
    num_free = pool.get_num_free_blocks()
    holds = Holds(Cache(pool, [pool.null_block, *blocks]), num_workers=2)
    held = holds.take("a", 0, 0, 9)
    assert held is not None
    assert (list(held.indexes), list(held.blocks)) == ([1, 2, 3, 4], [block.block_id for block in blocks])
    assert holds.take("a", 0, 0, 9) is None, "more than the share that may be held"
    pool.free_blocks(blocks)
    assert pool.get_num_free_blocks() == num_free
    holds.over({held.number: 1})
    assert pool.get_num_free_blocks() == num_free
    holds.over({held.number: 1})
    assert pool.get_num_free_blocks() == num_free + 4
    assert holds.take("a", 0, 0, 1) is None, "a null block"


def config_of(specs: Sequence[Any]) -> KVCacheConfig:
    return KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec([f"layer {n}"], spec) for n, spec in enumerate(specs)])


if __name__ == "__main__":
    main()
