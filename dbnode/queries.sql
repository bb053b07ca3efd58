-- name: insert_usage_events
-- One row per ended request, by columns as arrays; a request id that is there already is left alone. What was written a week
-- late or later is booked to the day a week ago: partitions are there for so long.
INSERT INTO stratakv.usage_events (
    request_id, tenant_id, model, source, prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens,
    cached_disk_tokens, generated_tokens, outcome, queue_ms, ttft_ms, generation_ms, mean_itl_ms, created_at
)
SELECT
    event.request_id, tenant.id, event.model, event.source, event.prompt_tokens, event.l1, event.l2, event.pool,
    event.disk, event.generated_tokens, event.outcome, event.queue_ms, event.ttft_ms, event.generation_ms, event.mean_itl_ms,
    now() - least(event.age_s, 604800) * interval '1 second'
FROM unnest(
    $1::text[], $2::text[], $3::text[], $4::text[], $5::integer[], $6::integer[], $7::integer[], $8::integer[],
    $9::integer[], $10::integer[], $11::text[], $12::double precision[], $13::double precision[],
    $14::double precision[], $15::double precision[], $16::double precision[]
) AS event (
    request_id, tenant, model, source, prompt_tokens, l1, l2, pool, disk, generated_tokens, outcome, queue_ms, ttft_ms,
    generation_ms, mean_itl_ms, age_s
)
JOIN stratakv.tenants AS tenant ON tenant.name = event.tenant
ON CONFLICT (request_id) DO NOTHING

-- name: make_usage_partitions
-- From a week ago, for what is written late, to so many months ahead.
SELECT stratakv.make_usage_partitions(now() - interval '7 days', $1)

-- name: drop_usage_partitions
-- Months that are over for longer than so many months.
SELECT stratakv.drop_usage_partitions($1)

-- name: usage_ahead
-- For how many seconds from now each request has a partition; looked at as far as partitions are made ahead.
SELECT greatest(0, extract(epoch FROM coalesce(min(m.month) FILTER (WHERE NOT m.is_there), max(m.month)) AT TIME ZONE 'UTC' - now()))
    ::double precision
FROM (
    SELECT month, EXISTS (
        SELECT FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'stratakv.usage_history'::regclass AND c.relname = 'usage_history_' || to_char(month, 'YYYY_MM')
    ) AS is_there
    FROM generate_series(
        date_trunc('month', now() AT TIME ZONE 'UTC'),
        date_trunc('month', now() AT TIME ZONE 'UTC') + ($1 + 1) * interval '1 month', interval '1 month') AS month
) m

-- name: clear_audit
-- Some of the changes that are older than so many whole months.
DELETE FROM stratakv.audit_log WHERE id IN (
    SELECT id FROM stratakv.audit_log
    WHERE at < (date_trunc('month', now() AT TIME ZONE 'UTC') - $1::integer * interval '1 month') AT TIME ZONE 'UTC'
    ORDER BY at LIMIT $2
)

-- name: clear_settled
-- Some of the settled requests that nobody settles again; usage_history has them.
DELETE FROM stratakv.usage_events WHERE id IN (
    SELECT id FROM stratakv.usage_events WHERE created_at < now() - $1::double precision * interval '1 day'
    ORDER BY created_at LIMIT $2
)

-- name: add_statements
-- Sums of statements, by columns as arrays, added to what is there. The tenant is the one that the login stands for now. DB nodes
-- that add to the same rows lock them in one order.
INSERT INTO stratakv.statements AS known (
    cluster, tenant_id, role, role_oid, database, fingerprint, query, calls, infer_calls, distinct_prompts, memo_hits,
    prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens, generated_tokens, wait_ms, errors, first_seen, last_seen
)
SELECT
    new.cluster, tenant.id, new.role, new.role_oid, new.database, new.fingerprint, new.query, sum(new.calls),
    sum(new.infer_calls), sum(new.distinct_prompts), sum(new.memo_hits), sum(new.prompt_tokens), sum(new.cached_l1_tokens),
    sum(new.cached_l2_tokens), sum(new.cached_pool_tokens), sum(new.generated_tokens), sum(new.wait_ms), sum(new.errors),
    to_timestamp(min(new.seen)), to_timestamp(max(new.seen))
FROM unnest(
    $1::text[], $2::text[], $3::bigint[], $4::text[], $5::bigint[], $6::text[], $7::bytea[], $8::text[], $9::bigint[],
    $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[], $15::bigint[], $16::bigint[], $17::bigint[],
    $18::double precision[], $19::bigint[], $20::double precision[]
) AS new (
    cluster, login, login_oid, role, role_oid, database, fingerprint, query, calls, infer_calls, distinct_prompts, memo_hits,
    prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens, generated_tokens, wait_ms, errors, seen
)
LEFT JOIN stratakv.tenant_roles AS mapped
    ON mapped.cluster = new.cluster AND mapped.role_name = new.login AND mapped.role_oid = new.login_oid
JOIN stratakv.tenants AS tenant
    ON tenant.id = mapped.tenant_id OR (mapped.tenant_id IS NULL AND tenant.name = 'default')
GROUP BY new.cluster, tenant.id, new.role_oid, new.role, new.database, new.fingerprint, new.query
ORDER BY new.cluster, tenant.id, new.role_oid, new.role, new.database, new.fingerprint
ON CONFLICT (cluster, tenant_id, role_oid, role, database, fingerprint) DO UPDATE SET
    calls = known.calls + excluded.calls,
    infer_calls = known.infer_calls + excluded.infer_calls,
    distinct_prompts = known.distinct_prompts + excluded.distinct_prompts,
    memo_hits = known.memo_hits + excluded.memo_hits,
    prompt_tokens = known.prompt_tokens + excluded.prompt_tokens,
    cached_l1_tokens = known.cached_l1_tokens + excluded.cached_l1_tokens,
    cached_l2_tokens = known.cached_l2_tokens + excluded.cached_l2_tokens,
    cached_pool_tokens = known.cached_pool_tokens + excluded.cached_pool_tokens,
    generated_tokens = known.generated_tokens + excluded.generated_tokens,
    wait_ms = known.wait_ms + excluded.wait_ms,
    errors = known.errors + excluded.errors,
    last_seen = greatest(known.last_seen, excluded.last_seen)

-- name: prune_statements
-- Keep so many statements, those seen last.
DELETE FROM stratakv.statements
WHERE (cluster, tenant_id, role_oid, role, database, fingerprint) IN (
    SELECT cluster, tenant_id, role_oid, role, database, fingerprint FROM stratakv.statements ORDER BY last_seen DESC OFFSET $1
)

-- name: select_statements
-- Statistics of a cluster: of one role of the tenant that a login stands for, or of all.
SELECT
    role, database, query, calls, infer_calls, distinct_prompts, memo_hits, prompt_tokens, cached_l1_tokens,
    cached_l2_tokens, cached_pool_tokens, generated_tokens, wait_ms, errors, first_seen, last_seen
FROM stratakv.statements
WHERE cluster = $1 AND ($2 OR (role = $3 AND role_oid = $4 AND tenant_id = coalesce(
    (SELECT m.tenant_id FROM stratakv.tenant_roles m WHERE m.cluster = $1 AND m.role_name = $5 AND m.role_oid = $6),
    (SELECT t.id FROM stratakv.tenants t WHERE t.name = 'default')
)))
ORDER BY wait_ms DESC

-- name: own_usage
-- By day, of the tenant of a role; as the view my_usage.
SELECT day, model, source, requests, cancelled, failed, prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens,
       cached_disk_tokens, generated_tokens
FROM stratakv.usage_daily WHERE tenant_id = (
    SELECT m.tenant_id FROM stratakv.tenant_roles m JOIN stratakv.tenants t ON t.id = m.tenant_id AND t.deleted_at IS NULL
    WHERE m.cluster = $1 AND m.role_name = $2 AND m.role_oid = $3
)

-- name: own_requests
-- The latest requests of the tenant of a role; as the view my_requests.
SELECT created_at, request_id, model, source, outcome, prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens,
       cached_disk_tokens, generated_tokens, queue_ms, ttft_ms, generation_ms, mean_itl_ms
FROM stratakv.usage_history WHERE tenant_id = (
    SELECT m.tenant_id FROM stratakv.tenant_roles m JOIN stratakv.tenants t ON t.id = m.tenant_id AND t.deleted_at IS NULL
    WHERE m.cluster = $1 AND m.role_name = $2 AND m.role_oid = $3
)
ORDER BY created_at DESC LIMIT $4

-- name: own_limits
-- Limits of the tenant of a role, and what is taken of them; as the view my_limits.
SELECT l."limit", l.maximum, l.used FROM stratakv.limits_in_use l WHERE l.tenant_id = (
    SELECT m.tenant_id FROM stratakv.tenant_roles m JOIN stratakv.tenants t ON t.id = m.tenant_id AND t.deleted_at IS NULL
    WHERE m.cluster = $1 AND m.role_name = $2 AND m.role_oid = $3
)
