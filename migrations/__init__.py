"""Alembic revisions of the metadata schema; run by `stratakv.migrate`."""
