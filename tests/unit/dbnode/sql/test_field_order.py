"""The order of fields: nothing lost or mixed up, never worse than as written, and no longer than it may take."""

from __future__ import annotations

import random
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnode.sql.field_order import Fields, order_fields
from dbnode.sql.row_prompt import RowPrompt, ordered_texts

NAMES = ("id", "title", "body", "author", "kind")
values = st.sampled_from(["", "x", "same text", "a much longer text that repeats", "a: b", "1"]) | st.text(max_size=4)
tables = st.lists(st.dictionaries(st.sampled_from(NAMES), values).map(lambda row: tuple(row.items())), max_size=25)


def saved(rows: list[Fields]) -> tuple[int, int]:
    """Characters of leading fields equal to the row before, as a sum and as a sum of squares."""
    plain = squares = 0
    for one, other in pairwise(rows):
        length = 0
        for item, same in zip(one, other, strict=False):
            if item != same:
                break
            length += len(item[0]) + len(item[1]) + 3
        plain, squares = plain + length, squares + length**2
    return plain, squares


def repeating_table(num_rows: int, seed: int) -> list[Fields]:
    rng = random.Random(seed)
    films = [(f"title {i}", "plot " * rng.randint(1, 30) + str(i)) for i in range(num_rows // 8 + 1)]
    rows: list[Fields] = []
    for number in range(num_rows):
        title, plot = rng.choice(films)
        kind = rng.choice(["good", "bad"])
        rows.append((("id", str(number)), ("kind", kind), ("title", title), ("plot", plot)))
    return rows


@settings(max_examples=200)
@given(tables, st.sampled_from([0.0, 3.0, 1000.0]))
def test_each_row_keeps_exactly_its_own_fields_and_nothing_is_worse(rows: list[Fields], budget_s: float) -> None:
    ticks = count()
    ordered = order_fields(rows, budget_s, lambda: float(next(ticks)))
    assert [sorted(row) for row in ordered] == [sorted(row) for row in rows]
    assert saved(sorted(ordered))[0] >= saved(sorted(rows))[0] >= saved(rows)[0]


@given(st.integers(2, 120), st.integers())
def test_tables_that_repeat_share_more_than_as_written(num_rows: int, seed: int) -> None:
    rows = repeating_table(num_rows, seed)
    ordered = sorted(order_fields(rows, 60.0, lambda: 0.0))
    for ours, written in zip(saved(ordered), saved(rows), strict=True):
        assert ours >= written
    films = len({row[2] for row in rows})
    least = sum(len(row[2][1]) + len(row[3][1]) for row in rows)
    longest = max(len(row[2][1]) + len(row[3][1]) for row in rows)
    assert saved(ordered)[0] >= least - films * longest, "all rows of a film begin with all that they share"


def test_when_the_time_is_over_all_rows_take_one_order_the_most_repeated_first() -> None:
    rows = repeating_table(400, 1)
    looks = count()

    def clock() -> float:
        return float(next(looks))

    ordered = order_fields(rows, 0.5, clock)
    assert next(looks) <= 3, "it stops at the first look at the clock"
    orders = {tuple(name for name, _ in row) for row in ordered}
    assert orders == {("plot", "title", "kind", "id")}
    assert saved(sorted(ordered))[0] > saved(sorted(rows))[0]


@pytest.mark.parametrize("budget_s", [2.0, 20.0, 200.0])
def test_the_clock_is_looked_at_until_the_budget_is_used_up(budget_s: float) -> None:
    looks = count()
    order_fields(repeating_table(3000, 2), budget_s, lambda: float(next(looks)))
    assert next(looks) <= budget_s + 2


def test_values_that_begin_alike_come_before_those_that_do_not() -> None:
    rows: list[Fields] = [(("n", f"{i * 7919 % 1000}"), ("url", f"https://host.example/{i}")) for i in range(50)]
    assert {row[0][0] for row in order_fields(rows, 60.0)} == {"url"}


def test_rows_are_ordered_among_those_of_their_own_template() -> None:
    fields = [(("a", str(i)), ("b", "the same")) for i in range(4)]
    rows = [RowPrompt(f"{'one' if i < 2 else 'two'}: ", ".", fields[i]) for i in range(4)]
    alone = RowPrompt("alone: ", ".", fields[0])
    assert ordered_texts([*rows, alone], 60.0) == [
        "one: b: the same\na: 0.",
        "one: b: the same\na: 1.",
        "two: b: the same\na: 2.",
        "two: b: the same\na: 3.",
        "alone: a: 0\nb: the same.",
    ]
