"""Proofs of membership: for one secret, one purpose, one request, once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.errors import SetupError
from stratakv.pool import auth
from stratakv.pool.auth import PoolCredentials, RequestChecker, RequestSigner
from stratakv.pool.errors import NotAMember
from stratakv.settings import PoolSettings, Secret

SECRET = "correct horse battery staple"
URL = "http://worker:8100"


def _signed_for(checker: RequestChecker, *request: object) -> str:
    signer = RequestSigner(PoolCredentials(SECRET))
    first = signer.sign(URL, *request)  # type: ignore[arg-type]
    assert signer.learn(URL, first, checker.challenge_header)
    return signer.sign(URL, *request).headers["Authorization"]  # type: ignore[arg-type]


def test_no_secret_means_no_credentials() -> None:
    assert PoolCredentials.from_settings(PoolSettings()) is None


def test_a_short_secret_is_refused_and_none_is_ever_shown() -> None:
    with pytest.raises(SetupError, match="16 are the least"):
        PoolCredentials("guess me")
    assert SECRET not in repr(PoolCredentials.from_settings(PoolSettings(Secret(SECRET))))


def test_keys_differ_by_secret_and_role() -> None:
    ours, theirs = PoolCredentials(SECRET), PoolCredentials(SECRET + "!")
    keys = {pool.curve_keys(role).secret for pool in (ours, theirs) for role in ("server", "client")}
    assert len(keys) == 4
    assert ours.curve_keys("server") == PoolCredentials(SECRET).curve_keys("server")


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_a_proof_is_for_exactly_its_parts(parts: list[bytes], others: list[bytes]) -> None:
    pool = PoolCredentials(SECRET)
    assert (pool.proof("daemon", *parts) == pool.proof("daemon", *others)) == (parts == others)
    assert pool.proof("daemon", *parts) != pool.proof("member", *parts)


def test_a_request_is_taken_once() -> None:
    checker = RequestChecker(PoolCredentials(SECRET))
    authorization = _signed_for(checker, "POST", "/v1/completions", b"{}")
    checker.check(authorization, "POST", "/v1/completions", b"{}")
    with pytest.raises(NotAMember, match="before"):
        checker.check(authorization, "POST", "/v1/completions", b"{}")


@pytest.mark.parametrize(
    "request_", [("GET", "/v1/completions", b"{}"), ("POST", "/cache/drop", b"{}"), ("POST", "/v1/completions", b"{ }")]
)
def test_a_proof_does_not_serve_another_request(request_: tuple[str, str, bytes]) -> None:
    checker = RequestChecker(PoolCredentials(SECRET))
    authorization = _signed_for(checker, "POST", "/v1/completions", b"{}")
    with pytest.raises(NotAMember):
        checker.check(authorization, *request_)


@pytest.mark.parametrize(
    "authorization", [None, "", "StrataKV", "StrataKV zz", "Bearer " + "0" * 96, "StrataKV " + "0" * 96]
)
def test_what_is_no_proof_is_refused(authorization: str | None) -> None:
    with pytest.raises(NotAMember):
        RequestChecker(PoolCredentials(SECRET)).check(authorization, "GET", "/load", b"")


def test_a_full_memory_of_requests_ends_the_challenge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "PROOFS_MAX", 1)
    checker = RequestChecker(PoolCredentials(SECRET))
    before = checker.challenge_header
    used = [_signed_for(checker, "GET", "/load", b"") for _ in range(2)]
    for authorization in used:
        checker.check(authorization, "GET", "/load", b"")
    assert checker.challenge_header != before
    for authorization in used:
        with pytest.raises(NotAMember):
            checker.check(authorization, "GET", "/load", b"")


def test_a_refusal_is_answered_only_if_it_brings_a_new_challenge() -> None:
    signer, checker = RequestSigner(PoolCredentials(SECRET)), RequestChecker(PoolCredentials(SECRET))
    first = signer.sign(URL, "GET", "/load", b"")
    assert signer.learn(URL, first, checker.challenge_header)
    assert signer.learn(URL, first, checker.challenge_header), "another request may have learnt it meanwhile"
    second = signer.sign(URL, "GET", "/load", b"")
    assert not signer.learn(URL, second, checker.challenge_header)
    for header in (None, "Basic", "Bearer " + "0" * 32, "StrataKV no hex", "StrataKV 00"):
        assert not signer.learn(URL, second, header)
