"""Rules of namespaces: time to live, room in each tier, kept.

Revision: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE stratakv.cache_rules (
    namespace         bytea PRIMARY KEY,
    ttl_s             double precision NOT NULL,
    memory_bytes_max  bigint NOT NULL,
    disk_bytes_max    bigint NOT NULL,
    is_kept           boolean NOT NULL,
    changed_at        timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE stratakv.cache_rules IS 'What operators have said of namespaces; 0 is no limit.';
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("DROP TABLE stratakv.cache_rules")
