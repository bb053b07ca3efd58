"""meta: the meta server against Mooncake's master, looking up prefixes, and its own figures that nobody else publishes alike.

Both run here, in one run, interleaved. Ours tells of every key where it lies and pins it; `batch_is_exist` of Mooncake's client
tells only whether it is there. Beside that: GetHostCacheState over HTTP, two-phase writes of large batches until they are in
PostgreSQL, and memory, rebuilding and lookups as the index grows to a million blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import uvloop

from benchmarks import mooncake
from benchmarks.harness import Spread, parse_options, report
from benchmarks.meta_pool import NAMESPACE, HostStates, MetaServer, Pool, running_meta
from stratakv.keys import KEY_BYTES
from stratakv.pool.meta_client import MetaClient
from stratakv.wire import Done, Match, MatchPrefix, ReleaseLease

LOOKUP_KEYS = (400, 5000)
HOST_STATE_KEYS = (100, 1000, 5000, 20_000)
PUBLISHED_HOST_STATE_MS = {100: 0.49, 1000: 0.89, 5000: 2.57, 20_000: 8.52}
BATCH_BLOCKS = 10_000
STEPS = (10_000, 100_000, 1_000_000)
MOONCAKE_VALUE_BYTES = 64
MOONCAKE_BATCH = 200
MOONCAKE_SEGMENT_BYTES = 256 * 1024 * 1024
LEASE_S = 30.0


class OurLookups:
    """Whole prefixes, with places and a lease each."""

    def __init__(self, client: MetaClient) -> None:
        self._client = client

    async def lookup(self, keys: bytes) -> float:
        """Seconds until the places are here; the lease is given back outside the time."""
        began = time.perf_counter()
        match = await self._client.call(MatchPrefix(NAMESPACE, keys, LEASE_S), Match)
        seconds = time.perf_counter() - began
        assert match.num_blocks * KEY_BYTES == len(keys), "a block that was put was not found"
        assert len(match.extents) == 16 * match.num_blocks
        await self._client.call(ReleaseLease(match.lease_id), Done)
        return seconds


class MooncakeLookups:
    """`batch_is_exist` of keys that are there."""

    def __init__(self, store: Any, num_keys: int, num_prefixes: int) -> None:
        self._store = store
        self.prefixes = [[f"{p:08x}-{i:024x}" for i in range(num_keys)] for p in range(num_prefixes)]
        for prefix in self.prefixes:
            for at in range(0, num_keys, MOONCAKE_BATCH):
                part = prefix[at : at + MOONCAKE_BATCH]
                if store.put_batch(part, [bytes(MOONCAKE_VALUE_BYTES)] * len(part)):
                    raise SystemExit("Mooncake did not take the batch.")

    def lookup(self, prefix: Sequence[str]) -> float:
        began = time.perf_counter()
        found = self._store.batch_is_exist(prefix)
        seconds = time.perf_counter() - began
        assert all(state == 1 for state in found), "a key that was put was not found"
        return seconds


def prefix_of(pool: Pool, rng: random.Random, num_keys: int) -> bytes:
    """So many consecutive keys of one put."""
    keys = rng.choice(pool.keys)
    first = rng.randrange(len(keys) // KEY_BYTES - num_keys + 1)
    return keys[first * KEY_BYTES : (first + num_keys) * KEY_BYTES]


async def lookups_against_mooncake(pool: Pool, rng: random.Random, rounds: int, repeats: int) -> dict[int, Any]:
    """Number of keys → per round, medians in ms of both sides, interleaved."""
    found: dict[int, Any] = {}
    with mooncake.running_store(MOONCAKE_SEGMENT_BYTES) as master:
        store = mooncake.client(master)
        for num_keys in LOOKUP_KEYS:
            theirs, ours = MooncakeLookups(store, num_keys, 8), OurLookups(pool.client)
            medians: list[tuple[float, float]] = []
            for turn in range(rounds + 1):
                our_s, their_s = [], []
                for _ in range(repeats):
                    their_s.append(theirs.lookup(rng.choice(theirs.prefixes)))
                    our_s.append(await ours.lookup(prefix_of(pool, rng, num_keys)))
                if turn:  # the first warms both up
                    medians.append((statistics.median(our_s) * 1e3, statistics.median(their_s) * 1e3))
            found[num_keys] = medians
        store.close()
    return found


async def lookup_percentiles(pool: Pool, rng: random.Random, repeats: int) -> dict[str, float]:
    """Of 400 keys, in ms."""
    ours = OurLookups(pool.client)
    seconds = sorted([await ours.lookup(prefix_of(pool, rng, 400)) for _ in range(repeats)])
    return {
        "p50_ms": round(seconds[len(seconds) // 2] * 1e3, 3),
        "p99_ms": round(seconds[-len(seconds) // 100] * 1e3, 3),
    }


def host_states(server: MetaServer, pool: Pool, rounds: int, repeats: int) -> dict[int, list[float]]:
    """Number of keys → per round, the median in ms."""
    states, found = HostStates(server), {}
    keys = b"".join(pool.keys[: -(-HOST_STATE_KEYS[-1] // BATCH_BLOCKS)])
    for num_keys in HOST_STATE_KEYS:
        body = states.request(keys[: num_keys * KEY_BYTES])
        medians = []
        for _ in range(rounds + 1):
            seconds = []
            for _ in range(repeats):
                began = time.perf_counter()
                answer = states.ask(body)
                seconds.append(time.perf_counter() - began)
            assert [host["local"] for host in answer["hosts"]] == [str(num_keys)], answer
            medians.append(statistics.median(seconds) * 1e3)
        found[num_keys] = medians[1:]
    states.close()
    return found


async def measure(options: argparse.Namespace) -> None:
    rng = random.Random(options.seed)
    rounds, repeats = (3, 30) if options.quick else (7, 100)
    steps = STEPS[:2] if options.quick else STEPS
    with running_meta() as server:
        pool = Pool(await server.client())
        await pool.open()
        empty_bytes, writes, by_size = server.resident_bytes(), [], {}
        for size in steps:
            while len(pool.keys) * BATCH_BLOCKS < size:
                writes.append(await pool.put(BATCH_BLOCKS))
            await asyncio.to_thread(server.settle)
            by_size[size] = await lookup_percentiles(pool, rng, 10 * repeats)
        bytes_per_block = (server.resident_bytes() - empty_bytes) / steps[-1]
        versus = await lookups_against_mooncake(pool, rng, rounds, repeats)
        hosts = await asyncio.to_thread(host_states, server, pool, rounds, repeats)
        server.stop()
        server.start()
        client = await server.client()
        pool.client = client
        assert await pool.num_blocks() == steps[-1], "blocks were lost in the restart"
        rebuild_s = server.rebuild_s()
    ratios = {n: Spread.of([ours / theirs for ours, theirs in medians]) for n, medians in versus.items()}
    writes.sort()
    report(
        "meta",
        {"quick": options.quick, "seed": options.seed, "batch_blocks": BATCH_BLOCKS, "rounds": rounds},
        {
            **{f"lookup_{n}_ms": Spread.of([ours for ours, _ in m]).as_json() for n, m in versus.items()},
            **{f"host_state_ms_{n}": Spread.of(medians).as_json() for n, medians in hosts.items()},
            "two_phase_blocks_per_s": round(len(writes) * BATCH_BLOCKS / sum(writes)),
            "two_phase_batch_ms": {
                "p50": round(statistics.median(writes) * 1e3, 1),
                "p99": round(writes[-(-len(writes) * 99 // 100) - 1] * 1e3, 1),
            },
            "blocks": steps[-1],
            "bytes_per_block": round(bytes_per_block, 1),
            "rebuild_s_1m" if steps[-1] == 1_000_000 else "rebuild_s": rebuild_s,
            "lookup_400_by_blocks": {str(size): figures for size, figures in by_size.items()},
        },
        {
            "mooncake": mooncake.version(),
            **{f"lookup_{n}_ms": Spread.of([theirs for _, theirs in m]).as_json() for n, m in versus.items()},
            "published_host_state_ms": {str(n): ms for n, ms in PUBLISHED_HOST_STATE_MS.items()},
        },
        {
            **{f"lookup_{n}_ours_over_mooncake": round(ratio.median, 3) for n, ratio in ratios.items()},
            **{
                f"host_state_{n}_ours_over_published": round(statistics.median(hosts[n]) / ms, 3)
                for n, ms in PUBLISHED_HOST_STATE_MS.items()
            },
        },
    )


def main() -> int:
    options = parse_options(__doc__)
    mooncake.require()
    os.environ.update(mooncake.ENVIRONMENT)
    gc.disable()
    uvloop.run(measure(options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
