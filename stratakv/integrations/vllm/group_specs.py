"""Which groups vLLM has made of a model's layers, by its `KVCacheConfig`; and which of them cannot be served."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    RSWASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from stratakv.errors import SetupError
from stratakv.integrations.vllm.groups import KVGroup, KVGroups, Reach


def groups_of(config: VllmConfig, kv_cache_config: KVCacheConfig) -> KVGroups:
    """Raises SetupError for caches that are not made of blocks of attention."""
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise SetupError("context parallelism spreads a block over ranks, which is not supported")
    return KVGroups(tuple(_group(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups))


def _group(spec: KVCacheSpec) -> KVGroup:
    # Of a group whose layers differ in size only, any will do.
    layers = spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec
    size = int(spec.block_size)
    if spec.prefix_cacheable:
        # R-SWA keeps a prompt and the end of what was generated.
        if isinstance(layers, FullAttentionSpec) and not isinstance(layers, RSWASpec):
            return KVGroup(Reach.ALL, size)
        if isinstance(layers, SlidingWindowSpec):
            return KVGroup(Reach.WINDOW, size, layers.sliding_window + layers.extra_retained_tokens)
        if isinstance(layers, ChunkedLocalAttentionSpec):
            return KVGroup(Reach.CHUNK, size, layers.attention_chunk_size)
    raise SetupError(
        f"this model keeps KV caches of the kind {type(layers).__name__}, which is not supported",
        hint="Start vLLM with --disable-hybrid-kv-cache-manager; models with state-space layers cannot be served.",
    )
