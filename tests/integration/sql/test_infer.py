"""infer() in statements, through the relay and without it."""

from __future__ import annotations

import subprocess

import psycopg


def test_psql_gets_the_answer_through_the_relay(url: str) -> None:
    done = subprocess.run(
        ["psql", url, "-XAtc", "SELECT infer('abc')"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "cba\n"


def test_direct_session_gets_the_answer(direct_url: str) -> None:
    with psycopg.connect(direct_url) as connection:
        assert connection.execute("SELECT stratakv.infer('abc')").fetchone() == ("cba",)
