"""What a worker writes down of each request outlives it, and is found by the DB node's name of the request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from stratakv.errors import SetupError
from workers import request_journal
from workers.engine.connector import Tier
from workers.engine.requests import RequestUsage
from workers.http import create_app
from workers.request_journal import RequestJournal


def usage(prompt: int, cached: int, generated: int) -> RequestUsage:
    return RequestUsage(prompt, generated, {Tier.COMPUTED: prompt - cached, Tier.L1: cached}, 0, 0.0, 0.0, 0.0)


def test_every_attempt_is_found_also_by_the_next_process(tmp_path: Path) -> None:
    journal = RequestJournal(tmp_path, "w/0")
    journal.add("cmpl-a-0p", usage(48, 32, 1))
    journal.add("cmpl-a-0", usage(48, 48, 9))
    journal.add("cmpl-b-0", usage(5, 0, 5))
    journal.add('x"]\n["cmpl-c-0', usage(1, 0, 1))
    again = RequestJournal(tmp_path, "w/0")
    assert again.find(["cmpl-a", "cmpl-c"]) == [
        {"request_id": "cmpl-a-0p", "prompt_tokens": 48, "cached_tokens": 32, "generated_tokens": 1},
        {"request_id": "cmpl-a-0", "prompt_tokens": 48, "cached_tokens": 48, "generated_tokens": 9},
    ]
    assert again.find(["cmpl"]) == []


def test_a_request_that_never_began_has_no_prompt(tmp_path: Path) -> None:
    journal = RequestJournal(tmp_path, "w")
    journal.add("a-0", RequestUsage(100, 0, {}, 0, 0.0, 0.0, 0.0))
    assert journal.find(["a"])[0]["prompt_tokens"] == 0


def test_the_files_are_bounded_and_a_torn_line_is_read_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_journal, "FILE_BYTES_MAX", 1000)
    journal = RequestJournal(tmp_path, "w")
    for number in range(500):
        journal.add(f"r{number}-0", usage(10, 0, number))
    (tmp_path / "w.requests").open("a").write('["r499-')
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2100
    assert [one["generated_tokens"] for one in journal.find(f"r{n}" for n in range(495, 500))] == [*range(495, 500)]
    assert journal.find(["r0"]) == []


def test_a_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"worker\.journal_dir"):
        RequestJournal(tmp_path / "file", "w")


def test_the_workers_face_answers_from_it(tmp_path: Path) -> None:
    journal = RequestJournal(tmp_path, "w")
    journal.add("a-0", usage(48, 32, 1))
    client = TestClient(create_app(SimpleNamespace(journal=journal)))  # type: ignore[arg-type]
    answer = client.post("/requests/ended", json={"request_ids": ["a", "b"]})
    assert answer.json() == {"ended": journal.find(["a"])}
    for body in (b"", b"[]", b'{"request_ids": [1]}', b"{}"):
        assert client.post("/requests/ended", content=body).status_code == 400
    without = TestClient(create_app(SimpleNamespace(journal=None)))  # type: ignore[arg-type]
    assert without.post("/requests/ended", json={"request_ids": ["a"]}).json() == {"ended": []}
