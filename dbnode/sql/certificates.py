"""Certificates: what channel binding takes from one, and one of our own making. Free of I/O."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_WEAK_HASHES = ("md5", "sha1")
_VALID_DAYS = 3650


def end_point_digest(certificate: bytes) -> bytes | None:
    """tls-server-end-point (RFC 5929) of a DER certificate; None if its signature names no hash, as with Ed25519."""
    try:
        algorithm = x509.load_der_x509_certificate(certificate).signature_hash_algorithm
    except (ValueError, UnsupportedAlgorithm):
        return None
    if algorithm is None:
        return None
    name = "sha256" if algorithm.name in _WEAK_HASHES else algorithm.name.replace("-", "_")
    return hashlib.new(name, certificate).digest()


def first_certificate(pem: bytes) -> bytes:
    """DER of the first certificate in a chain. Raises ValueError."""
    return x509.load_pem_x509_certificates(pem)[0].public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """A certificate that nobody signed but itself, and its key; both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def make_certificate(name: str) -> OwnCertificate:
    """For a server whose clients know it by channel binding instead of a signature."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)  # clocks differ
        .not_valid_after(now + _VALID_DAYS * day)
        .sign(key, hashes.SHA256())
    )
    return OwnCertificate(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
