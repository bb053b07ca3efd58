"""The salt of a tenant and the salt of a request made one, such that no two pairs make the same."""

from __future__ import annotations

import hashlib

MARK = "t1:"
"""What every made salt begins with."""


def combined_salt(tenant_salt: str, request_salt: str | None) -> str | None:
    """What enters the first block's key; None: nothing.

    The salts of requests of tenants that share stay as they are, so that other clients of the same workers meet them. Those that
    look like a made one are made too; so what is made meets nothing else, and two that are made differ as their pairs do.
    """
    if not tenant_salt and not (request_salt or "").startswith(MARK):
        return request_salt
    owner = tenant_salt.encode()
    given = b"-" if request_salt is None else b"=" + request_salt.encode(errors="surrogatepass")
    return MARK + hashlib.sha256(b"%d:%b%b" % (len(owner), owner, given)).hexdigest()
