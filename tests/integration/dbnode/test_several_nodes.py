"""DB nodes side by side over the same workers, behind a balancer that sends to whichever says that it is ready."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import openai

from tests.integration.dbnode.running_node import RunningNode, running_node
from tests.stand_in_worker import MODEL, StandInWorker
from tests.support import eventually_async

NUM_REQUESTS = 12


@asynccontextmanager
async def balancer(*nodes: RunningNode) -> AsyncIterator[openai.AsyncOpenAI]:
    """Each connection goes to the next one that is ready; a client through it."""
    turns = itertools.cycle(nodes)

    async def next_ready() -> RunningNode:
        async with aiohttp.ClientSession() as http:
            while True:
                node = next(turns)
                async with http.get(f"{node.url}/ready") as answer:
                    if answer.status == 200:
                        return node

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        node = await next_ready()
        host, _, port = node.url.removeprefix("http://").rpartition(":")
        to_node = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, to_node[1]), copy(to_node[0], writer), return_exceptions=True)

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    # a connection for each request, so that each goes to the next one
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, default_headers={"Connection": "close"}
    )
    try:
        yield client
    finally:
        await client.close()
        server.close()


def num_taken(node: RunningNode) -> int:
    return len(node.node.inference.scheduler.decisions)


async def ask(client: openai.AsyncOpenAI) -> None:
    answers = [
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": f"{i}"}], max_tokens=4)
        for i in range(NUM_REQUESTS)
    ]
    assert all(answer.choices[0].message.content for answer in await asyncio.gather(*answers))


async def test_nodes_share_the_requests_and_one_that_drains_gets_no_more() -> None:
    worker = await StandInWorker("w").start()
    async with running_node(worker) as one, running_node(worker) as other, balancer(one, other) as client:
        await ask(client)
        assert num_taken(one) == num_taken(other) == NUM_REQUESTS // 2
        one.node.inference.draining = True
        await ask(client)
        assert (num_taken(one), num_taken(other)) == (NUM_REQUESTS // 2, NUM_REQUESTS // 2 + NUM_REQUESTS)
        await eventually_async(lambda: one.node.inference.in_flight == 0)
        assert len(worker.requests) == 2 * NUM_REQUESTS
    await worker.stop()
