"""SGLang on the pool: `StrataKVStorage`, which SGLang loads by itself as the storage below its host memory, and `StrataKVLinker`.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
      "backend_name": "stratakv", "module_path": "stratakv.integrations.sglang", "class_name": "StrataKVStorage",
      "interface_v1": 1, "meta": "tcp://127.0.0.1:6383"}'

SGLang is imported by `storage`, `linker` and `engine_facts` only; the other modules know nothing of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stratakv.integrations.sglang.linker import StrataKVLinker
    from stratakv.integrations.sglang.storage import StrataKVStorage

__all__ = ["StrataKVLinker", "StrataKVStorage"]

_MODULES = {"StrataKVLinker": "linker", "StrataKVStorage": "storage"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
