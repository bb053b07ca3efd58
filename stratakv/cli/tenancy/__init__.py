"""`stratakv tenant`, `stratakv key`, `stratakv quota`: who is served, by which keys and roles, and how much. A file per command."""

from stratakv.cli.tenancy.keys import app as key
from stratakv.cli.tenancy.quotas import app as quota
from stratakv.cli.tenancy.tenants import app as tenant

__all__ = ["key", "quota", "tenant"]
