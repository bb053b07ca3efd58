"""What the SGLang process that this runs in says of its model and of how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang.srt.runtime_context import get_server_args

_NUMERICS = ("dtype", "kv_cache_dtype", "quantization", "quantization_param_path", "json_model_override_args")
"""Arguments of the server that change the bytes of KV, or how they are read."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What KV depends on beside the model's weights and its layout."""

    model_path: str
    revision: str
    numerics: str


def engine_facts(model_name: str | None) -> EngineFacts:
    """From the server's arguments; `model_name` stands in where there are none."""
    args = _server_args()
    numerics = ",".join([f"sglang={_version()}", *(f"{name}={getattr(args, name, None)}" for name in _NUMERICS)])
    path = getattr(args, "model_path", None) or model_name or ""
    return EngineFacts(str(path), str(getattr(args, "revision", None) or ""), numerics)


def _server_args() -> Any:
    """None in a process that has none, such as a test."""
    try:
        return get_server_args()
    except (AttributeError, RuntimeError, ValueError):
        return None


def _version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return ""
