"""What channel binding takes from certificates, against OpenSSL's own reckoning."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

from dbnode.sql.certificates import end_point_digest, first_certificate, make_certificate
from dbnode.sql.server_tls import own_tls
from tests.certificates import write_certificate


def test_digest_is_made_with_the_hash_of_the_signature(tmp_path: Path) -> None:
    certificate = first_certificate(write_certificate(tmp_path, "a").certificate.read_bytes())
    assert end_point_digest(certificate) == hashlib.sha384(certificate).digest()


def test_certificate_without_a_hash_cannot_be_bound_to(tmp_path: Path) -> None:
    certificate = first_certificate(write_certificate(tmp_path, "a", hashless=True).certificate.read_bytes())
    assert end_point_digest(certificate) is None
    assert end_point_digest(b"no certificate") is None


def test_own_certificate_is_usable_new_each_time_and_bound_to() -> None:
    made = make_certificate("some listener")
    der = first_certificate(made.certificate)
    assert ssl.PEM_cert_to_DER_cert(made.certificate.decode()) == der
    one, other = own_tls("some listener"), own_tls("some listener")
    assert one.end_point.digest is not None
    assert one.end_point != other.end_point
    assert b"PRIVATE" not in repr(made).encode()
