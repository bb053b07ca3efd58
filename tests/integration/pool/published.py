"""Pages that the meta server knows: a whole put with a real daemon, and reading it back from wherever it lies."""

from __future__ import annotations

import asyncio

from stratakv.errors import StrataError
from stratakv.keys import BlockKey, pack_keys
from stratakv.layout import KVLayout
from stratakv.pool.dmp_client import connect
from stratakv.pool.meta_client import MetaClient
from stratakv.pool.pages import PageReader
from stratakv.wire import Done, ListNodes, Match, MatchPrefix, Nodes, PutEnd, PutGrant, PutStart, ReleaseLease
from tests.integration.pool.daemon import DaemonProcess
from tests.integration.pool.pages import LAYOUT, NAMESPACE, WrittenPages, empty_memory, layer_data, soon, write_pages
from tests.support import eventually_async


async def listed(client: MetaClient, *nodes: str) -> None:
    """Wait until exactly these segments are in the pool."""

    async def are_listed() -> bool:
        try:
            found = (await client.call(ListNodes(), Nodes)).nodes
        except StrataError:
            return False
        return {state.segment.node for state in found} == set(nodes)

    await eventually_async(are_listed, timeout_s=20, what=f"{nodes} to be listed")


async def publish(
    client: MetaClient,
    daemon: DaemonProcess,
    num_pages: int,
    *,
    seed: int = 0,
    layout: KVLayout = LAYOUT,
    owner: int = 0,
) -> WrittenPages:
    """Pages on this daemon that can be found."""
    connection = connect(daemon.segment, deadline=soon())
    written = await asyncio.to_thread(write_pages, connection, num_pages, seed=seed, layout=layout)
    connection.close()
    keys = pack_keys(written.keys)
    node = daemon.segment.node
    request = PutStart(
        written.put_id, NAMESPACE, keys, layout.page_bytes, layout.page_tokens, prefer_node=node, owner=owner
    )
    grant = await client.call(request, PutGrant)
    assert grant.segment is not None
    assert grant.segment.node == node
    await client.call(PutEnd(written.put_id, daemon.segment.epoch, written.extents), Done)
    return written


async def read(client: MetaClient, keys: list[BlockKey]) -> Match:
    """What is found, counted as reading; the lease is given back."""
    match = await client.call(MatchPrefix(NAMESPACE, pack_keys(keys), 5.0), Match)
    await client.call(ReleaseLease(match.lease_id), Done)
    return match


def data_at(match: Match, keys: list[BlockKey]) -> list[list[tuple[bytes, ...]]]:
    """[page][layer]: verified bytes of all pages, on whatever segments they lie."""
    segments = {segment.node: segment for segment in match.segments}
    all_places = match.places()
    found: dict[int, list[tuple[bytes, ...]]] = {}
    for node, segment in segments.items():
        mine = [i for i, place in enumerate(all_places) if place.node == node]
        connection = connect(segment, deadline=soon())
        places, wanted = [all_places[i] for i in mine], [keys[i] for i in mine]
        pages = PageReader(LAYOUT, NAMESPACE).read_headers(connection, places, wanted, deadline=soon())
        assert not pages.failures
        memory, layers = empty_memory(LAYOUT, len(mine)), range(len(LAYOUT.layers))
        pages.read_layers(layers, memory, deadline=soon())
        connection.close()
        by_layer = [layer_data(memory, layer) for layer in layers]
        found.update({i: [layer[at] for layer in by_layer] for at, i in enumerate(mine)})
    return [found[i] for i in range(len(keys))]


def data_of(written: WrittenPages) -> list[list[tuple[bytes, ...]]]:
    """[page][layer], as they were written."""
    return [[layer[page] for layer in written.data] for page in range(len(written.keys))]
