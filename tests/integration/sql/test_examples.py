"""The SQL of examples/ does what its comments say, with a stand-in that gives answers of the form that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg
import pytest

from dbnode.sql.service import InferCall
from tests.integration.sql.harness import ReversingModel

EXAMPLES = Path(__file__).parents[3] / "examples"
NUM_TICKETS = 8


def statements(name: str) -> list[str]:
    return [part for part in (EXAMPLES / name).read_text().split(";\n") if part.strip()]


async def _answer(call: InferCall) -> str:
    if "@json_schema" in call.options:
        return json.dumps({"fault": "no power", "urgent": False})
    choices = call.options.get("@choices", ("an answer",))
    return "no" if "no" in choices else choices[0]


def test_the_tickets_are_answered_row_by_row_of_choices_as_fields_and_all_together(
    url: str, model: ReversingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "infer_text", _answer)
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements("tickets.sql"):
            connection.execute(statement.encode())
        found = [connection.execute(one.encode()).fetchall() for one in statements("tickets_answers.sql")]
    summaries, wishes, nightly, fields, by_product = found
    assert summaries == [(number, "an answer") for number in range(1, NUM_TICKETS + 1)]
    assert {wish for _, _, wish in wishes} == {"help"}
    assert len(nightly) == 2
    assert fields == [(number, "no power", False) for number in range(1, NUM_TICKETS + 1)]
    assert [product for product, _ in by_product] == ["camera", "router", "speaker", "thermostat"]
