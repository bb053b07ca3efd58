"""Segments on disk: whose daemon keeps them.

Revision: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE stratakv.segments ADD COLUMN disk_of text NOT NULL DEFAULT ''")
    op.execute("COMMENT ON COLUMN stratakv.segments.disk_of IS 'For a disk: the node whose daemon keeps it.'")


def downgrade() -> None:
    # What lies on disks means nothing to the release before.
    op.execute("UPDATE stratakv.segments SET state = 'dead', died_at = now() WHERE disk_of <> '' AND state = 'live'")
    op.execute("ALTER TABLE stratakv.segments DROP COLUMN disk_of")
