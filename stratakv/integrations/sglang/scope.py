"""Which pages SGLang servers share: those of one namespace.

SGLang's page keys are hashes of token ids, and of a request's extra key and cache salt. All else that must be equal for two
servers to use each other's pages enters the namespace: weights, numerics, ranks, the pool, and how its bytes lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from stratakv.errors import SetupError
from stratakv.integrations.sglang.options import Options
from stratakv.keys import NAMESPACE_BYTES, BlockKey, Namespace, NamespaceScope
from stratakv.layout import KVLayout
from stratakv.models.identity import model_identity

ENGINE = "sglang"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which share of a page's KV this process holds."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dcp_rank: int = 0
    dcp_size: int = 1

    def replicated(self) -> Ranks:
        """Of a pool whose KV is the same on every tensor-parallel rank."""
        return replace(self, tp_rank=0, tp_size=1)

    @property
    def is_whole(self) -> bool:
        """Whether there are no other shares."""
        return self == Ranks()


@dataclass(frozen=True, slots=True)
class ServerScope:
    """What all pools of one server's process have in common."""

    weights: str
    numerics: str
    options: Options

    def namespace(self, pool: str, layout: KVLayout, ranks: Ranks) -> Namespace:
        """Of one pool. A declared namespace is taken as it is for the whole KV of a page, and set apart for any other share."""
        shape = {"layout": layout.digest(), "pool": pool, "ranks": asdict(ranks)}
        declared = self.options.declared_namespace()
        if declared is not None:
            return declared if pool == "kv" and ranks.is_whole else _share_of(declared, shape)
        return NamespaceScope(
            model_revision=self.weights,
            tokenizer_digest="",
            dtype=f"{layout.dtype};{self.numerics}",
            layout_digest=json.dumps({"engine": ENGINE, **shape}, sort_keys=True),
            block_size=layout.page_tokens,
            tenant_salt=self.options.namespace,
        ).namespace()


def weights_of(options: Options, model_path: str, revision: str) -> str:
    """What was declared; else, for a directory, a digest of its files; else the model's name and commit on the hub.

    Raises SetupError.
    """
    if options.model_revision:
        return options.model_revision
    hint = 'Name them in the extra config, for example "model_revision": "1".'
    if model_path and (directory := Path(model_path).expanduser()).is_dir():
        try:
            return model_identity(directory).revision
        except SetupError as error:
            raise SetupError(error.message, hint=hint) from error
    commit = _commit_in_cache(model_path, revision)
    if not commit:
        raise SetupError(f"cannot tell which weights {model_path or 'the model'} are", hint=hint)
    return f"{model_path}@{commit}"


def _commit_in_cache(model_path: str, revision: str) -> str:
    """Of the hub's snapshot that this host has; empty if there is none."""
    try:
        found = try_to_load_from_cache(model_path, "config.json", revision=revision or None)
    except HFValidationError:
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


def page_key(key: str) -> BlockKey:
    """SGLang's hash of a page, as the pool's key."""
    try:
        raw = bytes.fromhex(key)
    except ValueError:
        raw = b""
    return BlockKey(raw if len(raw) == hashlib.sha256().digest_size else hashlib.sha256(key.encode()).digest())


def _share_of(declared: Namespace, shape: Mapping[str, object]) -> Namespace:
    text = json.dumps(dict(shape), sort_keys=True).encode()
    return Namespace(hashlib.sha256(declared + text).digest()[:NAMESPACE_BYTES])
