"""The file of verifiers: read whole or refused, and never shown."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.auth_file import parse_auth_file
from dbnode.sql.scram import Verifier
from stratakv.errors import SetupError

VERIFIER = Verifier.of("pencil", b"salt")
TEXT = "SCRAM-SHA-256$4096:" + ":".join(
    (
        base64.b64encode(VERIFIER.salt).decode() + "$" + base64.b64encode(VERIFIER.stored_key).decode(),
        base64.b64encode(VERIFIER.server_key).decode(),
    )
)
names = st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(names, unique=True, max_size=5))
def test_every_name_is_found_again(users: list[str]) -> None:
    lines = ['"{}" "{}"'.format(user.replace('"', '""'), TEXT) for user in users]
    assert parse_auth_file("; a comment\n\n" + "\n".join(lines)) == dict.fromkeys(users, VERIFIER)


@pytest.mark.parametrize("secret", ["password", "md5" + "0" * 32, TEXT[:-4], TEXT + "=", "", TEXT.replace("4096", "x")])
def test_a_secret_that_is_no_verifier_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(SetupError, match='line 2: the secret of "ada"') as caught:
        parse_auth_file(f'\n"ada" "{secret}"\n')
    assert not secret or secret not in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(SetupError):
        parse_auth_file(text)
