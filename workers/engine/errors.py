"""Errors of the engine.

StrataError
├── EngineFailed     the engine's thread died; the worker must be restarted
├── NotFinite        a request's logits are NaN or infinite
└── CacheCorrupt     a bug: the books of the paged cache contradict each other
"""

from __future__ import annotations

from stratakv.errors import StrataError, Unavailable


class EngineFailed(Unavailable):
    """The engine stopped and serves no more requests."""

    code = "engine_failed"


class NotFinite(StrataError):
    """The model produced NaN or infinity for this request; its KV is not kept."""

    code = "not_finite"


class CacheCorrupt(StrataError):
    """The paged cache contradicts itself."""

    code = "cache_corrupt"
