"""The worker's request bodies: what is out of range or unknown is refused by name, before any work."""

from __future__ import annotations

import msgspec
import pytest

from stratakv.errors import InvalidRequest
from workers.api import parse_completion


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("temperature", -1), ("top_p", 0), ("min_p", 2), ("stop", [""]), ("no_such_field", 1)],
)
def test_a_wrong_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field):
        parse_completion(msgspec.json.encode({"prompt": [1], field: value}))


def test_a_plain_request_is_taken() -> None:
    assert parse_completion(b'{"prompt": [1, 2], "max_tokens": 3, "stop": "x"}').stop_strings == ("x",)
