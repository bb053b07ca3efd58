"""Accounts of the KVCM API.

Revision: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE stratakv.kvcm_accounts (
    user_name      text PRIMARY KEY,
    role           integer NOT NULL,
    password_hash  text NOT NULL
);
COMMENT ON TABLE stratakv.kvcm_accounts IS 'Accounts of the KVCM API; passwords are hashed by scrypt, with a salt each.';
CREATE TRIGGER check_meta_term BEFORE INSERT OR UPDATE OR DELETE ON stratakv.kvcm_accounts
    FOR EACH STATEMENT EXECUTE FUNCTION stratakv.check_meta_term();
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("DROP TABLE stratakv.kvcm_accounts")
