"""gRPC and HTTP give the same answer to the same request: every call, with and without mistakes, and every form of mask."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.meta_server.kvcm.conftest import Register
from tests.kvcm_clients import SERVICES, Client, GrpcClient, HttpClient, KvcmProcess

KEYS = [1, 2, 3, 4]
MASKS: list[dict[str, Any] | None] = [
    None,
    {"offset": 0},
    {"offset": 2},
    {"offset": 4},
    {"offset": 5},
    {"offset": -1},
    {"bool_masks": {"values": [True, False, True, False]}},
    {"bool_masks": {"values": [True] * 4}},
    {"bool_masks": {"values": [True]}},
    {"bool_masks": {"values": []}},
]
QUERY_TYPES = [
    "QT_UNSPECIFIED",
    "QT_BATCH_GET",
    "QT_PREFIX_MATCH",
    "QT_REVERSE_ROLL_SW_MATCH",
    "QT_PREFIX_MATCH_WITH_MAMBA",
]
UNTIMELY = {"timestamp", "metrics", "info_updated_time", "self_leader_expiration_time", "elector_last_loop_time_ms"}
"""What is another moment's is not compared."""


@pytest.fixture
def client(server: KvcmProcess) -> Client:
    """Of no account here: both are asked."""
    return GrpcClient(server.ports)


async def same(server: KvcmProcess, name: str, service: str = "meta", /, **fields: Any) -> dict[str, Any]:
    """What both answer."""
    answers = [
        {
            key: value
            for key, value in (await transport(server.ports).call(name, service, **fields)).items()
            if key not in UNTIMELY
        }
        for transport in (GrpcClient, HttpClient)
    ]
    assert answers[0] == answers[1]
    return answers[0]


async def written(client: Client, register: Register) -> str:
    """An instance with the blocks 1, 2 and 4."""
    instance = await register()
    started = await client.ok("StartWriteCache", instance_id=instance, block_keys=[1, 2, 4])
    finish = {"write_session_id": started["write_session_id"], "success_blocks": {"offset": 3}}
    await client.ok("FinishWriteCache", instance_id=instance, **finish)
    return instance


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("query_type", QUERY_TYPES)
async def test_lookups_with_every_mask(
    server: KvcmProcess, client: Client, register: Register, query_type: str, mask: dict[str, Any] | None
) -> None:
    instance = await written(client, register)
    asked = {"instance_id": instance, "block_keys": KEYS} | ({"block_mask": mask} if mask is not None else {})
    answer = await same(server, "GetCacheLocation", query_type=query_type, sw_size=2, **asked)
    hidden = _hidden(mask)
    expected = {"QT_UNSPECIFIED": "INVALID_ARGUMENT", "QT_PREFIX_MATCH_WITH_MAMBA": "UNSUPPORTED"}.get(query_type, "OK")
    assert answer["header"]["status"]["code"] == ("INVALID_ARGUMENT" if hidden is None else expected)
    if hidden is not None and expected == "OK":
        visible = [key for key, is_hidden in zip(KEYS, hidden, strict=True) if not is_hidden]
        assert [bool(found["location_specs"]) for found in answer["locations"]] == _hits(query_type, visible)
    if query_type == "QT_BATCH_GET":
        metas = await same(server, "GetCacheMeta", detail_level=1, **asked)
        assert metas["header"]["status"]["code"] == ("OK" if hidden is not None else "INVALID_ARGUMENT")


def _hidden(mask: dict[str, Any] | None) -> list[bool] | None:
    """None where the mask does not fit."""
    if mask is None:
        return [False] * len(KEYS)
    if "offset" in mask:
        return [i < mask["offset"] for i in range(len(KEYS))] if 0 <= mask["offset"] <= len(KEYS) else None
    values = mask["bool_masks"]["values"]
    return values if len(values) == len(KEYS) else None


def _hits(query_type: str, visible: list[int]) -> list[bool]:
    there = [key != 3 for key in visible]
    if query_type == "QT_BATCH_GET":
        return there
    if query_type == "QT_PREFIX_MATCH":
        return there[: there.index(False)] if False in there else there
    windows = [i for i in range(len(there) - 1) if there[i] and there[i + 1]]
    return [bool(windows) and windows[-1] <= i <= windows[-1] + 1 for i in range(len(there))]


@pytest.mark.parametrize("service", ["meta", "admin"])
async def test_every_call_without_any_field(server: KvcmProcess, service: str) -> None:
    codes = {}
    for method in SERVICES[service].methods:
        if method.name != "LeaderDemote":
            codes[method.name] = (await same(server, method.name, service))["header"]["status"]["code"]
    assert {"OK", "INVALID_ARGUMENT", "INSTANCE_NOT_EXIST"} <= set(codes.values())
    assert "INTERNAL_ERROR" not in codes.values(), codes


async def test_errors_of_every_kind_that_a_client_can_cause(
    server: KvcmProcess, client: Client, register: Register
) -> None:
    instance = await register()
    config = {"instance_group": "default", "block_size": 5, "location_spec_infos": [{"name": "a", "size": 1}]}
    assert await _code(server, "RegisterInstance", instance_id=instance, **config) == "DUPLICATE_ENTITY"
    small = {"name": "small", "storage_candidates": ["nfs_01"], "quota": {"capacity": 100}}
    await client.ok("CreateInstanceGroup", "admin", instance_group=small)
    crowded = await register(instance_group="small")
    write = {"instance_id": crowded, "block_keys": [1]}
    assert await _code(server, "StartWriteCache", **write) == "REACH_MAX_ENTITY_CAPACITY"
    assert await _code(server, "CreateInstanceGroup", "admin", instance_group=small) == "DUPLICATE_ENTITY"
    nowhere = {
        "global_unique_name": "gone",
        "nfs": {"root_path": "/proc/nowhere"},
        "check_storage_available_when_open": True,
    }
    assert await _code(server, "AddStorage", "admin", storage=nowhere) == "IO_ERROR"
    lost = {"instance_id": instance, "write_session_id": "none", "success_blocks": {"offset": 0}}
    assert await _code(server, "FinishWriteCache", **lost) == "INVALID_ARGUMENT"
    assert await _code(server, "StartWriteCache", instance_id="nobody", block_keys=[1]) == "INSTANCE_NOT_EXIST"
    assert await _code(server, "GetCacheLocationsByBackend", instance_id=instance) == "UNSUPPORTED"
    heartbeat = [{"event_type": "EVENT_HEARTBEAT", "heartbeat": {}}]
    event = {"instance_id": instance, "host_ip_port": "h", "events": heartbeat}
    assert await _code(server, "ReportEvent", **event) == "NODE_NOT_REGISTERED"


async def _code(server: KvcmProcess, name: str, service: str = "meta", /, **fields: Any) -> str:
    return (await same(server, name, service, **fields))["header"]["status"]["code"]
