"""What a worker refuses is told to the client as what it is."""

from __future__ import annotations

import pytest

import dbnode.sql.commands  # noqa: F401  kinds of invalid requests that no worker tells of
from dbnode.worker_client import told
from dbnode.worker_messages import WorkerError
from stratakv.errors import ContextTooLong, InvalidRequest, ModelNotFound


@pytest.mark.parametrize("kind", [InvalidRequest, ContextTooLong, ModelNotFound])
def test_a_clients_mistake_is_of_its_own_kind(kind: type[InvalidRequest]) -> None:
    said = WorkerError("too much", kind.openai_type, kind.code, "prompt")
    error = told("http://worker", said, kind.http_status)
    assert type(error) is kind
    assert (error.message, error.param) == ("too much", "prompt")


def test_a_mistake_without_a_code_is_an_invalid_request() -> None:
    assert type(told("http://worker", WorkerError("bad"), 422)) is InvalidRequest
