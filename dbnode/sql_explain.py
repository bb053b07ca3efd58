"""What the prompts of a statement would cost, without running the model: tokens, what is cached of them, time.

Asked by the SQL face for `stratakv.explain()`. Tokens and keys are computed off the event loop, some prompts at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

from dbnode.generate import GenerateRequest
from dbnode.inference import InferenceService
from dbnode.scheduler.cost import DECODE_TOKENS_MAX
from dbnode.scheduler.planner import PromptKeys
from dbnode.sql.explain import Estimate
from dbnode.sql.service import InferCall
from dbnode.sql_inference import caller_of, request_of
from dbnode.tenants.directory import Directory
from stratakv.keys import BlockKey

BATCH_PROMPTS = 64
POOL_ASKED_MAX = 256
"""Prompts about which the pool is asked, each a message; of the others only what workers hold themselves counts."""
AT_ONCE = 64
"""Inferences of a statement that run at a time."""


class SqlExplainer:
    """Implements `dbnode.sql.explain.Explainer`."""

    def __init__(self, service: InferenceService, directory: Directory) -> None:
        self._service = service
        self._directory = directory

    async def estimate(self, calls: Sequence[InferCall]) -> Estimate:
        """Raises InvalidRequest, ModelNotFound, PermissionDenied."""
        ordered = sorted(calls, key=lambda call: call.prompt)
        lengths: list[int] = []
        seen: set[BlockKey] = set()
        cached = shared = computed = steps = 0
        for start in range(0, len(ordered), BATCH_PROMPTS):
            requests = [
                request_of(call, caller_of(call, self._directory)) for call in ordered[start : start + BATCH_PROMPTS]
            ]
            for request, keys in zip(requests, await self._service.prompt_keys(requests), strict=True):
                known = await self._cached(keys, ask_pool=len(lengths) < POOL_ASKED_MAX)
                both = max(known, self._shared(keys, seen))
                length = len(keys.token_ids)
                lengths.append(length)
                cached += known
                shared += both - known
                computed += max(1, length - both)
                steps += _decode_steps(request)
        return Estimate(
            prompt_tokens=sum(lengths),
            prompt_tokens_median=median_low(lengths) if lengths else 0,
            prompt_tokens_max=max(lengths, default=0),
            cached_tokens=cached,
            shared_tokens=shared,
            estimated_s=self._service.scheduler.forecast_s(
                self._service.model, computed, steps, min(AT_ONCE, len(lengths))
            ),
        )

    async def _cached(self, keys: PromptKeys, *, ask_pool: bool) -> int:
        found = await self._service.scheduler.cached_tokens(self._service.model, keys, ask_pool=ask_pool)
        return min(found, len(keys.token_ids) - 1)

    def _shared(self, keys: PromptKeys, seen: set[BlockKey]) -> int:
        """Leading tokens that earlier prompts have too; the prompt is among them then."""
        size = self._block_size()
        blocks = keys.of_size(size) if size else []
        num_shared = next((number for number, key in enumerate(blocks) if key not in seen), len(blocks))
        seen.update(blocks)
        return min(num_shared * size, len(keys.token_ids) - 1)

    def _block_size(self) -> int:
        """Of some worker: they differ in rare fleets only."""
        records = self._service.scheduler.directory.usable(self._service.model)
        return records[0].facts.block_size if records and records[0].facts is not None else 0


def _decode_steps(request: GenerateRequest) -> int:
    return min(request.sampling.max_tokens or DECODE_TOKENS_MAX, DECODE_TOKENS_MAX)
