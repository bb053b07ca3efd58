"""The cache directory of models: `CACHE/models/NAME`, each made whole in a temporary directory and then renamed."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from stratakv.errors import SetupError
from stratakv.models.identity import model_identity

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in total); the total is 0 while unknown."""

DEFAULT_MODEL = "smollm2-135m"
HUB_PREFIX = "hf://"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "LICENSE*"]


def pull(source: str, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Make the model named `source` available locally and return its directory. Safe to repeat; fetches once.

    `source` is `smollm2-135m`, `hf://org/name` or a local directory. Raises SetupError if it cannot be had.
    """
    report = progress or _report_nothing
    target = _directory(source, cache_dir)
    if not (_is_model(target) or _is_path(source)):
        target.parent.mkdir(parents=True, exist_ok=True)
        _install(source, target, report)
    report("checking", 0, 1)
    model_identity(target, source=None if _is_path(source) else source)
    report("checking", 1, 1)
    return target


def resolve(name: str, cache_dir: Path) -> Path:
    """Directory of a model that was pulled, or of a local directory. Never goes to the network.

    Raises SetupError that says how to fetch it.
    """
    directory = _directory(name, cache_dir)
    if _is_model(directory):
        return directory
    if _is_path(name):
        raise SetupError(f"{directory} is not a model directory: it has no config.json.")
    raise SetupError(
        f"Model {name!r} is not in {cache_dir / 'models'}.", hint=f"Fetch it with `stratakv model pull {name}`."
    )


def list_models(cache_dir: Path) -> list[str]:
    """Names that `resolve` finds in the cache directory, sorted."""
    directories = (path for path in (cache_dir.expanduser() / "models").glob("*") if _is_model(path))
    return sorted(_name(path) for path in directories)


def _directory(name: str, cache_dir: Path) -> Path:
    cache_dir = cache_dir.expanduser()
    if _is_path(name):
        return Path(name).expanduser()
    if name == DEFAULT_MODEL:
        return cache_dir / "models" / name
    if name.startswith(HUB_PREFIX) and _HUB_NAME.fullmatch(name.removeprefix(HUB_PREFIX)):
        return cache_dir / "models" / name.removeprefix(HUB_PREFIX).replace("/", "--")
    raise SetupError(
        f"{name!r} names no model.",
        hint=f"Use {DEFAULT_MODEL}, {HUB_PREFIX}organisation/name, or a path such as ./model.",
    )


def _name(directory: Path) -> str:
    return HUB_PREFIX + directory.name.replace("--", "/", 1) if "--" in directory.name else directory.name


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) and not name.startswith(HUB_PREFIX)


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _install(source: str, target: Path, report: Progress) -> None:
    """Build the directory beside its final place, then rename: a reader sees all of it or nothing."""
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        if source == DEFAULT_MODEL:
            from stratakv.models.smollm2 import build_smollm2

            build_smollm2(made, Path(scratch), report)
        else:
            _download_from_hub(source.removeprefix(HUB_PREFIX), made, report)
        model_identity(made, source)
        try:
            made.rename(target)
        except OSError:
            if not _is_model(target):  # another process may have finished first: its copy is as good
                raise


def _download_from_hub(repository: str, target: Path, report: Progress) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    report("downloading", 0, 0)
    try:
        snapshot_download(repository, local_dir=target, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SetupError(
            f"{repository} could not be fetched from the Hugging Face hub: {error}",
            hint="Check the name, the network and HF_TOKEN, or name a local directory instead.",
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)
    report("downloading", 1, 1)


def _report_nothing(stage: str, done: int, total: int) -> None:
    """Progress for callers that show none."""


def served_name(name: str) -> str:
    """What clients call the model: the last part of a path or of hf://org/name. Raises SetupError."""
    served = name.rstrip("/").rsplit("/", 1)[-1]
    if not served:
        raise SetupError(f"model.name = {name!r} names no model")
    return served
