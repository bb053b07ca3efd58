"""`stratakv version`."""

from __future__ import annotations

import platform

from stratakv import wire
from stratakv.cli.options import JsonOption, print_json
from stratakv.version import version as own_version


def version(as_json: JsonOption = False) -> None:
    """The versions of StrataKV, of its wire protocol and of Python."""
    found = {"stratakv": own_version(), "protocol": wire.PROTOCOL_VERSION, "python": platform.python_version()}
    if as_json:
        print_json(found)
    else:
        print(f"stratakv {found['stratakv']} (protocol {found['protocol']}, Python {found['python']})")
