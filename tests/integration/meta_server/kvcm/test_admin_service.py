"""AdminService over both transports: storages, groups and their limits, instances, health, metrics."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.meta_server.kvcm.conftest import Register
from tests.integration.meta_server.kvcm.test_meta_service import hits, paths, write
from tests.kvcm_clients import Client, KvcmProcess
from tests.meta_process import connected
from tests.support import eventually_async


def name() -> str:
    return uuid.uuid4().hex


async def add_storage(client: Client, root: Path, **fields: Any) -> str:
    storage = name()
    spec = {"root_path": str(root), "key_count_per_file": 2}
    config = {"global_unique_name": storage, "nfs": spec, "check_storage_available_when_open": True} | fields
    await client.ok("AddStorage", "admin", storage=config)
    return storage


async def add_group(client: Client, **fields: Any) -> dict[str, Any]:
    group = {"name": name(), "storage_candidates": ["nfs_01"]} | fields
    await client.ok("CreateInstanceGroup", "admin", instance_group=group)
    return group


async def test_there_is_a_storage_and_a_group_at_the_start(client: Client, server: KvcmProcess) -> None:
    storages = (await client.ok("ListStorage", "admin"))["storage"]
    (first,) = [storage for storage in storages if storage["global_unique_name"] == "nfs_01"]
    assert first["nfs"]["root_path"] == str(server.root)
    group = (await client.ok("GetInstanceGroup", "admin", name="default"))["instance_group"]
    assert group["max_instance_count"] == "100"
    assert group["quota"]["capacity"] == "30000000000"
    strategy = group["cache_config"]["reclaim_strategy"]
    assert strategy["reclaim_policy"] == "POLICY_LRU"
    assert strategy["trigger_strategy"]["used_percentage"] == 0.8
    assert group["cache_config"]["meta_indexer_config"]["max_key_count"] == "1000000"


async def test_storages_are_added_checked_disabled_changed_and_removed(
    client: Client, register: Register, tmp_path: Path
) -> None:
    storage = await add_storage(client, tmp_path)
    spec = {"root_path": str(tmp_path), "key_count_per_file": 2}
    same = {"global_unique_name": storage, "nfs": spec, "check_storage_available_when_open": True}
    await client.ok("AddStorage", "admin", storage=same)
    moved = same | {"nfs": {"root_path": str(tmp_path / "later"), "key_count_per_file": 2}}
    assert await client.code("AddStorage", "admin", storage=moved) == "DUPLICATE_ENTITY"
    assert await client.code("UpdateStorage", "admin", storage=moved) == "IO_ERROR"

    group = await add_group(client, storage_candidates=[storage])
    instance = await register(instance_group=group["name"])
    files = paths((await write(client, instance, [1, 2, 3]))["locations"])
    assert len(set(files)) == 4, "two blocks share a file"
    await client.ok("UpdateStorage", "admin", storage=moved, force_update=True)
    later = paths((await write(client, instance, [4]))["locations"])
    assert all(file.is_relative_to(tmp_path / "later") for file in later)
    assert await hits(client, instance, [1, 2, 3, 4]) == [2] * 4

    await client.ok("DisableStorage", "admin", storage_unique_name=storage)
    asked = {"instance_id": instance, "block_keys": [5]}
    assert await client.code("StartWriteCache", **asked) == "IO_ERROR"
    assert await hits(client, instance, [1]) == [2]
    await client.ok("EnableStorage", "admin", storage_unique_name=storage)
    await client.ok("StartWriteCache", **asked)

    assert await client.code("RemoveStorage", "admin", storage_unique_name=storage) == "INVALID_ARGUMENT"
    changed = group | {"storage_candidates": ["nfs_01"]}
    await client.ok("UpdateInstanceGroup", "admin", instance_group=changed, current_version=1)
    await client.ok("RemoveCache", instance_id=instance, block_keys=[1])
    assert files[0].exists(), "its other block is still there"
    await client.ok("RemoveStorage", "admin", storage_unique_name=storage)
    assert await hits(client, instance, [1, 2, 3, 4]) == [0] * 4
    await eventually_async(lambda: not any(file.exists() for file in [*files, *later]))


async def test_storages_that_cannot_be_used_are_refused(client: Client, tmp_path: Path) -> None:
    async def code(**fields: Any) -> str:
        return await client.code("AddStorage", "admin", storage={"global_unique_name": name()} | fields)

    assert await code() == "INVALID_ARGUMENT"
    assert await code(global_unique_name="", nfs={"root_path": str(tmp_path)}) == "INVALID_ARGUMENT"
    for root in ("relative", "/", f"{tmp_path}/../x", ""):
        assert await code(nfs={"root_path": root}) == "INVALID_ARGUMENT", root
    assert await code(mooncake={}) == "INVALID_ARGUMENT"
    for kind in ("tair_mem_pool", "local", "vcnsthreefs"):
        assert await code(**{kind: {}}) == "UNSUPPORTED"
    missing = {"root_path": str(tmp_path / "missing")}
    assert await code(nfs=missing, check_storage_available_when_open=True) == "IO_ERROR"
    for call in ("EnableStorage", "DisableStorage", "RemoveStorage"):
        assert await client.code(call, "admin", storage_unique_name="no") == "INVALID_ARGUMENT"


async def test_3fs_is_a_directory_on_a_mount_and_can_be_preferred(
    client: Client, register: Register, tmp_path: Path
) -> None:
    storage = name()
    spec = {"mountpoint": str(tmp_path), "root_dir": "kv", "cluster_name": "c"}
    await client.ok("AddStorage", "admin", storage={"global_unique_name": storage, "threefs": spec})
    cache = {"data_storage_strategy": "CPS_PREFER_3FS"}
    group = await add_group(client, storage_candidates=["nfs_01", storage], cache_config=cache)
    instance = await register(instance_group=group["name"])
    (location,) = (await write(client, instance, [1]))["locations"]
    assert location["type"] == "ST_3FS"
    assert location["location_specs"][0]["uri"].startswith(f"3fs://{tmp_path}/kv/")
    only = await add_group(client, cache_config={"data_storage_strategy": "CPS_ALWAYS_3FS"})
    asked = {"instance_id": await register(instance_group=only["name"]), "block_keys": [1]}
    assert await client.code("StartWriteCache", **asked) == "IO_ERROR"


async def test_groups_are_changed_by_version_and_removed_when_empty(client: Client, register: Register) -> None:
    group = await add_group(client, max_instance_count=1)
    assert await client.code("CreateInstanceGroup", "admin", instance_group=group) == "DUPLICATE_ENTITY"
    instance = await register(instance_group=group["name"])
    second = {"instance_id": name(), "instance_group": group["name"], "block_size": 4}
    specs = [{"name": "tp0", "size": 1}]
    code = await client.code("RegisterInstance", location_spec_infos=specs, **second)
    assert code == "REACH_MAX_ENTITY_CAPACITY"

    changed = group | {"user_data": "x"}
    await client.ok("UpdateInstanceGroup", "admin", instance_group=changed, current_version=1)
    code = await client.code("UpdateInstanceGroup", "admin", instance_group=changed, current_version=1)
    assert code == "INVALID_ARGUMENT"
    found = (await client.ok("GetInstanceGroup", "admin", name=group["name"]))["instance_group"]
    assert (found["version"], found["user_data"]) == ("2", "x")

    assert await client.code("RemoveInstanceGroup", "admin", name=group["name"]) == "INVALID_ARGUMENT"
    wrong = {"instance_group": "default", "instance_id": instance}
    assert await client.code("RemoveInstance", "admin", **wrong) == "INSTANCE_NOT_EXIST"
    await client.ok("RemoveInstance", "admin", instance_group=group["name"], instance_id=instance)
    await client.ok("RemoveInstanceGroup", "admin", name=group["name"])
    assert await client.code("GetInstanceGroup", "admin", name=group["name"]) == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"name": ""}, "INVALID_ARGUMENT"),
        ({"storage_candidates": ["no"]}, "INVALID_ARGUMENT"),
        ({"max_instance_count": -1}, "INVALID_ARGUMENT"),
        ({"cache_config": {"reclaim_strategy": {"reclaim_policy": "POLICY_TTL"}}}, "INVALID_ARGUMENT"),
        ({"cache_config": {"reclaim_strategy": {"reclaim_policy": 77}}}, "UNSUPPORTED"),
        (
            {"cache_config": {"reclaim_strategy": {"trigger_strategy": {"used_percentage": 1.5}}}},
            "INVALID_ARGUMENT",
        ),
    ],
)
async def test_groups_that_cannot_be_are_refused(client: Client, fields: dict[str, Any], code: str) -> None:
    group = {"name": name(), "storage_candidates": []} | fields
    assert await client.code("CreateInstanceGroup", "admin", instance_group=group) == code


async def test_the_coldest_blocks_go_when_a_group_is_full(client: Client, register: Register) -> None:
    indexer = {"max_key_count": 8}
    group = await add_group(client, cache_config={"meta_indexer_config": indexer})
    instance = await register(instance_group=group["name"])
    await write(client, instance, [1, 2, 3, 4])
    await write(client, instance, [5, 6, 7, 8])
    await hits(client, instance, [1, 2, 3, 4])
    await write(client, instance, [9, 10])
    assert await hits(client, instance, [1, 2, 3, 4, 9, 10]) == [2] * 6
    assert await hits(client, instance, [5, 6, 7, 8]) == [2, 2, 0, 0], "the ends of prefixes go first"
    asked = {"instance_id": instance, "block_keys": list(range(100, 109))}
    assert await client.code("StartWriteCache", **asked) == "REACH_MAX_ENTITY_CAPACITY"


async def test_room_for_a_prompts_new_blocks_is_not_made_with_its_old_ones(client: Client, register: Register) -> None:
    group = await add_group(client, cache_config={"meta_indexer_config": {"max_key_count": 4}})
    instance = await register(instance_group=group["name"])
    await write(client, instance, [1, 2])
    await write(client, instance, [3, 4])
    assert (await write(client, instance, [1, 2, 5]))["block_mask"] == {"offset": 2}
    assert await hits(client, instance, [1, 2, 3, 4, 5]) == [2, 2, 2, 0, 2]


def limited(max_keys: int, **strategy: Any) -> dict[str, Any]:
    return {"meta_indexer_config": {"max_key_count": max_keys}, "reclaim_strategy": strategy}


async def test_the_instance_that_has_most_gives_first(client: Client, register: Register) -> None:
    group = await add_group(client, cache_config=limited(8))
    small, large = [await register(instance_group=group["name"]) for _ in range(2)]
    await write(client, small, [1, 2])
    await write(client, large, list(range(6)))
    await hits(client, large, list(range(6)))
    await write(client, small, [3, 4])
    assert await hits(client, small, [1, 2, 3, 4]) == [2] * 4, "colder, but it has less"
    assert await hits(client, large, list(range(6))) == [2, 2, 2, 2, 0, 0]


async def test_policies_and_pins_say_which_blocks_go(client: Client, register: Register) -> None:
    group = await add_group(client, cache_config=limited(4, reclaim_policy="POLICY_LFU"))
    instance = await register(instance_group=group["name"])
    await write(client, instance, [1, 2])
    await write(client, instance, [3, 4])
    for _ in range(2):
        await hits(client, instance, [1])
    await hits(client, instance, [3, 4])
    await write(client, instance, [5])
    assert await hits(client, instance, [1, 2, 3, 4, 5]) == [2, 0, 2, 2, 2], "2 was never read"
    pin = {"instance_id": instance, "block_keys": [5, 6], "pin_s": 60}
    assert (await client.ok("PinCache", "operator", **pin))["pinned_count"] == "1"
    await write(client, instance, [7])
    assert await hits(client, instance, [1, 3, 4, 5, 7]) == [2, 2, 0, 2, 2], "5 is pinned"

    read_soon = limited(4, reclaim_policy="POLICY_TTL", trigger_period_seconds=1)
    changed = group | {"cache_config": read_soon}
    await client.ok("UpdateInstanceGroup", "admin", instance_group=changed, current_version=1)

    async def are_gone() -> bool:
        metas = (await client.ok("GetCacheMeta", instance_id=instance, block_keys=[1, 3, 5, 7]))["metas"]
        return ["SERVING" in meta for meta in metas] == [False, False, True, False]

    await eventually_async(are_gone)


async def test_a_write_that_fits_only_without_what_is_pinned_removes_nothing(
    client: Client, register: Register
) -> None:
    group = await add_group(client, cache_config=limited(4))
    instance = await register(instance_group=group["name"])
    await write(client, instance, [1, 2, 3, 4])
    await client.ok("PinCache", "operator", instance_id=instance, block_keys=[1, 2], pin_s=60)
    for _ in range(2):
        asked = {"instance_id": instance, "block_keys": [5, 6, 7]}
        assert await client.code("StartWriteCache", **asked) == "REACH_MAX_ENTITY_CAPACITY"
    assert await hits(client, instance, [1, 2, 3, 4]) == [2, 2, 2, 2]
    await write(client, instance, [5, 6])
    assert await hits(client, instance, [1, 2, 3, 4, 5, 6]) == [2, 2, 0, 0, 2, 2]


async def test_a_group_keeps_below_its_level_of_bytes(client: Client, register: Register) -> None:
    strategy = {"reclaim_strategy": {"trigger_strategy": {"used_percentage": 0.5}}}
    group = await add_group(client, quota={"capacity": 128 * 10}, cache_config=strategy)
    instance = await register(instance_group=group["name"])
    await write(client, instance, list(range(8)))

    async def used() -> int:
        metrics = (await client.ok("GetMetrics", "admin"))["metrics"]
        tag = {"tag_key": "instance_group", "tag_value": group["name"]}
        found = {m["metric_name"]: m for m in metrics if tag in m["metric_tags"]}
        return int(found["group.used_bytes"]["metric_value"]["int_value"])

    await eventually_async(lambda: _at_most(used, 128 * 5))
    assert await hits(client, instance, [0, 1, 2, 7]) == [2, 2, 2, 0]
    asked = {"instance_id": instance, "block_keys": list(range(100, 111))}
    assert await client.code("StartWriteCache", **asked) == "REACH_MAX_ENTITY_CAPACITY"


async def _at_most(value: Any, limit: int) -> bool:
    return await value() <= limit


async def test_instances_can_be_listed_looked_into_and_removed(client: Client, register: Register) -> None:
    group = await add_group(client)
    instance = await register(instance_group=group["name"])
    asked = {"instance_id": instance, "block_keys": [1]}
    files = paths((await write(client, instance, [1]))["locations"])
    listed = await client.ok("ListInstanceInfo", "admin", instance_group_name=group["name"])
    assert [info["instance_id"] for info in listed["instance_info"]] == [instance]
    assert (await client.ok("ListInstanceInfo", "admin", instance_group_name="no"))["instance_info"] == []
    info = await client.ok("GetInstanceInfo", "admin", instance_id=instance)
    assert info["instance_info"]["instance_group_name"] == group["name"]
    assert (await client.ok("GetCacheMeta", "admin", **asked))["metas"] == ['{"status":"SERVING"}']
    await client.ok("RemoveCache", "admin", **asked)
    assert (await client.ok("GetCacheMeta", "admin", **asked))["metas"] == ['{"status":"NOT_FOUND"}']
    files += paths((await write(client, instance, [1]))["locations"])
    await client.ok("RemoveInstance", "admin", instance_id=instance)
    assert await client.code("GetCacheMeta", "admin", **asked) == "INSTANCE_NOT_EXIST"
    await eventually_async(lambda: not any(file.exists() for file in files))
    assert await register(instance_id=instance, block_size=8) == instance
    assert await hits(client, instance, [1]) == [0]


async def test_health_and_the_cluster_are_told(client: Client, server: KvcmProcess) -> None:
    health = await client.ok("CheckHealth", "admin")
    assert (health["is_leader"], health["is_health"]) == (True, True)
    manager = await client.ok("GetManagerClusterInfo", "admin")
    cluster = await client.ok("GetClusterInfo")
    assert manager["self_node_id"] == manager["leader_node_id"] == cluster["leader_node_id"]
    assert cluster["leader_endpoint"]["meta_http_port"] == server.ports.of("meta", "http")


async def test_calls_are_counted_and_timed(client: Client, server: KvcmProcess) -> None:
    await client.code("GetInstanceInfo", instance_id="nobody")
    metrics = (await client.ok("GetMetrics", "admin"))["metrics"]
    tag = [{"tag_key": "api_name", "tag_value": "GetInstanceInfo"}]
    found = {m["metric_name"]: m["metric_value"] for m in metrics if m["metric_tags"] == tag}
    assert int(found["service.query_counter"]["int_value"]) > 0
    assert found["service.query_rt_us"]["float_value"] > 0
    assert 0 < found["service.query_rt_p50_us"]["float_value"] <= found["service.query_rt_p99_us"]["float_value"]
    native = await connected(server.endpoint)
    await native.close()
    metrics = (await client.ok("GetMetrics", "admin"))["metrics"]
    tag = [{"tag_key": "call", "tag_value": "Hello"}]
    found = {m["metric_name"]: m["metric_value"] for m in metrics if m["metric_tags"] == tag}
    assert int(found["native.call_counter"]["int_value"]) > 0
    url = f"http://127.0.0.1:{server.ports.of('admin', 'http')}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        text = await response.text()
    assert 'stratakv_kvcm_calls_total{api_name="GetInstanceInfo",code="INSTANCE_NOT_EXIST"}' in text
    assert 'stratakv_kvcm_call_seconds_bucket{api_name="GetInstanceInfo"' in text
    assert 'stratakv_meta_call_seconds_bucket{call="Hello"' in text


async def test_a_snapshot_brings_back_what_was_removed_and_changes_nothing_else(
    client: Client, register: Register, tmp_path: Path
) -> None:
    storage = await add_storage(client, tmp_path)
    await client.ok("DisableStorage", "admin", storage_unique_name=storage)
    group = await add_group(client, storage_candidates=[storage], quota={"capacity": "12345"})
    instance = await register(instance_group=group["name"])
    text = (await client.ok("GenConfigSnapshot", "admin"))["config_snapshot"]
    before = await _registered(client, group["name"], storage, instance)
    await client.ok("LoadConfigSnapshot", "admin", config_snapshot=text)
    await client.ok("RemoveInstance", "admin", instance_id=instance)
    await client.ok("RemoveInstanceGroup", "admin", name=group["name"])
    await client.ok("RemoveStorage", "admin", storage_unique_name=storage)
    await client.ok("LoadConfigSnapshot", "admin", config_snapshot=text)
    assert await _registered(client, group["name"], storage, instance) == before

    parts = json.loads(text)
    (kept,) = [one for one in parts["instance_groups"] if one["name"] == group["name"]]
    other = {"instance_groups": [{"name": name()}, kept | {"max_instance_count": "7"}]}
    load = {"config_snapshot": json.dumps(other)}
    assert await client.code("LoadConfigSnapshot", "admin", **load) == "DUPLICATE_ENTITY"
    assert (
        await client.code("GetInstanceGroup", "admin", name=other["instance_groups"][0]["name"]) == "INVALID_ARGUMENT"
    )
    for wrong in ("", "[]", '{"instance_groups": [{"name": "g", "storage_candidates": ["nosuch"]}]}'):
        assert await client.code("LoadConfigSnapshot", "admin", config_snapshot=wrong) == "INVALID_ARGUMENT"


async def _registered(client: Client, group: str, storage: str, instance: str) -> list[Any]:
    states = (await client.ok("ListStorageStates", "operator"))["storages"]
    return [
        await client.ok("GetInstanceGroup", "admin", name=group),
        await client.ok("GetInstanceInfo", "admin", instance_id=instance),
        *((one["storage"], one["is_enabled"]) for one in states if one["storage"]["global_unique_name"] == storage),
    ]


async def test_what_is_logged_can_be_changed_while_it_runs(client: Client, server: KvcmProcess) -> None:
    async def set_level(level: str, module: str = "meta_server.kvcm") -> str:
        return await client.code("UpdateLogger", "admin", module_name=module, log_level=level)

    assert await set_level("warning") == "OK"
    root = server.root.parent / name()
    await add_storage(client, root.parent, global_unique_name=(silent := name()))
    await eventually_async(lambda: _is_healthy(client, silent))
    assert silent not in server.log()
    assert await set_level("INFO") == "OK"
    await add_storage(client, root.parent, global_unique_name=(told := name()))
    await eventually_async(lambda: told in server.log())
    assert await set_level("chatty") == "INVALID_ARGUMENT"
    assert await set_level("info", "no.such.module") == "INVALID_ARGUMENT"


async def _is_healthy(client: Client, storage: str) -> bool:
    states = (await client.ok("ListStorageStates", "operator"))["storages"]
    return any(one["health"] == "HEALTHY" and one["storage"]["global_unique_name"] == storage for one in states)
