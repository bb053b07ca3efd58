"""Statistics of statements by cluster, tenant, and role with its OID.

The table of the first release knows roles by their name only. Services of that release go on with it; what it has cannot be
said to be anybody's, and is not taken over.

Revision: 0013
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None
compatible = "0007"

TABLE = """
CREATE TABLE stratakv.statements (
    cluster             text NOT NULL,
    tenant_id           bigint NOT NULL REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    role                text NOT NULL,
    role_oid            bigint NOT NULL,
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
    PRIMARY KEY (cluster, tenant_id, role_oid, role, database, fingerprint)
);
CREATE INDEX statements_last_seen ON stratakv.statements (last_seen);
CREATE INDEX statements_by_tenant ON stratakv.statements (tenant_id);
COMMENT ON TABLE stratakv.statements IS
    'Sums over executions, added to by all DB nodes. role is as SET ROLE has it, tenant_id whom the login stood for. query has '
    'no literals; NULL and an empty fingerprint: not known. An empty cluster or OID 0: the functions did not tell.';
COMMENT ON TABLE stratakv.sql_statements IS 'Written by services of the first release only; stratakv.statements is read.';
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("DROP TABLE stratakv.statements")
    op.execute(
        "COMMENT ON TABLE stratakv.sql_statements IS"
        " 'Sums over executions, added to by all DB nodes. query has no literals; NULL and an empty fingerprint: not known.'"
    )
