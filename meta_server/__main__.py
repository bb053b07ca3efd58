"""`python -m meta_server`: one meta server, configured by flags, environment and file."""

from __future__ import annotations

import sys

from meta_server.server import serve
from stratakv.process import run_service


def main() -> int:
    """The process's exit status."""
    return run_service("meta_server", "StrataKV meta server: where every KV block lies.", ("meta", "database"), serve)


if __name__ == "__main__":
    sys.exit(main())
