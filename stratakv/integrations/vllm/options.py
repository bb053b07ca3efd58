"""What an operator can say in `kv_connector_extra_config`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from stratakv.errors import SetupError
from stratakv.integrations.declared_namespace import declared_namespace
from stratakv.keys import Namespace

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class LoadMode(enum.StrEnum):
    """When blocks are loaded."""

    AUTO = "auto"
    """Layer by layer from this host's memory where vLLM allows it, between steps from anywhere else."""
    LAYERWISE = "layerwise"
    """While the step that needs them computes; other requests of that step wait with it."""
    BETWEEN_STEPS = "between_steps"
    """Before the request's first step; other requests go on meanwhile."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys, their defaults, and what they mean."""

    meta: str = "tcp://127.0.0.1:6383"
    """Where the meta server listens; several that stand by for each other with commas between them."""
    namespace: str = ""
    """Instances with different names share no blocks, whatever they serve."""
    namespace_id: str = ""
    """32 hexadecimal digits: use exactly this namespace. Says that model, layout and numerics equal those of its others."""
    model_revision: str = ""
    """Which weights these are; without it they are read and hashed once, or their hub commit is taken."""
    node: str = ""
    """The daemon of this host; without it, the one whose socket is reachable."""
    pool_secret_file: str = ""
    """A file with the pool's secret."""
    load: LoadMode = LoadMode.AUTO
    lookup_timeout_s: Seconds = 0.5
    """A lookup that takes longer is a miss."""
    load_timeout_s: Seconds = 10.0
    """A load that takes longer failed; the blocks are computed."""
    min_load_tokens: Count = 1
    """Shorter hits are computed."""
    saves_waiting_max: Count = 256
    """Saves of steps in the queue; more are left out."""
    save: bool = True
    """Write new blocks to the pool."""

    def declared_namespace(self) -> Namespace | None:
        """Raises SetupError."""
        return declared_namespace(self.namespace_id, "kv_connector_extra_config")


def parse_options(extra_config: Mapping[str, Any]) -> Options:
    """Raises SetupError that names the key."""
    try:
        options = msgspec.convert(dict(extra_config), Options)
    except msgspec.ValidationError as error:
        raise SetupError(f"kv_connector_extra_config: {error}") from error
    options.declared_namespace()  # so that a mistake is told now
    return options
