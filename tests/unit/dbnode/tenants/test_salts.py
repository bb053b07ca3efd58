"""No two pairs of a tenant's and a request's salt make the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dbnode.tenants.salts import MARK, combined_salt

SALTS = st.text(max_size=6) | st.text("t1:-=ab5", max_size=12)
PAIRS = st.tuples(SALTS, st.none() | SALTS.filter(bool))


@given(PAIRS, PAIRS)
def test_only_equal_pairs_meet(one: tuple[str, str | None], other: tuple[str, str | None]) -> None:
    assert (combined_salt(*one) == combined_salt(*other)) == (one == other)


@given(PAIRS, SALTS.filter(bool))
def test_who_knows_a_made_salt_does_not_meet_it_by_sending_it(pair: tuple[str, str | None], owner: str) -> None:
    made = combined_salt(*pair)
    for attacker in ("", owner):
        if made is not None and (attacker, made) != pair:
            assert combined_salt(attacker, made) != made


def test_requests_of_tenants_that_share_are_as_without_tenants() -> None:
    assert combined_salt("", None) is None
    assert combined_salt("", "mine") == "mine"
    assert str(combined_salt("", MARK)).startswith(MARK)
    assert combined_salt("", MARK) != MARK
