"""ReportEvent and what GetHostCacheState makes of it, with every kind of event and every answer, over both transports."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.meta_server.kvcm.conftest import Register
from tests.kvcm_clients import Client
from tests.support import eventually_async

HOST = "10.0.0.1:8000"
REGISTER = {"event_type": "EVENT_NODE_REGISTER", "node_register": {"mediums": ["mem", "disk"]}}
HEARTBEAT = {"event_type": "EVENT_HEARTBEAT", "heartbeat": {"system_status": {"load": "1"}}}
DOWN = {"event_type": "EVENT_HOST_DOWN", "host_down": {}}


def add(key: object, medium: str = "mem", *specs: str) -> dict[str, Any]:
    named = [{"name": name, "uri": f"mem://{name}"} for name in specs]
    return {"event_type": "EVENT_BLOCK_ADD", "block_add": {"block_key": str(key), "medium": medium, "specs": named}}


def delete(key: object, medium: str = "mem", *specs: str) -> dict[str, Any]:
    fields = {"block_key": str(key), "medium": medium, "spec_names": list(specs)}
    return {"event_type": "EVENT_BLOCK_DELETE", "block_delete": fields}


def snapshot(medium: str, *keys: int) -> dict[str, Any]:
    blocks = [{"block_key": str(key), "medium": medium} for key in keys]
    return {"event_type": "EVENT_BLOCK_SNAPSHOT", "block_snapshot": {"medium": medium, "blocks": blocks}}


async def report(client: Client, instance: str, *events: dict[str, Any], host: str = HOST) -> dict[str, Any]:
    return await client.call("ReportEvent", instance_id=instance, host_ip_port=host, events=list(events))


async def taken(client: Client, instance: str, *events: dict[str, Any], host: str = HOST) -> dict[str, Any]:
    answer = await report(client, instance, *events, host=host)
    assert answer["header"]["status"]["code"] == "OK", answer
    assert answer["item_results"] == []
    return answer


async def hosts(client: Client, instance: str, *keys: int, medium: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Host → local, fetch, total."""
    answer = await client.ok(
        "GetHostCacheState", instance_id=instance, block_cache_keys=list(keys), medium=list(medium)
    )
    numbers = ("local", "p2p_1_fetch", "p2p_1_total_match")
    return {host["host_ip_port"]: tuple(int(host[name]) for name in numbers) for host in answer["hosts"]}


async def test_a_router_sees_what_each_host_has(client: Client, register: Register) -> None:
    instance = await register()
    other = "10.0.0.2:8000"
    await taken(client, instance, REGISTER, add(1), add(2), add(3, "disk"), HEARTBEAT)
    await taken(client, instance, REGISTER, add(1), add(4), host=other)
    assert await hosts(client, instance, 1, 2, 3, 4, 5) == {HOST: (3, 1, 4), other: (1, 2, 4)}
    assert await hosts(client, instance, 1, 2, 3, 4, medium=("mem",)) == {HOST: (2, 0, 2), other: (1, 1, 2)}
    assert await hosts(client, instance, 9, 1) == {}
    await taken(client, instance, delete(2))
    assert await hosts(client, instance, 1, 2, 3) == {HOST: (1, 0, 1), other: (1, 0, 1)}
    await taken(client, instance, DOWN)
    assert await hosts(client, instance, 1, 4) == {other: (2, 0, 2)}
    assert await hosts(client, await register(), 1) == {}, "instances know nothing of each other"


async def test_a_block_counts_when_all_specs_of_it_or_of_a_group_are_there(client: Client, register: Register) -> None:
    instance = await register()
    await taken(client, instance, REGISTER, add(1, "mem", "tp1"))
    assert await hosts(client, instance, 1) == {}
    await taken(client, instance, add(1, "mem", "tp0"))
    assert await hosts(client, instance, 1) == {HOST: (1, 0, 1)}
    await taken(client, instance, delete(1, "mem", "tp1"))
    assert await hosts(client, instance, 1) == {HOST: (1, 0, 1)}, "the group `first` has tp0 only"
    await taken(client, instance, delete(1, "mem", "tp0"))
    assert await hosts(client, instance, 1) == {}


async def test_a_snapshot_is_all_that_a_host_has(client: Client, register: Register) -> None:
    instance = await register()
    await taken(client, instance, REGISTER, add(1), add(2, "disk"))
    answer = await taken(client, instance, snapshot("mem", 3, 2))
    assert answer["committed_snapshot_version"] == "1"
    assert await hosts(client, instance, 2, 3) == {HOST: (2, 0, 2)}
    assert await hosts(client, instance, 1) == {}
    fast = await report(client, instance, snapshot("mem", 1))
    assert fast["header"]["status"]["code"] == "SNAPSHOT_RATE_LIMITED"
    assert 0 < int(fast["retry_after_ms"]) <= 1000

    async def is_taken() -> bool:
        return (await report(client, instance, snapshot("mem", 1)))["header"]["status"]["code"] == "OK"

    await eventually_async(is_taken)
    assert await hosts(client, instance, 1, 2) == {HOST: (2, 0, 2)}


@pytest.mark.parametrize("event", [HEARTBEAT, add(1), delete(1), snapshot("mem", 1)])
async def test_a_host_that_is_not_known_is_told_to_begin_anew(
    client: Client, register: Register, event: dict[str, Any]
) -> None:
    answer = await report(client, await register(), event)
    assert answer["header"]["status"]["code"] == "NODE_NOT_REGISTERED"
    assert answer["snapshot_required"] is True


async def test_of_each_event_is_told_whether_it_was_taken(client: Client, register: Register) -> None:
    instance = await register()
    events = [REGISTER, add("x"), add(1 << 63), add(5), {"event_type": "EVENT_UNSPECIFIED"}, {"event_type": 99}]
    answer = await report(client, instance, *events)
    assert answer["header"]["status"]["code"] == "OK"
    bad = "INVALID_ARGUMENT"
    assert answer["item_results"] == ["OK", bad, bad, "OK", bad, bad]
    assert await hosts(client, instance, 5) == {HOST: (1, 0, 1)}
    assert (await report(client, instance, add("x")))["header"]["status"]["code"] == bad


async def test_requests_that_make_no_sense_are_refused(client: Client, register: Register) -> None:
    instance = await register()
    assert await client.code("ReportEvent", instance_id="nobody", host_ip_port=HOST) == "INSTANCE_NOT_EXIST"
    assert await client.code("ReportEvent", instance_id=instance, host_ip_port=HOST) == "INVALID_ARGUMENT"
    assert await client.code("ReportEvent", instance_id=instance, events=[REGISTER]) == "INVALID_ARGUMENT"
    own = f"stratakv-{'00' * 16}"
    assert await client.code("ReportEvent", instance_id=own, host_ip_port=HOST, events=[REGISTER]) == "UNSUPPORTED"
    mixed = snapshot("mem", 1)
    mixed["block_snapshot"]["blocks"][0]["medium"] = "disk"
    assert (await report(client, instance, REGISTER, mixed))["item_results"] == ["OK", "INVALID_ARGUMENT"]


async def test_what_was_reported_goes_with_its_instance(client: Client, register: Register) -> None:
    instance = await register()
    await taken(client, instance, REGISTER, add(1))
    await client.ok("RemoveInstance", "admin", instance_group="default", instance_id=instance)
    await register(instance_id=instance)
    assert await hosts(client, instance, 1) == {}
