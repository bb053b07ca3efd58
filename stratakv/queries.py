"""Named SQL: a `queries.sql` beside a package's code, each query under `-- name: …` and a comment that describes it."""

from __future__ import annotations

import re
from importlib.resources import files

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load_queries(package: str, file_name: str = "queries.sql") -> dict[str, str]:
    """Name → SQL of a package's query file. Raises ValueError if a name stands twice."""
    _, *parts = _NAME.split((files(package) / file_name).read_text())
    names, texts = parts[::2], parts[1::2]
    if len(set(names)) < len(names):
        raise ValueError(f"{package}/{file_name} names a query twice")
    return dict(zip(names, (text.strip() for text in texts), strict=True))
