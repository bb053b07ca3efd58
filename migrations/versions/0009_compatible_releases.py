"""Which releases may work on the schema: the oldest one's revision, beside the schema's own.

Revision: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None
compatible = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE stratakv.schema_version ADD COLUMN compatible text")
    op.execute(
        "COMMENT ON COLUMN stratakv.schema_version.compatible IS"
        " 'Services of releases that need this revision, or a later one, may work on the schema.'"
    )


def downgrade() -> None:
    op.execute("ALTER TABLE stratakv.schema_version DROP COLUMN compatible")
