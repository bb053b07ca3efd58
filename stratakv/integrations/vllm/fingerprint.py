"""The namespace of one rank's pages: everything that must be equal for its KV bytes to be usable by another instance.

Weights, configuration (with overrides), element types, the shape of pages, the rank, vLLM's version and, on the CPU, the
instructions for which attention arranges its blocks. Instances that agree in all of it share blocks by themselves.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig

from stratakv.errors import SetupError
from stratakv.integrations.vllm.groups import KVGroups
from stratakv.integrations.vllm.kv_tensors import LayerTensor
from stratakv.integrations.vllm.options import Options
from stratakv.keys import Namespace, NamespaceScope
from stratakv.layout import KVLayout
from stratakv.models.identity import model_identity


def rank_namespace(
    config: VllmConfig, options: Options, groups: KVGroups, layers: Sequence[LayerTensor], layout: KVLayout
) -> Namespace:
    """Of pages of these layers. Raises SetupError if the weights cannot be told from others."""
    parallel = config.parallel_config
    declared = options.declared_namespace()
    if declared is not None:
        if parallel.world_size > 1 or len(groups.groups) > 1:
            raise SetupError(
                "namespace_id is for one rank and one kind of KV cache; this instance has several",
                hint="Use namespace instead.",
            )
        return declared
    device = layers[0].storage.device.type
    numerics = {
        "vllm": vllm.__version__,
        "cache_dtype": str(config.cache_config.cache_dtype),
        "kv_layout": str(config.cache_config.kv_cache_layout),
        "quantization": str(config.model_config.quantization),
        "sizes": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
        "layers": [layer.names for layer in layers],
        "device": device,
        "instructions": _cpu_instructions() if device == "cpu" else [],
        "config": _config_digest(config.model_config.hf_config),
    }
    if groups.key_tokens != layout.page_tokens:
        numerics["key_tokens"] = groups.key_tokens
    return NamespaceScope(
        model_revision=_revision(config, options),
        tokenizer_digest="",
        dtype=f"{config.model_config.dtype} {json.dumps(numerics, sort_keys=True)}",
        layout_digest=layout.digest(),
        block_size=layout.page_tokens,
        tenant_salt=f"vllm {options.namespace}",
    ).namespace()


def _revision(config: VllmConfig, options: Options) -> str:
    if options.model_revision:
        return options.model_revision
    model = config.model_config
    directory = Path(model.model)
    if directory.is_dir():
        return _blob_names(directory) or model_identity(directory).revision
    commit = getattr(model.hf_config, "_commit_hash", None)
    if not commit:
        raise SetupError(
            f"cannot tell which weights {model.model} are",
            hint='Name them in kv_connector_extra_config, for example "model_revision": "1".',
        )
    return f"{model.model}@{commit}"


def _blob_names(directory: Path) -> str:
    """Of a directory of the hub's cache: its files are links to blobs, which are named by what they hold."""
    files = sorted(path for path in directory.glob("*.safetensors"))
    blobs = [path.readlink().name for path in files if path.is_symlink() and path.readlink().parent.name == "blobs"]
    if not files or len(blobs) != len(files):
        return ""
    return hashlib.sha256("\0".join(blobs).encode()).hexdigest()


def _config_digest(hf_config: Any) -> str:
    values = hf_config.to_dict()
    for key in ("_name_or_path", "_commit_hash", "transformers_version"):
        values.pop(key, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _cpu_instructions() -> list[str]:
    cpu: Any = torch.cpu
    names = ("_is_amx_tile_supported", "_is_avx512_supported")
    return [platform.machine(), *(name for name in names if getattr(cpu, name, lambda: False)())]
