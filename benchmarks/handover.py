"""handover: from a prompt's first token to its second, when one worker computes it and another one generates.

Prompts of about 3,000 tokens that nothing is known of, on a prefill and a decode worker with a daemon of its own each, asked as
a DB node asks them. Followed: the decode worker is asked at the same time, loads each layer of the prompt's KV as it is
written, and goes on from the first token. Afterwards: it is asked when the prompt's blocks can be found in the pool. Alone: one
worker does both, which is the least there can be. All three in turns, on the same processes.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.harness import Spread, parse_options, report
from stratakv.up.instance import scratch_instance

PROMPT_TOKENS = 3000
OUTPUT_TOKENS = 4
RUNS, RUNS_QUICK = 15, 3
TIMEOUT_S = 120.0
WORKERS = ("--prefill-workers", "1", "--decode-workers", "1")


@dataclass(frozen=True, slots=True)
class Times:
    """Of one answer, from when it was asked for."""

    first_s: float
    second_s: float
    tiers: dict[str, int]
    """Of the worker that gave the second token."""

    @property
    def gap_s(self) -> float:
        return self.second_s - self.first_s


class Bench:
    """The two workers."""

    def __init__(self, session: aiohttp.ClientSession, prefill: str, decode: str, rng: random.Random) -> None:
        self._session = session
        self._prefill = prefill
        self._decode = decode
        self._rng = rng
        self._count = 0

    async def followed(self) -> Times:
        prompt, name = self._prompt()
        asked = {"do_remote_decode": True, "is_followed": True}
        following = {"do_remote_prefill": True, "remote_url": self._prefill, "remote_request_id": name}
        started = time.perf_counter()
        decoding = asyncio.create_task(self._ask(self._decode, f"{name}-d", prompt, OUTPUT_TOKENS, following))
        first_at, _, _ = await self._ask(self._prefill, name, prompt, 1, asked)
        second_at, tiers, _ = await decoding
        return Times(first_at - started, second_at - started, tiers)

    async def afterwards(self) -> Times:
        prompt, name = self._prompt()
        started = time.perf_counter()
        first_at, _, (handover, token_ids) = await self._ask(self._prefill, name, prompt, 1, {"do_remote_decode": True})
        if not handover.get("do_remote_prefill"):
            raise SystemExit("the prompt did not get into the pool")
        transfer = handover | {"output_token_ids": token_ids}
        second_at, tiers, _ = await self._ask(self._decode, f"{name}-d", prompt, OUTPUT_TOKENS, transfer)
        return Times(first_at - started, second_at - started, tiers)

    async def alone(self) -> Times:
        prompt, name = self._prompt()
        started = time.perf_counter()
        times: list[float] = []
        tiers: dict[str, int] = {}
        async with aclosing(self._events(self._prefill, name, prompt, OUTPUT_TOKENS, {})) as events:
            async for at, event in events:
                times += [at] * sum(len(choice["token_ids"]) for choice in event["choices"])
                tiers = event.get("usage", {}).get("stratakv", tiers)
        return Times(times[0] - started, times[1] - started, tiers)

    def _prompt(self) -> tuple[list[int], str]:
        self._count += 1
        return [self._rng.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)], f"bench-{self._count}"

    async def _ask(
        self, url: str, name: str, prompt: list[int], max_tokens: int, transfer: dict[str, Any]
    ) -> tuple[float, dict[str, int], tuple[dict[str, Any], list[int]]]:
        """When the first of its tokens came, where the prompt's KV came from, and what is handed over."""
        first_at = 0.0
        tiers: dict[str, int] = {}
        handover: dict[str, Any] = {}
        token_ids: list[int] = []
        async with aclosing(self._events(url, name, prompt, max_tokens, transfer)) as events:
            async for at, event in events:
                for choice in event["choices"]:
                    token_ids += choice["token_ids"]
                first_at = first_at or (at if token_ids else 0.0)
                tiers = event.get("usage", {}).get("stratakv", tiers)
                handover = event.get("kv_transfer_params", handover)
        return first_at, tiers, (handover, token_ids)

    async def _events(
        self, url: str, name: str, prompt: list[int], max_tokens: int, transfer: dict[str, Any]
    ) -> AsyncGenerator[tuple[float, dict[str, Any]], None]:
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "request_id": name,
            "kv_transfer_params": transfer,
        }
        async with self._session.post(f"{url}/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise SystemExit(f"{url}: {event['error']}")
                    yield time.perf_counter(), event


async def measure(prefill: str, decode: str, runs: int, rng: random.Random) -> dict[str, list[Times]]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        bench = Bench(session, prefill, decode, rng)
        arms: list[Callable[[], Awaitable[Times]]] = [bench.followed, bench.afterwards, bench.alone]
        for arm in arms:
            await arm()
        times: dict[str, list[Times]] = {"followed": [], "afterwards": [], "alone": []}
        for run in range(runs):
            order = run % len(arms)
            for arm in arms[order:] + arms[:order]:
                times[arm.__name__].append(await arm())
    return times


def figures(times: list[Times]) -> dict[str, Any]:
    return {
        "first_to_second_token_ms": Spread.of([t.gap_s * 1e3 for t in times]).as_json(1),
        "second_token_ms": Spread.of([t.second_s * 1e3 for t in times]).as_json(1),
        "tiers": {tier: times[-1].tiers.get(tier, 0) for tier in ("computed", "l1", "l2", "pool")},
    }


def main() -> int:
    options = parse_options(__doc__)
    runs = RUNS_QUICK if options.quick else RUNS
    with scratch_instance(*WORKERS, quiet=options.json) as instance:
        services = instance.state["services"]
        prefill, decode = (str(services[name]["url"]) for name in ("prefill-0", "decode-0"))
        times = asyncio.run(measure(prefill, decode, runs, random.Random(options.seed)))
    found = {name: figures(of_arm) for name, of_arm in times.items()}
    gaps = {name: of_arm["first_to_second_token_ms"]["median"] for name, of_arm in found.items()}
    report(
        "handover",
        {"dtype": "bf16", "prompt_tokens": PROMPT_TOKENS, "quick": options.quick, "seed": options.seed},
        found["followed"],
        {"afterwards": found["afterwards"], "alone": found["alone"]},
        {
            "first_to_second_token_afterwards_over_followed": round(gaps["afterwards"] / gaps["followed"], 2),
            "first_to_second_token_followed_over_alone": round(gaps["followed"] / gaps["alone"], 2),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
