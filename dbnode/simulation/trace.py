"""A trace of requests: one JSON object a line, `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (a number per block).

The same number means the same block after the same prefix. The last block of a prompt may not be full; then it has no key, as
in a worker. Read by `dbnode.simulation.run` and its callers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from dbnode.simulation.errors import TraceError
from stratakv.keys import KEY_BYTES, BlockKey

BLOCK_TOKENS = 512
"""Of the published traces."""
REQUESTS_MAX = 10_000_000

_NotNegative = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_BlockId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Line(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: _Positive
    output_length: _NotNegative
    hash_ids: list[_BlockId]


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    keys: Sequence[BlockKey]
    """Of its full blocks."""


def read_trace(path: Path, block_tokens: int = BLOCK_TOKENS) -> list[TraceRequest]:
    """All requests, by time of arrival. Raises TraceError that names the line."""
    try:
        with path.open("rb") as lines:
            return parse_trace(lines, block_tokens, str(path))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}", hint="give --trace a file of JSON lines") from None


def parse_trace(lines: Iterable[bytes], block_tokens: int = BLOCK_TOKENS, name: str = "trace") -> list[TraceRequest]:
    """As `read_trace`, of lines."""
    decode = msgspec.json.Decoder(_Line).decode
    keys: dict[int, BlockKey] = {}
    requests: list[TraceRequest] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = decode(line)
        except msgspec.DecodeError as error:
            raise TraceError(f"{name}, line {number}: {error}", hint=_HINT) from None
        num_full, rest = divmod(found.input_length, block_tokens)
        if len(found.hash_ids) not in (num_full, num_full + bool(rest)):
            raise TraceError(
                f"{name}, line {number}: {len(found.hash_ids)} hash_ids for {found.input_length} tokens in blocks of"
                f" {block_tokens}",
                hint="give the trace's block size with --block-tokens",
            )
        if len(requests) >= REQUESTS_MAX:
            raise TraceError(f"{name}: more than {REQUESTS_MAX} requests", hint="cut the trace")
        full = [keys.setdefault(block, _key(block)) for block in found.hash_ids[:num_full]]
        requests.append(TraceRequest(found.timestamp / 1000, found.input_length, found.output_length, full))
    if not requests:
        raise TraceError(f"{name}: no requests", hint=_HINT)
    return sorted(requests, key=lambda request: request.at_s)


_HINT = 'each line is {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [block, …]}'


def _key(block: int) -> BlockKey:
    return BlockKey(block.to_bytes(KEY_BYTES, "big"))
