"""Puts the SQL functions (`stratakv.infer` and its kin) into a user's database, and takes them out again.

Called by `stratakv install | uninstall`, by `stratakv up` and by tests. Keeps nothing.
"""

from stratakv.sqlfunctions.address import KEY_FILE, ListenerAddress, kept_key
from stratakv.sqlfunctions.install import Installed, NotAllowed, install, is_installed, uninstall

__all__ = [
    "KEY_FILE",
    "Installed",
    "ListenerAddress",
    "NotAllowed",
    "install",
    "is_installed",
    "kept_key",
    "uninstall",
]
