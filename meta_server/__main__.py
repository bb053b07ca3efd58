"""`python -m meta_server`: one meta server, configured by flags, environment and file."""

import sys

from meta_server.server import serve
from stratakv.process import run_service

if __name__ == "__main__":
    sys.exit(
        run_service(
            "stratakv serve meta",
            "StrataKV meta server: where every KV block lies.",
            ("meta", "database", "pool"),
            serve,
        )
    )
