"""`stratakv version`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from stratakv import wire
from stratakv.cli.options import JsonOption, print_json


def version(as_json: JsonOption = False) -> None:
    """The versions of StrataKV, of its wire protocol and of Python."""
    try:
        own = installed_version("stratakv")
    except PackageNotFoundError:
        own = "not installed"
    found = {"stratakv": own, "protocol": wire.PROTOCOL_VERSION, "python": platform.python_version()}
    if as_json:
        print_json(found)
    else:
        print(f"stratakv {own} (protocol {wire.PROTOCOL_VERSION}, Python {found['python']})")
