-- name: set_actor
-- Who the log of changes names.
SELECT set_config('stratakv.actor', %(actor)s, true)

-- name: tenants
-- All, or one by name; those that were deleted only if usage still names them and they are asked for.
SELECT
    t.id, t.name, t.shares_cache, t.weight, t.permissions, t.models, t.networks::text[] AS networks, t.is_enabled, t.created_at,
    t.deleted_at,
    (SELECT count(*) FROM stratakv.api_keys k WHERE k.tenant_id = t.id AND k.revoked_at IS NULL
        AND coalesce(k.expires_at > now(), true)) AS num_keys,
    (SELECT count(*) FROM stratakv.tenant_roles r WHERE r.tenant_id = t.id) AS num_roles
FROM stratakv.tenants t
WHERE (%(name)s::text IS NULL AND (%(deleted)s OR t.deleted_at IS NULL)) OR (t.name = %(name)s AND t.deleted_at IS NULL)
ORDER BY t.name

-- name: create_tenant
-- The salt comes of itself.
INSERT INTO stratakv.tenants (name) VALUES (%(name)s) RETURNING id

-- name: delete_tenant
-- With its keys, roles, limits and reservations; fails while usage names it.
DELETE FROM stratakv.tenants WHERE id = %(id)s

-- name: bury_tenant
-- It stays for those that name it, and serves nobody.
UPDATE stratakv.tenants SET is_enabled = false, deleted_at = now() WHERE id = %(id)s

-- name: delete_keys
-- All of a tenant.
DELETE FROM stratakv.api_keys WHERE tenant_id = %(id)s

-- name: delete_roles
-- All of a tenant.
DELETE FROM stratakv.tenant_roles WHERE tenant_id = %(id)s

-- name: delete_limits
-- All of a tenant.
DELETE FROM stratakv.tenant_limits WHERE tenant_id = %(id)s

-- name: keys
-- Of all tenants or one, or one key by its prefix.
SELECT
    k.prefix, k.name, t.name AS tenant, k.permissions, k.models, k.networks::text[] AS networks, k.created_at, k.expires_at,
    k.revoked_at,
    CASE WHEN k.revoked_at IS NOT NULL THEN 'revoked' WHEN k.expires_at <= now() THEN 'expired' ELSE 'valid' END AS state
FROM stratakv.api_keys k
JOIN stratakv.tenants t ON t.id = k.tenant_id
WHERE (%(tenant)s::text IS NULL OR t.name = %(tenant)s) AND (%(prefix)s::text IS NULL OR k.prefix = %(prefix)s)
ORDER BY t.name, k.created_at, k.prefix

-- name: create_key
-- The hash of it only.
INSERT INTO stratakv.api_keys (tenant_id, name, prefix, key_hash, permissions, models, networks, expires_at)
VALUES (
    %(tenant_id)s, %(name)s, %(prefix)s, %(key_hash)s, %(permissions)s, %(models)s, %(networks)s::text[]::inet[],
    now() + make_interval(secs => %(lifetime_s)s))

-- name: copy_key
-- Another key for the same: all but the key itself.
INSERT INTO stratakv.api_keys (tenant_id, name, prefix, key_hash, permissions, models, networks, expires_at)
SELECT
    tenant_id, name, %(new_prefix)s, %(key_hash)s, permissions, models, networks,
    CASE WHEN expires_at IS NOT NULL THEN now() + (expires_at - created_at) END
FROM stratakv.api_keys WHERE prefix = %(prefix)s AND revoked_at IS NULL AND coalesce(expires_at > now(), true)

-- name: revoke_key
-- From now on, or after a while; a key that has ended stays as it is.
UPDATE stratakv.api_keys SET
    revoked_at = CASE WHEN %(after_s)s = 0 THEN now() ELSE revoked_at END,
    expires_at = CASE WHEN %(after_s)s = 0 THEN expires_at
                      ELSE least(expires_at, now() + make_interval(secs => %(after_s)s)) END
WHERE prefix = %(prefix)s AND revoked_at IS NULL

-- name: roles
-- Of all tenants or one.
SELECT r.cluster, r.role_name AS role, r.role_oid AS oid, t.name AS tenant, r.created_at
FROM stratakv.tenant_roles r
JOIN stratakv.tenants t ON t.id = r.tenant_id
WHERE %(tenant)s::text IS NULL OR t.name = %(tenant)s
ORDER BY t.name, r.cluster, r.role_name

-- name: map_role
-- A role logs in for one tenant.
INSERT INTO stratakv.tenant_roles (cluster, role_name, role_oid, tenant_id)
VALUES (%(cluster)s, %(role)s, %(oid)s, %(tenant_id)s)
ON CONFLICT (cluster, role_name) DO UPDATE SET role_oid = excluded.role_oid, tenant_id = excluded.tenant_id, created_at = now()

-- name: unmap_role
-- It is the default tenant's again.
DELETE FROM stratakv.tenant_roles WHERE cluster = %(cluster)s AND role_name = %(role)s

-- name: look_up_role
-- In the cluster of the data.
SELECT s.system_identifier::text, r.oid::bigint FROM pg_control_system() s CROSS JOIN pg_roles r WHERE r.rolname = %(role)s

-- name: quotas
-- Limits, and what is taken of them now.
SELECT
    t.name AS tenant, l.requests_per_minute, l.tokens_per_minute, l.parallel_requests, l.tokens_per_month,
    l.cached_token_micros, l.cache_memory_bytes, l.cache_disk_bytes,
    u.requests_minute AS requests_minute_used, u.tokens_minute AS tokens_minute_used, u.parallel AS parallel_used,
    u.tokens_month AS tokens_month_used,
    coalesce(c.memory_bytes, 0) AS cache_memory_used, coalesce(c.disk_bytes, 0) AS cache_disk_used,
    (SELECT count(*) FROM stratakv.reservations r WHERE r.tenant_id = t.id AND r.state = 'open') AS open_reservations,
    (SELECT count(*) FROM stratakv.reservations r WHERE r.tenant_id = t.id AND r.state = 'unsettled') AS unsettled_reservations
FROM stratakv.tenants t
LEFT JOIN stratakv.tenant_limits l ON l.tenant_id = t.id
LEFT JOIN stratakv.cache_usage c ON c.tenant_id = t.id
LEFT JOIN LATERAL (
    SELECT
        max(s.used) FILTER (WHERE s.kind = 'requests_minute') AS requests_minute,
        max(s.used) FILTER (WHERE s.kind = 'tokens_minute') AS tokens_minute,
        max(s.used) FILTER (WHERE s.kind = 'parallel') AS parallel,
        max(s.used) FILTER (WHERE s.kind = 'tokens_month') AS tokens_month
    FROM (
        SELECT q.kind, ceil((q.held_micros + coalesce(stratakv.quota_spent(
            q.kind, q.spent_micros, q.at, stratakv.quota_limit(q.kind, l)), 0)) / 1000000.0)::bigint AS used
        FROM stratakv.quota_state q WHERE q.tenant_id = t.id) s
) u ON true
WHERE t.deleted_at IS NULL AND (%(tenant)s::text IS NULL OR t.name = %(tenant)s)
ORDER BY t.name

-- name: ensure_limits
-- So that there is something to change.
INSERT INTO stratakv.tenant_limits (tenant_id) VALUES (%(id)s) ON CONFLICT DO NOTHING

-- name: audit
-- The last changes first.
SELECT id, at, actor, db_role, action, object, tenant, before, after FROM stratakv.audit_log
WHERE %(tenant)s::text IS NULL OR tenant = %(tenant)s
ORDER BY id DESC LIMIT %(limit)s
