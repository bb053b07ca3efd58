"""Statistics of statements that call infer().

Revision: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE stratakv.sql_statements (
    role                text NOT NULL,
    database            text NOT NULL,
    fingerprint         bytea NOT NULL,
    query               text,
    calls               bigint NOT NULL,
    infer_calls         bigint NOT NULL,
    distinct_prompts    bigint NOT NULL,
    memo_hits           bigint NOT NULL,
    prompt_tokens       bigint NOT NULL,
    cached_l1_tokens    bigint NOT NULL,
    cached_l2_tokens    bigint NOT NULL,
    cached_pool_tokens  bigint NOT NULL,
    generated_tokens    bigint NOT NULL,
    wait_ms             double precision NOT NULL,
    errors              bigint NOT NULL,
    first_seen          timestamptz NOT NULL,
    last_seen           timestamptz NOT NULL,
    PRIMARY KEY (role, database, fingerprint)
);
CREATE INDEX sql_statements_last_seen ON stratakv.sql_statements (last_seen);
COMMENT ON TABLE stratakv.sql_statements IS
    'Sums over executions, added to by all DB nodes. query has no literals; NULL and an empty fingerprint: not known.';
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("DROP TABLE stratakv.sql_statements")
