-- name: tenancy_version
-- Rises with every change of tenants, keys, roles and limits.
SELECT version, now() FROM stratakv.tenancy_version

-- name: tenants
-- All that are there, with their limits.
SELECT
    t.id, t.name, t.salt, t.shares_cache, t.weight, t.permissions, t.models, t.networks::text[] AS networks, t.is_enabled,
    l.requests_per_minute, l.tokens_per_minute, l.parallel_requests, l.tokens_per_month, l.cached_token_micros,
    l.cache_memory_bytes, l.cache_disk_bytes
FROM stratakv.tenants t
LEFT JOIN stratakv.tenant_limits l ON l.tenant_id = t.id
WHERE t.deleted_at IS NULL
ORDER BY t.id LIMIT $1

-- name: api_keys
-- Those that may still be used.
SELECT tenant_id, name, prefix, key_hash, permissions, models, networks::text[] AS networks, expires_at
FROM stratakv.api_keys
WHERE revoked_at IS NULL AND coalesce(expires_at > now(), true)
ORDER BY id LIMIT $1

-- name: tenant_roles
-- PostgreSQL roles that log in for a tenant.
SELECT cluster, role_name, role_oid, tenant_id FROM stratakv.tenant_roles ORDER BY cluster, role_name LIMIT $1
