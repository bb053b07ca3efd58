"""`python -m dbnode`: one DB node."""

import sys

from dbnode.service import serve
from stratakv.process import run_service

if __name__ == "__main__":
    sys.exit(
        run_service(
            "stratakv serve dbnode",
            "The DB node: SQL and OpenAI-compatible REST on one side, workers on the other.",
            ("sql", "rest", "router", "meta", "database", "model", "pool"),
            serve,
        )
    )
