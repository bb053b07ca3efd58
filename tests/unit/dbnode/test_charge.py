"""A charge is decided once, before or after what it is about has ended."""

from __future__ import annotations

import pytest

from dbnode.charge import Charge


@pytest.mark.parametrize("is_due", [True, False])
def test_requests_that_end_before_and_after_the_decision_get_the_same(is_due: bool) -> None:
    charge, told = Charge(), list[bool]()
    charge.settle(told.append)
    assert told == []
    charge.decide(is_due)
    charge.decide(not is_due)
    charge.settle(told.append)
    assert told == [is_due, is_due]
