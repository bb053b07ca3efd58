"""A listener's certificate and key as files, checked before anything listens."""

from __future__ import annotations

import ssl
import stat
from dataclasses import dataclass
from pathlib import Path

from stratakv.errors import SetupError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM; the certificate with its chain, the key not encrypted."""

    certificate: Path
    key: Path

    @classmethod
    def load(cls, certificate: Path | None, key: Path | None, setting: str) -> TlsFiles | None:
        """None if neither is set; `setting` is what both names begin with. Raises SetupError."""
        names = f"{setting}_cert, {setting}_key"
        if certificate is None and key is None:
            return None
        if certificate is None or key is None:
            raise SetupError(f"{names} go together: one of them is not set")
        try:
            certificate.open("rb").close()  # load_cert_chain would not say which file is missing
            if stat.S_IMODE(key.stat().st_mode) & _OTHERS:
                raise SetupError(f"{setting}_key: {key} may be read by others", hint=f"chmod 600 {key}")
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
        except ssl.SSLError as error:
            raise SetupError(
                f"{names}: {certificate} and {key} are no certificate and its key",
                hint=f"OpenSSL says: {error.reason or error}; the key must not be encrypted.",
            ) from error
        except OSError as error:
            raise SetupError(f"{names}: {error.filename}: {error.strerror}") from error
        return cls(certificate, key)


def _no_password() -> str:
    """Else OpenSSL would ask at the terminal."""
    return ""
