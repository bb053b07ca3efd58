"""Which model a directory holds: digests of its weights and of its tokenizer.

Both enter the namespace of every KV block, so they must change whenever the bytes do. They are kept in `stratakv.json`
beside the weights, together with the size and time of every file they were computed from; a file that was replaced
since makes them be computed anew. A directory that cannot be written to is read every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stratakv.errors import SetupError

IDENTITY_FILE = "stratakv.json"
_WEIGHT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_PATTERNS = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.*")

FileStamps = dict[str, list[int]]
"""File name → [size in bytes, modification time in ns]."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a model's KV depends on, as hex digests, and where the model came from."""

    revision: str
    tokenizer_digest: str
    source: str


def model_identity(directory: Path, source: str | None = None) -> ModelIdentity:
    """Identity of the model in `directory`: read from `stratakv.json` if still true, else computed and kept there.

    Raises SetupError if the directory holds no safetensors model.
    """
    weights, tokenizer = _files(directory, _WEIGHT_PATTERNS), _files(directory, _TOKENIZER_PATTERNS)
    if not any(path.suffix == ".safetensors" for path in weights) or not (directory / "config.json").is_file():
        raise SetupError(
            f"{directory} holds no model: a config.json and at least one .safetensors file are needed.",
            hint="Name a Hugging Face model directory, or fetch one with `stratakv model pull`.",
        )
    stamps = _stamps([*weights, *tokenizer])
    known = _read(directory / IDENTITY_FILE, stamps)
    if known is not None and source in (None, known.source):
        return known
    identity = ModelIdentity(_digest(weights), _digest(tokenizer), source or str(directory.resolve()))
    _write(directory / IDENTITY_FILE, identity, stamps)
    return identity


def _files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _stamps(files: Iterable[Path]) -> FileStamps:
    stats = {path.name: path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 over name, size and bytes of every file."""
    state = hashlib.sha256()
    for path in files:
        state.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()


def _read(path: Path, stamps: FileStamps) -> ModelIdentity | None:
    """The identity kept at `path`, if it was computed from exactly these files."""
    try:
        kept = json.loads(path.read_text())
        if kept["files"] != stamps:
            return None
        return ModelIdentity(str(kept["revision"]), str(kept["tokenizer_digest"]), str(kept["source"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None  # a damaged file is only a cache of what the weights say


def _write(path: Path, identity: ModelIdentity, stamps: FileStamps) -> None:
    text = json.dumps(
        {
            "revision": identity.revision,
            "tokenizer_digest": identity.tokenizer_digest,
            "source": identity.source,
            "files": stamps,
        },
        indent=1,
    )
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    # A directory that may not be written to only costs the digest again at the next start.
    with contextlib.suppress(OSError):
        scratch.write_text(text)
        scratch.replace(path)
