"""What every benchmark shares: options, prompts, medians, and the one JSON line at the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COMMON = (
    "the of and to in is was for on that with as it be at by this had not are but from or have an they "
    "which one you were all her she there would their we him been has when who will no more if out so up "
    "said what its about than into them can only other time new some could these two may first then do "
    "any like my now over such our man me even most made after also did many off before must well back "
    "through years much where your way down should because long each just state those people too mr how "
    "little good world make very year still see own work men day get here old life both between being "
    "under three never know same last another while us might great go come since against right came take "
)
_WORDS = tuple(word for word in _COMMON.split(" ") if word)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of several runs."""

    median: float
    min: float
    max: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def as_json(self, digits: int = 3) -> dict[str, Any]:
        return {
            "median": round(self.median, digits),
            "min": round(self.min, digits),
            "max": round(self.max, digits),
            "runs": self.runs,
        }


def parse_options(description: str | None, add: Any = None) -> argparse.Namespace:
    """`--json` (only the JSON line on standard output), `--quick`, `--seed`, and what `add(parser)` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under 60 s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    if add is not None:
        add(parser)
    return parser.parse_args()


def note(message: str) -> None:
    """Progress of a long run, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def report(
    bench: str, settings: dict[str, Any], ours: dict[str, Any], baseline: dict[str, Any], ratio: dict[str, Any]
) -> None:
    """The last line of output."""
    line = {
        "bench": bench,
        "machine": machine(),
        "settings": settings,
        "ours": ours,
        "baseline": baseline,
        "ratio": ratio,
    }
    print(json.dumps(line), flush=True)


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text()
    return {"cpu": model, "cores": os.cpu_count(), "amx_bf16": "amx_bf16" in flags, "python": platform.python_version()}


def words(count: int, rng: random.Random) -> str:
    """Common English words, close to one token each."""
    return " ".join(rng.choices(_WORDS, k=count))
