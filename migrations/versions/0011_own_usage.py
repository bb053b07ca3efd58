"""What tenants see of their own usage and limits, in the database that has them: row-level security, and views.

Revision: 0011
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None
compatible = "0007"

TENANT = """
CREATE FUNCTION stratakv.session_tenant() RETURNS bigint
LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT t.id
    FROM stratakv.tenant_roles m
    JOIN pg_catalog.pg_roles r ON r.rolname = m.role_name AND r.oid = m.role_oid
    JOIN stratakv.tenants t ON t.id = m.tenant_id AND t.deleted_at IS NULL
    WHERE m.role_name = session_user
      AND m.cluster = (SELECT system_identifier::text FROM pg_catalog.pg_control_system())
$$;
COMMENT ON FUNCTION stratakv.session_tenant() IS
    'The tenant that the role of this session logs in for, whatever SET ROLE says; NULL for all others, and for another role '
    'that has come to the name.';
"""

GUARDED = ("usage_history", "usage_daily", "tenant_limits", "quota_state")
"""All may ask, and get the rows of their tenant. Who may write sees all: services, and the schema's owner."""

VIEWS = """
DROP VIEW IF EXISTS stratakv.my_usage, stratakv.my_requests, stratakv.my_limits;

CREATE VIEW stratakv.my_usage WITH (security_invoker, security_barrier) AS
    SELECT day, model, source, requests, cancelled, failed, prompt_tokens, cached_l1_tokens, cached_l2_tokens,
           cached_pool_tokens, cached_disk_tokens, generated_tokens
    FROM stratakv.usage_daily WHERE tenant_id = (SELECT stratakv.session_tenant());
COMMENT ON VIEW stratakv.my_usage IS 'Usage of the tenant that this session''s role logs in for, by day in UTC';

CREATE VIEW stratakv.my_requests WITH (security_invoker, security_barrier) AS
    SELECT created_at, request_id, model, source, outcome, prompt_tokens, cached_l1_tokens, cached_l2_tokens,
           cached_pool_tokens, cached_disk_tokens, generated_tokens, queue_ms, ttft_ms, generation_ms, mean_itl_ms
    FROM stratakv.usage_history WHERE tenant_id = (SELECT stratakv.session_tenant());
COMMENT ON VIEW stratakv.my_requests IS 'Single requests of the tenant that this session''s role logs in for';

CREATE VIEW stratakv.limits_in_use WITH (security_invoker, security_barrier) AS
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
    WHERE k.maximum IS NOT NULL;
COMMENT ON VIEW stratakv.limits_in_use IS
    'Limits of tenants, and what is taken of them: used, reserved, and held by DB nodes for requests to come';

CREATE VIEW stratakv.my_limits WITH (security_invoker, security_barrier) AS
    SELECT "limit", maximum, used FROM stratakv.limits_in_use WHERE tenant_id = (SELECT stratakv.session_tenant());
COMMENT ON VIEW stratakv.my_limits IS
    'Limits of the tenant that this session''s role logs in for, and what is taken of them';

GRANT USAGE ON SCHEMA stratakv TO PUBLIC;
GRANT SELECT ON stratakv.my_usage, stratakv.my_requests, stratakv.my_limits, stratakv.limits_in_use TO PUBLIC;
"""


def upgrade() -> None:
    op.execute(TENANT)
    for table in GUARDED:
        op.execute(f"ALTER TABLE stratakv.{table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        op.execute(
            f"CREATE POLICY services ON stratakv.{table} USING (has_table_privilege('stratakv.{table}', 'INSERT'))"
        )
        op.execute(
            f"CREATE POLICY own_tenant ON stratakv.{table} FOR SELECT"
            " USING (tenant_id = (SELECT stratakv.session_tenant()))"
        )
        op.execute(f"GRANT SELECT ON stratakv.{table} TO PUBLIC")
    op.execute(VIEWS)


def downgrade() -> None:
    op.execute("DROP VIEW stratakv.my_usage, stratakv.my_requests, stratakv.my_limits, stratakv.limits_in_use")
    for table in GUARDED:
        op.execute(f"REVOKE SELECT ON stratakv.{table} FROM PUBLIC")
        op.execute(f"DROP POLICY own_tenant ON stratakv.{table}")
        op.execute(f"DROP POLICY services ON stratakv.{table}")
        op.execute(f"ALTER TABLE stratakv.{table} NO FORCE ROW LEVEL SECURITY, DISABLE ROW LEVEL SECURITY")
    op.execute("DROP FUNCTION stratakv.session_tenant()")
