"""Workers as operators name them: a URL of our own worker's, or `vllm://host:port,key=value,…` for a vLLM server.

Read by `stratakv.config` (so that mistakes are reported with all others) and by the DB node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stratakv.keys import NAMESPACE_BYTES
from stratakv.wire import WorkerRole

VLLM_SCHEME = "vllm://"
_OWN_SCHEMES = ("http://", "https://")
_KEY_VALUE = re.compile(r"[a-z_]+=")
_PLACE = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
_ENDPOINT = re.compile(r"(tcp://[^\s*]+:\d{1,5}|ipc://[^\s*]+)")
_KEYS = ("role", "model", "events", "replay", "block_size", "namespace")


@dataclass(frozen=True, slots=True)
class VllmAddress:
    """One vLLM server."""

    place: str
    """host:port of its OpenAI server."""
    role: WorkerRole = WorkerRole.BOTH
    model: str = ""
    """Its name for the model; by default the DB node's, or the only one that it serves."""
    events: str = ""
    """ZeroMQ endpoint on which it publishes KV events."""
    replay: str = ""
    """ZeroMQ endpoint at which missed events can be asked for."""
    block_size: int = 0
    """0: as it says itself."""
    namespace: str = ""
    """Of its blocks in the pool, in hex; empty if they are in none."""

    @property
    def url(self) -> str:
        """What it is called in logs and lists."""
        return VLLM_SCHEME + self.place


def split_workers(text: str) -> list[str]:
    """Addresses separated by commas; a `key=value` belongs to the address before it."""
    found: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        if item and found and _KEY_VALUE.match(item):
            found[-1] += f",{item}"
        elif item:
            found.append(item)
    return found


def check_worker(text: str) -> str:
    """The address as it is. Raises ValueError that says what is expected."""
    if text.startswith(VLLM_SCHEME):
        parse_vllm(text)
    elif not text.startswith(_OWN_SCHEMES) or "," in text:
        raise ValueError(f"expected http://host:port or vllm://host:port,role=…, got {text!r}")
    return text


def vllm_addresses(workers: Iterable[str]) -> dict[str, VllmAddress]:
    """Those that are vLLM servers, by their `url`."""
    found = [parse_vllm(worker) for worker in workers if worker.startswith(VLLM_SCHEME)]
    return {address.url: address for address in found}


def worker_url(worker: str) -> str:
    """What a worker with this address is known by."""
    return parse_vllm(worker).url if worker.startswith(VLLM_SCHEME) else worker.rstrip("/")


def parse_vllm(text: str) -> VllmAddress:
    """Read `vllm://host:port,key=value,…`. Raises ValueError that says what is expected."""
    place, *items = text.removeprefix(VLLM_SCHEME).split(",")
    match = _PLACE.fullmatch(place.rstrip("/"))
    if match is None or not 0 < int(match[2]) < 65_536:
        raise ValueError(f"expected vllm://host:port, got {VLLM_SCHEME}{place}")
    given = _key_values(text, items)
    role = given.get("role", WorkerRole.BOTH.value)
    if role not in [member.value for member in WorkerRole]:
        raise ValueError(f"{text}: role is prefill, decode or both")
    for key in ("events", "replay"):
        if key in given and not _ENDPOINT.fullmatch(given[key]):
            raise ValueError(f"{text}: {key} is an endpoint to connect to, such as tcp://host:5557")
    if "replay" in given and "events" not in given:
        raise ValueError(f"{text}: replay is of use only together with events")
    size = given.get("block_size", "0")
    if not size.isdecimal():
        raise ValueError(f"{text}: block_size is a number of tokens")
    namespace = given.get("namespace", "")
    if namespace and not re.fullmatch(rf"[0-9a-f]{{{2 * NAMESPACE_BYTES}}}", namespace):
        raise ValueError(f"{text}: namespace is {2 * NAMESPACE_BYTES} hexadecimal digits")
    return VllmAddress(
        place=match[0],
        role=WorkerRole(role),
        model=given.get("model", ""),
        events=given.get("events", ""),
        replay=given.get("replay", ""),
        block_size=int(size),
        namespace=namespace,
    )


def _key_values(text: str, items: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not value or key not in _KEYS or key in given:
            raise ValueError(f"{text}: expected each of {', '.join(_KEYS)} at most once, as key=value, got {item!r}")
        given[key] = value
    return given
