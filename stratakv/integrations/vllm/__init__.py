"""vLLM on the pool: `StrataKVConnector`, which vLLM loads by itself.

    vllm serve MODEL --prefix-caching-hash-algo sha256_cbor --kv-transfer-config '{"kv_connector": "StrataKVConnector",
      "kv_connector_module_path": "stratakv.integrations.vllm", "kv_role": "kv_both",
      "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"meta": "tcp://127.0.0.1:6383"}}'

vLLM is imported by `connector`, `engine_metrics`, `fingerprint`, `group_specs` and `keys` only; the other modules know nothing
of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stratakv.integrations.vllm.connector import StrataKVConnector

__all__ = ["StrataKVConnector"]


def __getattr__(name: str) -> Any:
    if name != "StrataKVConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stratakv.integrations.vllm.connector import StrataKVConnector

    return StrataKVConnector
