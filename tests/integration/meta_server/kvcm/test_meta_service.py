"""MetaService over both transports: what each call promises, every mask form, every error code it has."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from stratakv.keys import block_keys
from tests.integration.meta_server.kvcm.conftest import Register
from tests.kvcm_clients import Client, HttpClient, KvcmProcess
from tests.support import eventually_async


async def start(client: Client, instance: str, keys: list[int], **fields: Any) -> dict[str, Any]:
    return await client.ok("StartWriteCache", instance_id=instance, block_keys=keys, **fields)


async def write(client: Client, instance: str, keys: list[int], **fields: Any) -> dict[str, Any]:
    """A whole write; the answer to its start."""
    started = await start(client, instance, keys, **fields)
    for path in paths(started["locations"]):
        path.write_bytes(b"x")
    success = {"offset": len(started["locations"])}
    session = started["write_session_id"]
    await client.ok("FinishWriteCache", instance_id=instance, write_session_id=session, success_blocks=success)
    return started


async def hits(client: Client, instance: str, keys: list[int], kind: str = "QT_BATCH_GET", **fields: Any) -> list[int]:
    """How many specs each location in the answer has."""
    answer = await client.ok("GetCacheLocation", instance_id=instance, query_type=kind, block_keys=keys, **fields)
    return [location["spec_size"] for location in answer["locations"]]


def paths(locations: list[dict[str, Any]]) -> list[Path]:
    uris = [spec["uri"] for location in locations for spec in location["location_specs"]]
    return [Path(unquote(uri.partition("://")[2].partition("?")[0])) for uri in uris]


async def test_registering_again_is_fine_with_the_same_data_only(client: Client, register: Register) -> None:
    instance = await register()
    assert await register(instance_id=instance) == instance
    code = await client.code(
        "RegisterInstance", instance_id=instance, instance_group="default", block_size=8, location_spec_infos=[]
    )
    assert code == "INVALID_ARGUMENT"
    specs = [{"name": "tp0", "size": 64}]
    other = {"instance_id": instance, "instance_group": "default", "block_size": 8, "location_spec_infos": specs}
    assert await client.code("RegisterInstance", **other) == "DUPLICATE_ENTITY"
    assert await client.code("RegisterInstance", **(other | {"instance_group": "no"})) == "INVALID_ARGUMENT"
    info = (await client.ok("GetInstanceInfo", instance_id=instance))["instance_info"]
    assert (info["block_size"], info["instance_group_name"]) == (4, "default")
    assert info["location_spec_infos"] == [{"name": "tp0", "size": "64"}, {"name": "tp1", "size": "64"}]


async def test_every_call_says_when_there_is_no_such_instance(client: Client) -> None:
    asked = {"instance_id": "nobody", "block_keys": [1]}
    assert await client.code("GetInstanceInfo", instance_id="nobody") == "INSTANCE_NOT_EXIST"
    assert await client.code("GetCacheLocation", query_type="QT_BATCH_GET", **asked) == "INSTANCE_NOT_EXIST"
    assert await client.code("GetCacheLocationLen", query_type="QT_BATCH_GET", **asked) == "INSTANCE_NOT_EXIST"
    for name in ("GetCacheMeta", "StartWriteCache", "RemoveCache"):
        assert await client.code(name, **asked) == "INSTANCE_NOT_EXIST"
    assert await client.code("TrimCache", instance_id="nobody") == "INSTANCE_NOT_EXIST"
    assert await client.code("FinishWriteCache", instance_id="nobody") == "INSTANCE_NOT_EXIST"


async def test_a_block_is_found_only_after_its_write_is_finished(client: Client, register: Register) -> None:
    instance = await register()
    started = await start(client, instance, [5, -6])
    assert started["block_mask"] == {"offset": 0}
    assert [len(location["location_specs"]) for location in started["locations"]] == [2, 2]
    assert await hits(client, instance, [5, -6]) == [0, 0]
    again = await start(client, instance, [5, -6, 7])
    assert again["block_mask"] == {"offset": 2}, "blocks that are being written count as held"
    finish = {"instance_id": instance, "write_session_id": started["write_session_id"]}
    for _ in range(2):
        await client.ok("FinishWriteCache", success_blocks={"bool_masks": {"values": [True, False]}}, **finish)
    assert await hits(client, instance, [5, -6]) == [2, 0]
    assert await client.code("FinishWriteCache", success_blocks={"offset": 2}, **finish) == "INVALID_ARGUMENT"
    after = await start(client, instance, [-6, 5, -6])
    assert after["block_mask"] == {"bool_masks": {"values": [False, True, True]}}
    nothing = await write(client, instance, [5, -6, 7])
    assert (nothing["block_mask"], nothing["locations"]) == ({"offset": 3}, [])


async def test_finish_changes_nothing_when_it_is_refused(client: Client, register: Register) -> None:
    instance, other = await register(), await register()
    session = (await start(client, instance, [1, 2, 3]))["write_session_id"]
    for mask in ({"offset": 4}, {"offset": -1}, {"bool_masks": {"values": [True]}}, {}):
        finish = {"instance_id": instance, "write_session_id": session, "success_blocks": mask}
        assert await client.code("FinishWriteCache", **finish) == "INVALID_ARGUMENT", mask
    finish = {"instance_id": instance, "write_session_id": session, "success_blocks": {"offset": 3}}
    assert await client.code("FinishWriteCache", **(finish | {"instance_id": other})) == "INVALID_ARGUMENT"
    assert await client.code("FinishWriteCache", **(finish | {"write_session_id": "x"})) == "INVALID_ARGUMENT"
    foreign = [{"location_specs": [{"name": "tp0", "uri": "file:///elsewhere"}]}]
    assert await client.code("FinishWriteCache", **finish, locations=foreign) == "UNSUPPORTED"
    await client.ok("FinishWriteCache", **finish)
    assert await hits(client, instance, [1, 2, 3]) == [2, 2, 2]


async def test_a_write_that_is_not_finished_in_time_gives_everything_back(client: Client, register: Register) -> None:
    instance = await register()
    started = await start(client, instance, [1, 2], write_timeout_seconds=1)
    file = paths(started["locations"])[0]
    file.write_bytes(b"half")

    async def is_free() -> bool:
        return (await start(client, instance, [1, 2]))["block_mask"] == {"offset": 0}

    await eventually_async(is_free)
    finish = {"instance_id": instance, "write_session_id": started["write_session_id"], "success_blocks": {"offset": 2}}
    assert await client.code("FinishWriteCache", **finish) == "INVALID_ARGUMENT"
    assert await hits(client, instance, [1, 2]) == [0, 0]
    await eventually_async(lambda: not file.exists())


async def test_queries_match_a_prefix_each_key_or_the_last_window(client: Client, register: Register) -> None:
    instance = await register()
    await write(client, instance, [1, 2, 4, 5])
    keys = [1, 2, 3, 4, 5, 6]
    assert await hits(client, instance, keys) == [2, 2, 0, 2, 2, 0]
    assert await hits(client, instance, keys, "QT_PREFIX_MATCH") == [2, 2]
    window = "QT_REVERSE_ROLL_SW_MATCH"
    assert await hits(client, instance, keys, window, sw_size=2) == [0, 0, 0, 2, 2, 0]
    assert await hits(client, instance, keys, window, sw_size=1) == [0, 0, 0, 0, 2, 0]
    assert await hits(client, instance, keys, window, sw_size=3) == [0] * 6
    asked = {"instance_id": instance, "block_keys": keys}
    assert await client.code("GetCacheLocation", query_type=window, **asked) == "INVALID_ARGUMENT"
    assert await client.code("GetCacheLocation", **asked) == "INVALID_ARGUMENT"
    assert await client.code("GetCacheLocation", query_type="QT_PREFIX_MATCH_WITH_MAMBA", **asked) == "UNSUPPORTED"
    assert await client.code("GetCacheLocation", query_type="QT_BATCH_GET", instance_id=instance) == "INVALID_ARGUMENT"
    length = await client.ok("GetCacheLocationLen", query_type="QT_PREFIX_MATCH", **asked)
    assert length["cache_location_len"] == "2"


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        ({"offset": 0}, [2, 2, 0, 2]),
        ({"offset": 1}, [2, 0, 2]),
        ({"offset": 4}, []),
        ({"bool_masks": {"values": [False, True, False, True]}}, [2, 0]),
        ({"bool_masks": {"values": [True] * 4}}, []),
        ({"bool_masks": {"values": [False] * 4}}, [2, 2, 0, 2]),
        ({}, [2, 2, 0, 2]),
        ({"offset": 5}, None),
        ({"offset": -1}, None),
        ({"bool_masks": {"values": [True]}}, None),
    ],
)
async def test_masks_hide_blocks(client: Client, register: Register, mask: dict[str, Any], found: list[int]) -> None:
    instance = await register()
    await write(client, instance, [1, 2, 4])
    asked = {"instance_id": instance, "block_keys": [1, 2, 3, 4], "block_mask": mask}
    if found is None:
        assert await client.code("GetCacheLocation", query_type="QT_BATCH_GET", **asked) == "INVALID_ARGUMENT"
        assert await client.code("GetCacheMeta", **asked) == "INVALID_ARGUMENT"
        assert await client.code("RemoveCache", **asked) == "INVALID_ARGUMENT"
        return
    assert await hits(client, instance, [1, 2, 3, 4], block_mask=mask) == found
    metas = (await client.ok("GetCacheMeta", **asked))["metas"]
    assert ["SERVING" in text for text in metas] == [bool(size) for size in found]
    await client.ok("RemoveCache", **asked)
    assert sum(await hits(client, instance, [1, 2, 4])) == 6 - sum(found)


async def test_spec_groups_are_written_and_asked_for_by_themselves(client: Client, register: Register) -> None:
    instance = await register()
    await write(client, instance, [1, 2], location_spec_group_names=["first", ""])
    assert await hits(client, instance, [1, 2]) == [1, 2]
    assert await hits(client, instance, [1, 2], location_spec_names=["tp0"]) == [1, 1]
    assert await hits(client, instance, [1, 2], location_spec_names=["tp1"]) == [0, 1]
    assert (await write(client, instance, [1, 2]))["block_mask"] == {"bool_masks": {"values": [False, True]}}
    assert await hits(client, instance, [1, 2], location_spec_names=["tp1"]) == [1, 1]
    asked = {"instance_id": instance, "block_keys": [1]}
    bad = {"query_type": "QT_BATCH_GET", "location_spec_names": ["tp9"]}
    assert await client.code("GetCacheLocation", **bad, **asked) == "INVALID_ARGUMENT"
    for names in (["tp9"], ["first", "first"]):
        assert await client.code("StartWriteCache", location_spec_group_names=names, **asked) == "INVALID_ARGUMENT"
    assert await client.code("StartWriteCache", write_timeout_seconds=-1, **asked) == "INVALID_ARGUMENT"


async def test_more_replicas_can_be_asked_for(client: Client, register: Register) -> None:
    instance = await register()
    await write(client, instance, [1])
    assert (await write(client, instance, [1], min_replica_count=2))["block_mask"] == {"offset": 0}
    assert (await write(client, instance, [1], min_replica_count=2))["block_mask"] == {"offset": 1}
    await client.ok("RemoveCache", instance_id=instance, block_keys=[1])
    assert await hits(client, instance, [1]) == [0]


async def test_token_ids_stand_for_the_keys_of_their_full_blocks(client: Client, register: Register) -> None:
    instance = await register()
    tokens = list(range(11))
    keys = [int.from_bytes(key[-8:], "big", signed=True) for key in block_keys(tokens, 4)]
    await write(client, instance, keys)
    asked = {"instance_id": instance, "query_type": "QT_PREFIX_MATCH"}
    assert len((await client.ok("GetCacheLocation", token_ids=tokens, **asked))["locations"]) == 2
    assert (await client.ok("GetCacheLocation", token_ids=[1, 2], **asked))["locations"] == []
    assert await client.code("GetCacheLocation", token_ids=[-1] * 4, **asked) == "INVALID_ARGUMENT"


async def test_removing_deletes_the_files(client: Client, register: Register) -> None:
    instance = await register()
    files = paths((await write(client, instance, [1, 2]))["locations"])
    assert len(files) == 4
    assert all(file.exists() for file in files)
    await client.ok("RemoveCache", instance_id=instance, block_keys=[2, 3])
    await eventually_async(lambda: [file.exists() for file in files] == [True, True, False, False])
    assert await hits(client, instance, [1, 2]) == [2, 0]


async def test_trimming_removes_all_or_what_was_written_in_a_time(client: Client, register: Register) -> None:
    instance, other = await register(), await register()
    files = [paths((await write(client, instance, [key]))["locations"])[0] for key in (1, 2)]
    await write(client, other, [1])
    now = int(time.time())
    trim = {"instance_id": instance, "strategy": "TS_TIMESTAMP"}
    await client.ok("TrimCache", begin_timestamp=1, end_timestamp=now - 3600, **trim)
    assert await hits(client, instance, [1, 2]) == [2, 2]
    assert await client.code("TrimCache", begin_timestamp=2, end_timestamp=1, **trim) == "INVALID_ARGUMENT"
    assert await client.code("TrimCache", instance_id=instance) == "INVALID_ARGUMENT"
    await client.ok("TrimCache", begin_timestamp=now - 3600, end_timestamp=now + 3600, **trim)
    assert await hits(client, instance, [1, 2]) == [0, 0]
    await eventually_async(lambda: not any(file.exists() for file in files))
    kept = paths((await write(client, instance, [3]))["locations"])[0]
    await client.ok("TrimCache", instance_id=instance, strategy="TS_REMOVE_ALL_META")
    await write(client, instance, [4])
    await client.ok("TrimCache", instance_id=instance, strategy="TS_REMOVE_ALL_CACHE")
    assert await hits(client, instance, [3, 4]) == [0, 0]
    assert await hits(client, other, [1]) == [2]
    assert kept.exists()


async def test_meta_tells_the_state_of_each_block(client: Client, register: Register) -> None:
    instance = await register()
    await write(client, instance, [1])
    await start(client, instance, [2])
    asked = {"instance_id": instance, "block_keys": [1, 2, 3]}
    plain = await client.ok("GetCacheMeta", **asked)
    assert plain["metas"] == ['{"status":"SERVING"}', '{"status":"WRITING"}', '{"status":"NOT_FOUND"}']
    assert [location["spec_size"] for location in plain["locations"]] == [2, 2, 0]
    assert "nfs_01" in (await client.ok("GetCacheMeta", detail_level=1, **asked))["metas"][0]


async def test_locations_are_ranges_of_files_below_the_storage_root(
    client: Client, register: Register, server: KvcmProcess
) -> None:
    instance = await register()
    (location,) = (await write(client, instance, [1]))["locations"]
    assert location["type"] == "ST_NFS"
    for spec in location["location_specs"]:
        uri = urlsplit(spec["uri"])
        assert uri.scheme == "file"
        assert Path(uri.path).is_relative_to(server.root)
        assert parse_qs(uri.query) == {"offset": ["0"], "size": ["64"]}


async def test_a_call_that_is_not_there_says_so(client: Client) -> None:
    assert await client.code("GetCacheLocationsByBackend") == "UNSUPPORTED"


async def test_json_takes_numbers_and_strings_and_names_and_unknown_fields(server: KvcmProcess) -> None:
    client = HttpClient(server.ports)
    body = b'{"instance_id":"x","query_type":2,"block_keys":["1",2,"-9223372036854775808"],"later_field":1}'
    assert b"INSTANCE_NOT_EXIST" in await client.post("meta", "GetCacheLocation", body)
    for bad in (b"{", b"[]", b'{"block_keys":["x"]}', b'{"block_keys":[1.5]}', b'{"block_keys":[9223372036854775808]}'):
        assert b'"INVALID_ARGUMENT"' in await client.post("meta", "GetCacheLocation", bad), bad
