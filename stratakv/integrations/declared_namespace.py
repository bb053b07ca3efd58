"""The option `namespace_id` of the integrations: exactly this namespace, whatever the engine's facts would make of it."""

from __future__ import annotations

from stratakv.errors import SetupError
from stratakv.keys import NAMESPACE_BYTES, Namespace


def declared_namespace(digits: str, place: str) -> Namespace | None:
    """None if the operator has declared none. `place` is where the option stands. Raises SetupError."""
    if not digits:
        return None
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        raw = b""
    if len(raw) != NAMESPACE_BYTES:
        raise SetupError(f"{place}: namespace_id must be {2 * NAMESPACE_BYTES} hexadecimal digits")
    return Namespace(raw)
