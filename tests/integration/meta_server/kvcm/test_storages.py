"""Storages as they are in life: one that fails is not chosen, one that is a trap is not followed, and Mooncake's."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.integration.meta_server.kvcm.conftest import Register
from tests.integration.meta_server.kvcm.test_admin_service import add_group
from tests.integration.meta_server.kvcm.test_meta_service import hits, paths, start, write
from tests.kvcm_clients import Client, GrpcClient, KvcmProcess
from tests.support import eventually_async


async def add_storage(client: Client, root: Path) -> str:
    name = uuid.uuid4().hex
    await client.ok("AddStorage", "admin", storage={"global_unique_name": name, "nfs": {"root_path": str(root)}})
    return name


async def state(client: Client, storage: str) -> dict[str, Any]:
    states = (await client.ok("ListStorageStates", "operator"))["storages"]
    return next(one for one in states if one["storage"]["global_unique_name"] == storage)


async def test_a_storage_that_fails_is_not_chosen_until_it_is_well(
    client: Client, register: Register, tmp_path: Path
) -> None:
    first, second = [await add_storage(client, tmp_path / name) for name in ("first", "second")]
    group = await add_group(client, storage_candidates=[first, second])
    instance = await register(instance_group=group["name"])

    async def health(wanted: str) -> None:
        async def is_so() -> bool:
            return (await state(client, first))["health"] == wanted

        await eventually_async(is_so)

    async def root_of(key: int) -> str:
        return paths((await write(client, instance, [key]))["locations"])[0].parent.parent.name

    assert await root_of(1) == "first"
    await health("HEALTHY")
    assert 0 < (await state(client, first))["used_share"] <= 1
    (tmp_path / "first").rename(tmp_path / "away")
    (tmp_path / "first").write_text("a file where a directory should be")
    await health("FAILING")
    assert await root_of(2) == "second"
    (tmp_path / "first").unlink()
    (tmp_path / "away").rename(tmp_path / "first")
    await health("HEALTHY")
    assert await root_of(3) == "first"


async def test_what_is_held_needs_no_storage_that_is_well(client: Client, register: Register, tmp_path: Path) -> None:
    storage = await add_storage(client, tmp_path)
    instance = await register(instance_group=(await add_group(client, storage_candidates=[storage]))["name"])
    await write(client, instance, [1, 2])
    await client.ok("DisableStorage", "admin", storage_unique_name=storage)
    held = await start(client, instance, [1, 2])
    assert (held["block_mask"], held["locations"]) == ({"offset": 2}, [])
    await client.ok("FinishWriteCache", instance_id=instance, write_session_id=held["write_session_id"])
    assert await client.code("StartWriteCache", instance_id=instance, block_keys=[1, 2, 3]) == "IO_ERROR"


async def test_a_storage_is_removed_while_blocks_are_written_into_it(
    client: Client, register: Register, tmp_path: Path
) -> None:
    storage = await add_storage(client, tmp_path)
    group = await add_group(client, storage_candidates=[storage])
    instance = await register(instance_group=group["name"])
    await write(client, instance, [1])
    session = (await start(client, instance, [2]))["write_session_id"]
    changed = group | {"storage_candidates": ["nfs_01"]}
    await client.ok("UpdateInstanceGroup", "admin", instance_group=changed, current_version=1)
    await client.ok("RemoveStorage", "admin", storage_unique_name=storage)
    finish = {"instance_id": instance, "write_session_id": session, "success_blocks": {"offset": 1}}
    assert await client.code("FinishWriteCache", **finish) == "INVALID_ARGUMENT"
    assert await hits(client, instance, [1, 2]) == [0, 0]
    assert paths((await write(client, instance, [1, 2]))["locations"])[0].parents[1] != tmp_path


async def test_nothing_beyond_the_root_is_deleted(client: Client, register: Register, tmp_path: Path) -> None:
    storage = await add_storage(client, tmp_path / "root")
    group = await add_group(client, storage_candidates=[storage])
    instance = await register(instance_group=group["name"])
    (file, *_) = paths((await write(client, instance, [1]))["locations"])
    outside = tmp_path / "outside"
    file.parent.rename(outside)
    file.parent.symlink_to(outside)
    await client.ok("RemoveCache", instance_id=instance, block_keys=[1])

    async def is_put_off() -> bool:
        return (await state(client, storage))["deletions_waiting"] == "1"

    await eventually_async(is_put_off)
    assert (outside / file.name).exists()
    assert await client.code("StartWriteCache", instance_id=instance, block_keys=[2]) == "OK"


@pytest.mark.skipif(importlib.util.find_spec("mooncake") is None, reason="Mooncake is not installed")
async def test_keys_of_a_mooncake_store_are_deleted_for_real(server: KvcmProcess) -> None:
    from benchmarks import mooncake

    client = GrpcClient(server.ports)
    with mooncake.running_store(64 * 1024 * 1024) as master:
        storage = {
            "global_unique_name": uuid.uuid4().hex,
            "mooncake": {"master_service_entry": master, "local_hostname": "127.0.0.1"},
            "check_storage_available_when_open": True,
        }
        await client.ok("AddStorage", "admin", storage=storage)
        cache = {"data_storage_strategy": "CPS_ALWAYS_MOONCAKE"}
        group = await add_group(
            client, storage_candidates=["nfs_01", storage["global_unique_name"]], cache_config=cache
        )
        instance = uuid.uuid4().hex
        specs = [{"name": "tp0", "size": 64}, {"name": "tp1", "size": 64}]
        fields = {"instance_group": group["name"], "block_size": 4, "location_spec_infos": specs}
        await client.ok("RegisterInstance", instance_id=instance, **fields)
        begun = await start(client, instance, [1])
        assert [location["type"] for location in begun["locations"]] == ["ST_MOONCAKE"]
        uris = [spec["uri"] for location in begun["locations"] for spec in location["location_specs"]]
        assert all(uri.startswith(f"mooncake://{storage['global_unique_name']}/") for uri in uris)
        keys = [uri.split("/", 3)[3] for uri in uris]
        store = mooncake.client(master)
        assert [store.put(key, b"x" * 64) for key in keys] == [0, 0]
        done = {"offset": 1}
        await client.ok(
            "FinishWriteCache",
            instance_id=instance,
            write_session_id=begun["write_session_id"],
            success_blocks=done,
        )
        assert await hits(client, instance, [1]) == [2]
        await client.ok("RemoveCache", instance_id=instance, block_keys=[1])

        async def is_deleted() -> bool:
            # To ask the store itself whether a key is there keeps it there for a while.
            metas = (await client.ok("GetCacheMeta", instance_id=instance, block_keys=[1]))["metas"]
            waiting = (await state(client, storage["global_unique_name"]))["deletions_waiting"]
            return metas == ['{"status":"NOT_FOUND"}'] and waiting == "0"

        await eventually_async(is_deleted)
        assert [store.is_exist(key) for key in keys] == [0, 0]
        store.close()
