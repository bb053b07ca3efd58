"""The JSON form is protobuf's own, also where keys are read beside its parser."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from meta_server.kvcm.json_form import parse, render
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from stratakv.errors import InvalidRequest

KEYS = st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=20)


@given(KEYS, st.booleans(), st.text(max_size=5))
def test_requests_are_read_as_protobuf_reads_them(keys: list[int], as_text: bool, instance: str) -> None:
    body = {"instance_id": instance, "block_keys": [str(key) if as_text else key for key in keys], "sw_size": 3}
    expected = json_format.ParseDict(body, meta.GetCacheLocationRequest())
    assert parse(json.dumps(body).encode(), meta.GetCacheLocationRequest) == expected


@given(KEYS)
def test_what_is_printed_can_be_read_again(keys: list[int]) -> None:
    request = meta.GetCacheLocationRequest(block_keys=keys, query_type=meta.QT_BATCH_GET)
    assert parse(render(request), meta.GetCacheLocationRequest) == request


@pytest.mark.parametrize(
    "message",
    [
        meta.GetCacheLocationResponse(
            header=meta.CommonResponseHeader(status=meta.Status(code=meta.IO_ERROR, message="no"), request_id="1"),
            locations=[
                meta.CacheLocation(type=77, spec_size=1, location_specs=[meta.LocationSpec(name="a", uri="file:///x")]),
                meta.CacheLocation(),
            ],
        ),
        meta.StartWriteCacheResponse(block_mask=meta.BlockMask(offset=0)),
        meta.StartWriteCacheResponse(block_mask=meta.BlockMask(bool_masks=meta.BoolMasksType(values=[True, False]))),
        meta.ReportEventResponse(item_results=[meta.OK, meta.INVALID_ARGUMENT], retry_after_ms=1 << 63),
        meta.EventItem(heartbeat=meta.HeartbeatParams(system_status={"load": "1"})),
        admin.MetricsData(metric_name="m", metric_value=admin.MetricValue(float_value=0.5)),
        admin.MetricsData(metric_value=admin.MetricValue(int_value=1 << 40)),
        admin.ListStorageResponse(storage=[admin.StorageConfig(nfs=admin.NfsStorageSpec(root_path="/r"))]),
    ],
    ids=str,
)
def test_messages_are_printed_as_protobuf_prints_them(message: Message) -> None:
    expected = json_format.MessageToDict(
        message, always_print_fields_with_no_presence=True, preserving_proto_field_name=True
    )
    assert json.loads(render(message)) == expected


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b'{"block_keys":[true]}', b'{"block_keys":[9223372036854775808]}']
)
def test_other_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(body, meta.GetCacheLocationRequest)


@pytest.mark.parametrize(
    ("body", "message_type", "expected"),
    [
        (b'{"query_type":"QT_NEAREST"}', meta.GetCacheLocationRequest, "QT_PREFIX_MATCH"),
        (b'{"role":"ROLE_ADMN"}', admin.AddAccountRequest, "ROLE_ADMIN"),
        (
            b'{"instance_group":{"cache_config":{"reclaim_strategy":{"reclaim_policy":"POLICY_MRU"}}}}',
            admin.CreateInstanceGroupRequest,
            "POLICY_LFU",
        ),
    ],
)
def test_a_name_that_no_enum_has_is_refused_with_those_it_has(
    body: bytes, message_type: type[Message], expected: str
) -> None:
    with pytest.raises(InvalidRequest, match=expected):
        parse(body, message_type)


def test_enums_may_be_numbers_also_as_strings() -> None:
    assert parse(b'{"query_type":"2"}', meta.GetCacheLocationRequest).query_type == meta.QT_PREFIX_MATCH
    assert parse(b'{"query_type":2}', meta.GetCacheLocationRequest).query_type == meta.QT_PREFIX_MATCH
