"""Tenants: keys, roles, limits, quotas, and a log of every change to them.

Revision: 0008
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TENANTS = """
ALTER TABLE stratakv.tenants
    ALTER COLUMN salt SET DEFAULT gen_random_uuid()::text,
    ADD COLUMN shares_cache boolean NOT NULL DEFAULT false,
    ADD COLUMN weight integer NOT NULL DEFAULT 100 CHECK (weight BETWEEN 1 AND 10000),
    ADD COLUMN permissions text[] NOT NULL DEFAULT '{infer}' CHECK (permissions <@ '{infer,pin,admin}'),
    ADD COLUMN models text[],
    ADD COLUMN networks inet[],
    ADD COLUMN is_enabled boolean NOT NULL DEFAULT true,
    ADD COLUMN deleted_at timestamptz;
UPDATE stratakv.tenants SET shares_cache = true WHERE name = 'default';
COMMENT ON TABLE stratakv.tenants IS
    'Who is served. salt scopes the KV of a tenant, unless it shares_cache: all that do share theirs. models, networks: NULL is '
    'any. A deleted one stays while usage names it.';

CREATE TABLE stratakv.api_keys (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id    bigint NOT NULL REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    name         text NOT NULL,
    prefix       text NOT NULL UNIQUE,
    key_hash     bytea NOT NULL UNIQUE,
    permissions  text[] CHECK (permissions <@ '{infer,pin,admin}'),
    models       text[],
    networks     inet[],
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    revoked_at   timestamptz
);
CREATE INDEX api_keys_by_tenant ON stratakv.api_keys (tenant_id);
COMMENT ON TABLE stratakv.api_keys IS
    'SHA-256 of keys of 256 random bits; prefix is what may be shown. permissions, models, networks: NULL is the tenant''s, else '
    'only what both allow.';

CREATE TABLE stratakv.tenant_roles (
    cluster      text NOT NULL,
    role_name    text NOT NULL,
    role_oid     bigint NOT NULL,
    tenant_id    bigint NOT NULL REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (cluster, role_name)
);
CREATE INDEX tenant_roles_by_tenant ON stratakv.tenant_roles (tenant_id);
COMMENT ON TABLE stratakv.tenant_roles IS
    'PostgreSQL roles that log in for a tenant: system identifier of the cluster, name, OID. A role with another OID is another '
    'role, for which this says nothing.';

CREATE TABLE stratakv.tenant_limits (
    tenant_id            bigint PRIMARY KEY REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    requests_per_minute  bigint CHECK (requests_per_minute BETWEEN 0 AND 1000000000000),
    tokens_per_minute    bigint CHECK (tokens_per_minute BETWEEN 0 AND 1000000000000),
    parallel_requests    bigint CHECK (parallel_requests BETWEEN 0 AND 1000000000000),
    tokens_per_month     bigint CHECK (tokens_per_month BETWEEN 0 AND 1000000000000),
    cached_token_micros  integer NOT NULL DEFAULT 1000000 CHECK (cached_token_micros BETWEEN 0 AND 1000000),
    cache_memory_bytes   bigint CHECK (cache_memory_bytes >= 0),
    cache_disk_bytes     bigint CHECK (cache_disk_bytes >= 0)
);
COMMENT ON TABLE stratakv.tenant_limits IS
    'NULL is no limit. cached_token_micros: what a prompt token counts whose KV was cached, in millionths. The cache_ columns are '
    'noted, not enforced.';
"""

QUOTAS = """
CREATE TABLE stratakv.quota_nodes (
    node        text PRIMARY KEY,
    started_at  timestamptz NOT NULL DEFAULT now(),
    seen_at     timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE stratakv.quota_nodes IS 'Starts of DB nodes that hold leases or reservations; one that is not here has none.';

CREATE TABLE stratakv.quota_state (
    tenant_id     bigint NOT NULL REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    kind          text NOT NULL CHECK (kind IN ('requests_minute', 'tokens_minute', 'parallel', 'tokens_month')),
    spent_micros  bigint NOT NULL DEFAULT 0 CHECK (spent_micros >= 0),
    held_micros   bigint NOT NULL DEFAULT 0 CHECK (held_micros >= 0),
    at            timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, kind)
);
COMMENT ON TABLE stratakv.quota_state IS
    'What is taken of each limit, in millionths of a request or token. spent was charged: that of a minute leaks at the rate of '
    'the limit, as of at, and that of a month begins anew in UTC. held is reserved or leased, and does not leak.';

CREATE FUNCTION stratakv.quota_spent(kind text, spent_micros bigint, at timestamptz, per_minute bigint) RETURNS bigint
LANGUAGE sql VOLATILE AS $$
    SELECT CASE
        WHEN kind LIKE '%minute' THEN
            greatest(0, spent_micros - floor(greatest(0, extract(epoch FROM clock_timestamp() - at)) * per_minute * 1000000 / 60))
        WHEN kind = 'tokens_month' AND date_trunc('month', at AT TIME ZONE 'UTC')
            <> date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC') THEN 0
        ELSE spent_micros END::bigint
$$;
COMMENT ON FUNCTION stratakv.quota_spent(text, bigint, timestamptz, bigint) IS 'What is left now of what was spent as of at.';

CREATE FUNCTION stratakv.quota_limit(kind text, of_tenant stratakv.tenant_limits) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE kind
        WHEN 'requests_minute' THEN of_tenant.requests_per_minute
        WHEN 'tokens_minute' THEN of_tenant.tokens_per_minute
        WHEN 'parallel' THEN of_tenant.parallel_requests
        ELSE of_tenant.tokens_per_month END
$$;
COMMENT ON FUNCTION stratakv.quota_limit(text, stratakv.tenant_limits) IS 'Of one kind, in requests or tokens; NULL: none.';

CREATE TABLE stratakv.quota_leases (
    node           text NOT NULL REFERENCES stratakv.quota_nodes (node),
    tenant_id      bigint NOT NULL REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    kind           text NOT NULL,
    amount_micros  bigint NOT NULL CHECK (amount_micros >= 0),
    PRIMARY KEY (node, tenant_id, kind)
);
COMMENT ON TABLE stratakv.quota_leases IS
    'Of quota_state.held, what a DB node has taken and not yet reserved for a request.';

CREATE TABLE stratakv.reservations (
    request_id       text PRIMARY KEY,
    node             text NOT NULL,
    tenant_id        bigint NOT NULL REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    kinds            text[] NOT NULL DEFAULT '{}',
    reserved_micros  bigint NOT NULL CHECK (reserved_micros >= 0),
    charged_micros   bigint,
    state            text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'settled', 'unsettled')),
    created_at       timestamptz NOT NULL DEFAULT now(),
    ended_at         timestamptz,
    CHECK (charged_micros BETWEEN 0 AND reserved_micros)
);
CREATE INDEX reservations_open ON stratakv.reservations (node) WHERE state = 'open';
CREATE INDEX reservations_unsettled ON stratakv.reservations (ended_at) WHERE state = 'unsettled';
CREATE INDEX reservations_ended ON stratakv.reservations (ended_at) WHERE state = 'settled';
COMMENT ON TABLE stratakv.reservations IS
    'Tokens, in millionths, of requests of tenants with limits, held in quota_state of these kinds. unsettled: the DB node is gone '
    'and no worker knows what it took; charged as reserved.';
"""

AUDIT = """
CREATE TABLE stratakv.audit_log (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at       timestamptz NOT NULL DEFAULT now(),
    actor    text NOT NULL,
    db_role  text NOT NULL DEFAULT session_user,
    action   text NOT NULL,
    object   text NOT NULL,
    tenant   text,
    before   jsonb,
    after    jsonb
);
CREATE INDEX audit_log_at ON stratakv.audit_log (at);
COMMENT ON TABLE stratakv.audit_log IS 'Every change of tenants, keys, roles and limits, without salts and hashes.';

CREATE TABLE stratakv.tenancy_version (
    is_row   boolean PRIMARY KEY DEFAULT true CHECK (is_row),
    version  bigint NOT NULL DEFAULT 0
);
INSERT INTO stratakv.tenancy_version DEFAULT VALUES;
COMMENT ON TABLE stratakv.tenancy_version IS
    'Counts changes of tenants, keys, roles and limits, so that DB nodes see that there is one.';

CREATE FUNCTION stratakv.note_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    old_row jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - '{salt,key_hash}'::text[] END;
    new_row jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - '{salt,key_hash}'::text[] END;
    its_row jsonb := coalesce(new_row, old_row);
BEGIN
    INSERT INTO stratakv.audit_log (actor, action, object, tenant, before, after) VALUES (
        coalesce(nullif(current_setting('stratakv.actor', true), ''), session_user), lower(TG_OP), TG_TABLE_NAME,
        CASE TG_TABLE_NAME WHEN 'tenants' THEN its_row ->> 'name'
             ELSE (SELECT name FROM stratakv.tenants WHERE id = (its_row ->> 'tenant_id')::bigint) END,
        old_row, new_row);
    UPDATE stratakv.tenancy_version SET version = version + 1;
    PERFORM pg_notify('stratakv_tenancy', '');
    RETURN NULL;
END $$;
"""

AUDITED = ("tenants", "api_keys", "tenant_roles", "tenant_limits")


def upgrade() -> None:
    op.execute(TENANTS)
    op.execute(QUOTAS)
    op.execute(AUDIT)
    for table in AUDITED:
        op.execute(
            f"CREATE TRIGGER note_change AFTER INSERT OR UPDATE OR DELETE ON stratakv.{table}"
            " FOR EACH ROW EXECUTE FUNCTION stratakv.note_change()"
        )


def downgrade() -> None:
    op.execute("DROP FUNCTION stratakv.note_change CASCADE")
    op.execute(
        "DROP FUNCTION stratakv.quota_limit, stratakv.quota_spent;"
        "DROP TABLE stratakv.tenancy_version, stratakv.audit_log, stratakv.reservations, stratakv.quota_leases,"
        " stratakv.quota_state, stratakv.quota_nodes, stratakv.tenant_limits, stratakv.tenant_roles, stratakv.api_keys"
    )
    op.execute(
        "ALTER TABLE stratakv.tenants ALTER COLUMN salt SET DEFAULT '', DROP COLUMN shares_cache, DROP COLUMN weight,"
        " DROP COLUMN permissions, DROP COLUMN models, DROP COLUMN networks, DROP COLUMN is_enabled, DROP COLUMN deleted_at"
    )
