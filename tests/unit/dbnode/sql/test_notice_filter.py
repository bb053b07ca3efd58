"""Only our own notices are taken out, however the bytes are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.messages import cstring, message
from dbnode.sql.notice_filter import SQLSTATE, NoticeFilter


def _notice(sqlstate: str, text: str) -> bytes:
    return message(b"N", b"SINFO\0VINFO\0C" + cstring(sqlstate) + b"M" + cstring(text) + b"\0")


_OURS = _notice(SQLSTATE, "")
_OTHERS = st.one_of(
    st.binary(max_size=40).map(lambda payload: message(b"D", payload)),
    st.sampled_from(["00000", "SKV01"]).map(lambda code: _notice(code, f"C{SQLSTATE}")),
    st.just(message(b"D", b"\0C" + cstring(SQLSTATE))),
    st.just(_notice("00000", "x" * 5000)),
)


@given(st.lists(st.one_of(_OTHERS, st.just(_OURS)), max_size=12), st.lists(st.integers(1, 60), max_size=30))
def test_everything_else_goes_through_in_order(messages: list[bytes], cuts: list[int]) -> None:
    data, filtered, passed = b"".join(messages), NoticeFilter(), b""
    for size in cuts:
        passed += filtered.feed(data[:size])
        data = data[size:]
    passed += filtered.feed(data)
    assert passed == b"".join(part for part in messages if part != _OURS)


def test_what_has_only_begun_is_not_lost() -> None:
    filtered = NoticeFilter()
    later = _notice("00000", "later")
    assert filtered.feed(_OURS + later[:-3]) == b""
    assert filtered.feed(later[-3:]) == later
