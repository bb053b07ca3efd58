"""The command line against a meta server of a test."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def stratakv(meta_port: int, data_dir: Path, *arguments: str, timeout_s: float = 60) -> Done:
    """`stratakv ARGUMENTS`, which finds no `stratakv up` running."""
    sets = (f"meta.native_port={meta_port}", f"up.data_dir={data_dir}")
    command = [sys.executable, "-m", "stratakv.cli", *arguments, *(f"--set={one}" for one in sets)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())
