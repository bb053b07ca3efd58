"""How operators name workers: what is read, what is refused and why."""

from __future__ import annotations

import pytest

from stratakv.config import load_settings, parse_flags
from stratakv.errors import SetupError
from stratakv.wire import WorkerRole
from stratakv.worker_address import VllmAddress, check_worker, parse_vllm, split_workers, worker_url

FULL = (
    "vllm://gpu-1:8000,role=prefill,model=org/name,events=tcp://gpu-1:5557,replay=tcp://gpu-1:5558,block_size=128,"
    "namespace=" + "0a" * 16
)


def test_all_that_can_be_said_of_a_vllm_server_is_read() -> None:
    assert parse_vllm(FULL) == VllmAddress(
        place="gpu-1:8000",
        role=WorkerRole.PREFILL,
        model="org/name",
        events="tcp://gpu-1:5557",
        replay="tcp://gpu-1:5558",
        block_size=128,
        namespace="0a" * 16,
    )
    assert worker_url(FULL) == "vllm://gpu-1:8000"
    assert parse_vllm("vllm://[::1]:8000/") == VllmAddress("[::1]:8000")


def test_commas_part_addresses_but_not_their_keys() -> None:
    assert split_workers(f"http://a:1, {FULL},http://b:2,") == ["http://a:1", FULL, "http://b:2"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a:1", "http://host:port"),
        ("http://a:1,role=both", "http://host:port"),
        ("vllm://a", "vllm://host:port"),
        ("vllm://a:0", "vllm://host:port"),
        ("vllm://a:1,role=chef", "prefill, decode or both"),
        ("vllm://a:1,colour=red", "as key=value"),
        ("vllm://a:1,role=both,role=both", "at most once"),
        ("vllm://a:1,events=tcp://*:5557", "to connect to"),
        ("vllm://a:1,replay=tcp://a:5558", "together with events"),
        ("vllm://a:1,block_size=many", "number of tokens"),
        ("vllm://a:1,namespace=xyz", "32 hexadecimal digits"),
    ],
)
def test_mistakes_are_refused_with_what_is_expected(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("*", r"\*")):
        check_worker(text)


def test_a_mistake_is_reported_where_it_stands() -> None:
    with pytest.raises(SetupError, match=r"STRATAKV_ROUTER_WORKERS: router\.workers: .*role is"):
        load_settings(env={"STRATAKV_ROUTER_WORKERS": "vllm://a:1,role=chef"})


def test_the_flag_may_be_repeated() -> None:
    flags = ["--worker", FULL, "--worker", "vllm://b:2,role=decode", "--workers", "http://c:3,http://d:4"]
    found = parse_flags("p", "d", ("router",), flags).router.workers
    assert found == (FULL, "vllm://b:2,role=decode", "http://c:3", "http://d:4")
