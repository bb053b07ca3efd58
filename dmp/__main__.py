"""`python -m dmp`: run one memory-pool daemon."""

from __future__ import annotations

import sys

from dmp.service import serve
from stratakv.process import run_service

if __name__ == "__main__":
    sys.exit(run_service("stratakv serve dmp", "A memory-pool daemon of StrataKV.", ("dmp", "meta", "pool"), serve))
