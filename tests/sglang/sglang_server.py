"""SGLang's own objects as its server makes them, as far as they need no GPU: host pools, storages, page hashes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache import hicache_storage  # noqa: F401  SGLang's modules import each other in a ring: from here
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MambaStateBufferInfo,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_hash_str

from stratakv.integrations.sglang import StrataKVStorage

PAGE = 4
"""Tokens in a page."""
LAYERS, HEADS, DIM = 3, 2, 8
MODEL = "a-model"

CONFIG = HiCacheStorageConfig(
    tp_rank=0,
    tp_size=1,
    pp_rank=0,
    pp_size=1,
    attn_cp_rank=0,
    attn_cp_size=1,
    is_mla_model=False,
    enable_storage_metrics=True,
    is_page_first_layout=False,
    model_name=MODEL,
)
_tokens = itertools.count(1)
BUDGET_BYTES = 1 << 30
"""For the host pools of one call; by default SGLang leaves 10 GB of the machine free."""


def make_storage(host_pool: Any, meta: str, *, config: HiCacheStorageConfig = CONFIG, **extra: Any) -> StrataKVStorage:
    """By SGLang's factory, from the configuration of the documentation."""
    names = {"backend_name": "stratakv", "module_path": "stratakv.integrations.sglang", "class_name": "StrataKVStorage"}
    config = replace(config, extra_config=names | {"interface_v1": 1, "meta": meta, "model_revision": "1"} | extra)
    storage = StorageBackendFactory.create_backend("dynamic", config, host_pool)
    assert isinstance(storage, StrataKVStorage)
    storage.register_mem_pool_host(host_pool)
    storage.on_host_pools_registered()
    return storage


@host_memory_budget_scope(BUDGET_BYTES)
def mha_pool(layout: str, *, pages: int = 160, heads: int = HEADS, dtype: torch.dtype = torch.bfloat16) -> Any:
    """K and V of attention, filled with random bytes."""
    size = pages * PAGE
    k, v = ([torch.zeros(size, heads, DIM, dtype=dtype) for _ in range(LAYERS)] for _ in range(2))
    info = MHABufferInfo(
        buffers=KVBuffers(
            k=tuple(k), v=tuple(v), k_data_ptrs=_pointers(k), v_data_ptrs=_pointers(v), layout=KVBufferLayout.NHD
        ),
        page_size=PAGE,
        head_num=heads,
        head_dim=DIM,
        v_head_dim=DIM,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return _filled(
        MHATokenToKVPoolHost(
            info,
            0,
            0,
            PAGE,
            layout,
            pin_memory=False,
            device_capacity_tokens=size,
            start_layer=0,
            end_layer=LAYERS,
            host_token_capacity=size,
        )
    )


@host_memory_budget_scope(BUDGET_BYTES)
def mla_pool(layout: str, *, pages: int = 160) -> Any:
    """Latents of MLA, filled with random bytes."""
    size, rank, rope = pages * PAGE, 12, 4
    buffers = [torch.zeros(size, 1, rank + rope, dtype=torch.bfloat16) for _ in range(LAYERS)]
    info = MLABufferInfo(
        buffers=tuple(buffers),
        data_ptrs=_pointers(buffers),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        kv_cache_dim=rank + rope,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return _filled(
        MLATokenToKVPoolHost(
            info,
            0,
            0,
            PAGE,
            layout,
            pin_memory=False,
            device_capacity_tokens=size,
            start_layer=0,
            end_layer=LAYERS,
            target_layer_num=LAYERS,
            host_token_capacity=size,
        )
    )


@host_memory_budget_scope(BUDGET_BYTES)
def mamba_pool(layout: str = "page_first", *, extra_state: bool = False, slots: int = 40) -> Any:
    """States of linear attention, one to a slot, filled with random bytes."""
    info = MambaStateBufferInfo(
        temporal=torch.zeros(LAYERS, slots, 2, 5),
        conv=(torch.zeros(LAYERS, slots, 3, dtype=torch.bfloat16),),
        extra_checkpoint_buffers=(torch.zeros(slots, 7),) if extra_state else (),
    )
    pool = MambaPoolHost(info, 2.0, 0, device_capacity=slots, pin_memory=False, layout=layout)
    for tensor in (pool.temporal_buffer, *pool.conv_buffer, *pool.slot_state_buffers):
        _fill(tensor)
    return pool


def page_hashes(num_pages: int, prior: str | None = None) -> list[str]:
    """SGLang's hashes of that many pages of tokens that nobody had before."""
    tokens = [next(_tokens) for _ in range(num_pages * PAGE)]
    hashes: list[str] = get_hash_str(tokens, prior, page_size=PAGE)
    return hashes


def slots(*pages: int, size: int = PAGE) -> torch.Tensor:
    """Host indices of pages."""
    return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])


def page_bytes(host_pool: Any, page: int, size: int = PAGE) -> bytes:
    """A page's bytes as SGLang reads them."""
    flat = host_pool.get_data_page(page * size, flat=True)
    return bytes(flat.contiguous().view(torch.uint8).numpy().tobytes())


def _pointers(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def _filled(pool: Any) -> Any:
    _fill(pool.kv_buffer)
    return pool


def _fill(tensor: torch.Tensor) -> None:
    flat = tensor.view(torch.uint8).reshape(-1)
    flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8))
