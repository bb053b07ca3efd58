"""What an operator can say in SGLang's extra config, beside the keys that are SGLang's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from stratakv.errors import SetupError
from stratakv.integrations.declared_namespace import declared_namespace
from stratakv.keys import Namespace

Seconds = Annotated[float, msgspec.Meta(gt=0)]

SGLANG_KEYS = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "allocator",
        "tp_lcm_size",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
    }
)
"""Keys of the same object that SGLang reads itself."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys, their defaults, and what they mean."""

    meta: str = "tcp://127.0.0.1:6383"
    """Endpoint of the meta server's native protocol."""
    namespace: str = ""
    """Servers with different names share no pages, whatever they serve."""
    namespace_id: str = ""
    """32 hexadecimal digits: use exactly this namespace. Says that model, layout and numerics equal those of its others."""
    model_revision: str = ""
    """Which weights these are; without it they are read and hashed once, or SGLang's --revision is taken."""
    node: str = ""
    """The daemon of this host; without it, the one whose socket is reachable."""
    pool_secret_file: str = ""
    """A file with the pool's secret."""
    lookup_timeout_s: Seconds = 0.5
    """A lookup that takes longer is a miss."""
    load_timeout_s: Seconds = 5.0
    """A batch that takes longer to load is a miss."""
    save_timeout_s: Seconds = 30.0
    """A batch that takes longer to store is not stored."""

    def declared_namespace(self) -> Namespace | None:
        """Raises SetupError."""
        return declared_namespace(self.namespace_id, "SGLang's extra config")


def parse_options(extra_config: Mapping[str, Any] | None) -> Options:
    """Raises SetupError that names the key."""
    own = {key: value for key, value in (extra_config or {}).items() if key not in SGLANG_KEYS}
    try:
        options = msgspec.convert(own, Options)
    except msgspec.ValidationError as error:
        raise SetupError(f"SGLang's extra config: {error}") from error
    options.declared_namespace()  # so that a mistake is told now
    return options
