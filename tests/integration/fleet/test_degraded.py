"""Promises P1 and P7 on real processes: what is damaged or gone is recomputed, and caching comes back by itself."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedTokenizerBase

from stratakv.pool.connections import ConnectionCache
from tests.integration.fleet.conftest import Pool
from tests.integration.fleet.processes import Worker
from tests.integration.fleet.test_reuse import OUTPUT_TOKENS, prompt_of
from tests.support import eventually
