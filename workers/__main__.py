"""`python -m workers`: one inference worker."""

import sys

from stratakv.process import run_service
from workers.service import serve

if __name__ == "__main__":
    sys.exit(
        run_service(
            "stratakv serve worker",
            "An inference worker: prefill, decode or both.",
            ("worker", "model", "meta", "pool"),
            serve,
        )
    )
