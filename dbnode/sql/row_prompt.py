"""Prompts of infer_row(): a filled template, and the fields that stand in it in any order. Free of I/O.

The SQL function `stratakv.sql_fill_template` writes them as JSON, `{"before": …, "after": …, "fields": {name: value, …}}`, and
marks the call with the option `@row`. A row whose statement is looked ahead in gets the order that reuses most.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dbnode.sql.field_order import Fields, line, order_fields
from stratakv.errors import InvalidRequest

ROW = "@row"


@dataclass(frozen=True, slots=True)
class RowPrompt:
    """A prompt but for the order of its fields."""

    before: str = field(repr=False)
    after: str = field(repr=False)
    fields: Fields = field(repr=False)
    """As jsonb sorts them."""

    def text(self, fields: Fields | None = None) -> str:
        """The prompt, with its fields in this order."""
        return self.before + "\n".join(map(line, self.fields if fields is None else fields)) + self.after


def ordered_texts(rows: Sequence[RowPrompt], budget_s: float, clock: Callable[[], float] = time.monotonic) -> list[str]:
    """The prompts of these rows, in their order, with fields so placed that many of them begin alike."""
    deadline_s = clock() + budget_s
    alike: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        alike[row.before].append(number)
    texts = [row.text() for row in rows]
    for numbers in alike.values():
        if len(numbers) > 1:
            ordered = order_fields([rows[number].fields for number in numbers], deadline_s - clock(), clock)
            for number, fields in zip(numbers, ordered, strict=True):
                texts[number] = rows[number].text(fields)
    return texts


def parse_row(text: str) -> RowPrompt:
    """Raises InvalidRequest."""
    try:
        content = json.loads(text)
        before, after, fields = content["before"], content["after"], content["fields"]
        if _are_texts(before, after, *fields.values()):
            return RowPrompt(before, after, tuple(fields.items()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise InvalidRequest(f"infer: unknown option {ROW}", hint="Call infer_row.", param=ROW)


def _are_texts(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)
