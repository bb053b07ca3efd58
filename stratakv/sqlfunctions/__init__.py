"""Puts the SQL functions (`stratakv.infer` and its kin) into a user's database, and takes them out again.

Called by `stratakv install | uninstall`, by `stratakv up` and by tests. Keeps nothing.
"""

from stratakv.sqlfunctions.address import ListenerAddress
from stratakv.sqlfunctions.install import Installed, install, uninstall

__all__ = ["Installed", "ListenerAddress", "install", "uninstall"]
