"""Whose the blocks of the pool are, and what each tenant has there.

Revision: 0014
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None
compatible = "0007"

OWNER = """
ALTER TABLE stratakv.put_sessions ADD COLUMN owner bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN stratakv.put_sessions.owner IS 'The tenant that had the blocks computed; 0: none. Also of those in replicas.';
"""

USED = """
CREATE TABLE stratakv.cache_usage (
    tenant_id     bigint PRIMARY KEY REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    memory_bytes  bigint NOT NULL,
    disk_bytes    bigint NOT NULL
);
COMMENT ON TABLE stratakv.cache_usage IS
    'What tenants have in the pool, as the meta servers last told a DB node. The truth is in put_sessions and replicas.';
COMMENT ON TABLE stratakv.tenant_limits IS
    'NULL is no limit. cached_token_micros: what a prompt token counts whose KV was cached, in millionths. The cache_ columns hold '
    'for blocks in the pool: of a tenant that has more, its own coldest leave.';
ALTER TABLE stratakv.cache_usage ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY services ON stratakv.cache_usage USING (has_table_privilege('stratakv.cache_usage', 'INSERT'));
CREATE POLICY own_tenant ON stratakv.cache_usage FOR SELECT USING (tenant_id = (SELECT stratakv.session_tenant()));
GRANT SELECT ON stratakv.cache_usage TO PUBLIC;
"""

REQUESTS_IN_USE = """
    SELECT l.tenant_id, k.name AS "limit", k.maximum,
           ceil((coalesce(s.held_micros, 0) + coalesce(stratakv.quota_spent(k.kind, s.spent_micros, s.at, k.maximum), 0))
               / 1000000.0)::bigint AS used
    FROM stratakv.tenant_limits l
    CROSS JOIN LATERAL (VALUES
        ('requests_per_minute', 'requests_minute', l.requests_per_minute),
        ('tokens_per_minute', 'tokens_minute', l.tokens_per_minute),
        ('parallel_requests', 'parallel', l.parallel_requests),
        ('tokens_per_month', 'tokens_month', l.tokens_per_month)) AS k (name, kind, maximum)
    LEFT JOIN stratakv.quota_state s ON s.tenant_id = l.tenant_id AND s.kind = k.kind
    WHERE k.maximum IS NOT NULL"""
CACHE_IN_USE = """
    SELECT l.tenant_id, k.name, k.maximum, coalesce(k.used, 0)
    FROM stratakv.tenant_limits l
    LEFT JOIN stratakv.cache_usage u ON u.tenant_id = l.tenant_id
    CROSS JOIN LATERAL (VALUES
        ('cache_memory_bytes', l.cache_memory_bytes, u.memory_bytes),
        ('cache_disk_bytes', l.cache_disk_bytes, u.disk_bytes)) AS k (name, maximum, used)
    WHERE k.maximum IS NOT NULL"""
VIEW = "CREATE OR REPLACE VIEW stratakv.limits_in_use WITH (security_invoker, security_barrier) AS"


def upgrade() -> None:
    op.execute(OWNER)
    op.execute(USED)
    op.execute(f"{VIEW}{REQUESTS_IN_USE} UNION ALL{CACHE_IN_USE}")


def downgrade() -> None:
    op.execute(f"{VIEW}{REQUESTS_IN_USE}")
    op.execute("DROP TABLE stratakv.cache_usage")
    op.execute("ALTER TABLE stratakv.put_sessions DROP COLUMN owner")
