-- name: enlist
-- A start of a DB node that is going to hold something.
INSERT INTO stratakv.quota_nodes (node) VALUES ($1)

-- name: beat
-- It lives. No row: it was given up, and what it held is no longer its own. One that was silent for too long is never let back.
UPDATE stratakv.quota_nodes SET seen_at = clock_timestamp()
WHERE node = $1 AND seen_at > clock_timestamp() - make_interval(secs => $2)
RETURNING node

-- name: ensure_state
-- So that there is something to take of; nothing for a tenant that has been deleted.
INSERT INTO stratakv.quota_state (tenant_id, kind)
SELECT a.tenant_id, a.kind FROM unnest($1::bigint[], $2::text[]) AS a (tenant_id, kind)
JOIN stratakv.tenants t ON t.id = a.tenant_id
ON CONFLICT DO NOTHING

-- name: take
-- Leases for a node: of each tenant and kind as much as is left of what it wants.
WITH locked AS (
    SELECT
        s.tenant_id, s.kind, a.wanted, s.held_micros,
        coalesce(stratakv.quota_spent(s.kind, s.spent_micros, s.at, stratakv.quota_limit(s.kind, l)), 0) AS spent_micros,
        coalesce(stratakv.quota_limit(s.kind, l) * 1000000, 9223372036854775807) AS limit_micros
    FROM stratakv.quota_state s
    JOIN unnest($2::bigint[], $3::text[], $4::bigint[]) AS a (tenant_id, kind, wanted) USING (tenant_id, kind)
    LEFT JOIN stratakv.tenant_limits l ON l.tenant_id = s.tenant_id
    ORDER BY s.tenant_id, s.kind
    FOR UPDATE OF s
), granted AS (
    SELECT *, greatest(0, least(wanted, limit_micros - spent_micros - held_micros)) AS granted FROM locked
), updated AS (
    UPDATE stratakv.quota_state s
    SET spent_micros = g.spent_micros, held_micros = s.held_micros + g.granted, at = clock_timestamp()
    FROM granted g WHERE s.tenant_id = g.tenant_id AND s.kind = g.kind
), leased AS (
    INSERT INTO stratakv.quota_leases AS known (node, tenant_id, kind, amount_micros)
    SELECT $1, tenant_id, kind, granted FROM granted WHERE granted > 0
    ON CONFLICT (node, tenant_id, kind) DO UPDATE SET amount_micros = known.amount_micros + excluded.amount_micros
)
SELECT
    tenant_id, kind, granted, limit_micros - spent_micros - held_micros - granted AS left_micros,
    extract(epoch FROM date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC') + interval '1 month'
        - clock_timestamp() AT TIME ZONE 'UTC')::double precision AS month_ends_s
FROM granted

-- name: enrol
-- Reservations of requests, out of the leases of their node. A request is charged now, its tokens when they are settled.
WITH added AS (
    INSERT INTO stratakv.reservations (request_id, node, tenant_id, kinds, reserved_micros)
    SELECT a.request_id, $1, a.tenant_id, string_to_array(a.kinds, ','), a.micros
    FROM unnest($2::text[], $3::bigint[], $4::text[], $5::bigint[]) AS a (request_id, tenant_id, kinds, micros)
    JOIN stratakv.tenants t ON t.id = a.tenant_id
    ON CONFLICT (request_id) DO NOTHING
    RETURNING tenant_id, kinds, reserved_micros
), sums AS (
    SELECT added.tenant_id, k.kind, sum(CASE k.kind WHEN 'requests_minute' THEN 1000000 ELSE added.reserved_micros END)::bigint AS micros
    FROM added CROSS JOIN LATERAL unnest(added.kinds) AS k (kind)
    GROUP BY 1, 2
), lessened AS (
    UPDATE stratakv.quota_leases l SET amount_micros = greatest(0, l.amount_micros - s.micros)
    FROM sums s WHERE l.node = $1 AND l.tenant_id = s.tenant_id AND l.kind = s.kind
), locked AS (
    SELECT
        q.tenant_id, q.kind, s.micros,
        coalesce(stratakv.quota_spent(q.kind, q.spent_micros, q.at, stratakv.quota_limit(q.kind, l)), 0) AS spent_micros
    FROM stratakv.quota_state q
    JOIN sums s ON s.tenant_id = q.tenant_id AND s.kind = q.kind
    LEFT JOIN stratakv.tenant_limits l ON l.tenant_id = q.tenant_id
    WHERE q.kind = 'requests_minute'
    ORDER BY q.tenant_id
    FOR UPDATE OF q
)
UPDATE stratakv.quota_state q
SET spent_micros = k.spent_micros + k.micros, held_micros = greatest(0, q.held_micros - k.micros), at = clock_timestamp()
FROM locked k WHERE q.tenant_id = k.tenant_id AND q.kind = k.kind

-- name: settle
-- What requests took, in the place of what they reserved; of each request once.
WITH ended AS (
    UPDATE stratakv.reservations r
    SET state = $3, charged_micros = least(greatest(0, coalesce(a.charged, r.reserved_micros)), r.reserved_micros), ended_at = clock_timestamp()
    FROM unnest($1::text[], $2::bigint[]) AS a (request_id, charged)
    WHERE r.request_id = a.request_id AND r.state = 'open'
    RETURNING r.request_id, r.tenant_id, r.kinds, r.reserved_micros, r.charged_micros
), sums AS (
    SELECT ended.tenant_id, k.kind, sum(reserved_micros)::bigint AS reserved, sum(charged_micros)::bigint AS charged
    FROM ended CROSS JOIN LATERAL unnest(ended.kinds) AS k (kind)
    WHERE k.kind LIKE 'tokens%'
    GROUP BY 1, 2
), locked AS (
    SELECT
        q.tenant_id, q.kind, s.reserved, s.charged,
        coalesce(stratakv.quota_spent(q.kind, q.spent_micros, q.at, stratakv.quota_limit(q.kind, l)), 0) AS spent_micros
    FROM stratakv.quota_state q
    JOIN sums s ON s.tenant_id = q.tenant_id AND s.kind = q.kind
    LEFT JOIN stratakv.tenant_limits l ON l.tenant_id = q.tenant_id
    ORDER BY q.tenant_id, q.kind
    FOR UPDATE OF q
), updated AS (
    UPDATE stratakv.quota_state q
    SET spent_micros = k.spent_micros + k.charged, held_micros = greatest(0, q.held_micros - k.reserved), at = clock_timestamp()
    FROM locked k WHERE q.tenant_id = k.tenant_id AND q.kind = k.kind
)
SELECT request_id FROM ended

-- name: keep
-- Of what a node has leased it needs so much; the rest goes back. May be repeated.
WITH excess AS (
    SELECT l.tenant_id, l.kind, l.amount_micros - a.kept AS micros
    FROM stratakv.quota_leases l
    JOIN unnest($2::bigint[], $3::text[], $4::bigint[]) AS a (tenant_id, kind, kept)
        ON a.tenant_id = l.tenant_id AND a.kind = l.kind
    WHERE l.node = $1 AND l.amount_micros > a.kept
    ORDER BY l.tenant_id, l.kind
    FOR UPDATE OF l
), lessened AS (
    UPDATE stratakv.quota_leases l SET amount_micros = l.amount_micros - e.micros
    FROM excess e WHERE l.node = $1 AND l.tenant_id = e.tenant_id AND l.kind = e.kind
)
UPDATE stratakv.quota_state q SET held_micros = greatest(0, q.held_micros - e.micros)
FROM excess e WHERE q.tenant_id = e.tenant_id AND q.kind = e.kind

-- name: dead_nodes
-- Those that have been silent for too long, and for how long.
SELECT node, least(1e9, extract(epoch FROM clock_timestamp() - seen_at))::double precision AS silent_s FROM stratakv.quota_nodes
WHERE seen_at <= clock_timestamp() - make_interval(secs => $1)
ORDER BY seen_at LIMIT 100

-- name: lock_dead_node
-- One node takes over at a time.
SELECT node FROM stratakv.quota_nodes
WHERE node = $1 AND seen_at <= clock_timestamp() - make_interval(secs => $2)
FOR UPDATE SKIP LOCKED

-- name: free_leases
-- All that a dead node held for nobody.
WITH freed AS (
    DELETE FROM stratakv.quota_leases WHERE node = $1 RETURNING tenant_id, kind, amount_micros
)
UPDATE stratakv.quota_state q SET held_micros = greatest(0, q.held_micros - f.amount_micros)
FROM freed f WHERE q.tenant_id = f.tenant_id AND q.kind = f.kind

-- name: open_reservations
-- Of a dead node.
SELECT r.request_id, r.reserved_micros, coalesce(l.cached_token_micros, 1000000) AS cached_token_micros
FROM stratakv.reservations r
LEFT JOIN stratakv.tenant_limits l ON l.tenant_id = r.tenant_id
WHERE r.node = $1 AND r.state = 'open'
ORDER BY r.request_id LIMIT $2

-- name: forget_node
-- It has nothing left.
DELETE FROM stratakv.quota_nodes n
WHERE n.node = $1 AND NOT EXISTS (SELECT FROM stratakv.reservations r WHERE r.node = $1 AND r.state = 'open')
    AND NOT EXISTS (SELECT FROM stratakv.quota_leases l WHERE l.node = $1 AND l.amount_micros > 0)

-- name: drop_empty_leases
-- Of a node that ends.
DELETE FROM stratakv.quota_leases WHERE node = $1 AND amount_micros = 0

-- name: prune_reservations
-- Those that were settled long ago; unsettled ones stay for longer.
DELETE FROM stratakv.reservations WHERE request_id IN (
    SELECT request_id FROM stratakv.reservations
    WHERE (state = 'settled' AND ended_at < clock_timestamp() - make_interval(secs => $1))
       OR (state = 'unsettled' AND ended_at < clock_timestamp() - make_interval(secs => $2))
    LIMIT $3
)

-- name: cache_limits
-- Of tenants that have any, or that have blocks in the pool, whose names the pool shows.
SELECT t.id, t.name, l.cache_memory_bytes, l.cache_disk_bytes
FROM stratakv.tenants t
LEFT JOIN stratakv.tenant_limits l ON l.tenant_id = t.id
LEFT JOIN stratakv.cache_usage u ON u.tenant_id = t.id
WHERE l.cache_memory_bytes IS NOT NULL OR l.cache_disk_bytes IS NOT NULL OR u.tenant_id IS NOT NULL
ORDER BY l.cache_memory_bytes IS NULL AND l.cache_disk_bytes IS NULL, t.id LIMIT $1

-- name: set_cache_usage
-- What tenants have in the pool; of those that are not named it is nothing.
WITH told AS (
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS t (tenant_id, memory_bytes, disk_bytes)
), gone AS (
    DELETE FROM stratakv.cache_usage u WHERE NOT EXISTS (SELECT FROM told WHERE told.tenant_id = u.tenant_id)
)
INSERT INTO stratakv.cache_usage AS u (tenant_id, memory_bytes, disk_bytes)
SELECT told.tenant_id, told.memory_bytes, told.disk_bytes
FROM told JOIN stratakv.tenants t ON t.id = told.tenant_id ORDER BY told.tenant_id
ON CONFLICT (tenant_id) DO UPDATE SET memory_bytes = excluded.memory_bytes, disk_bytes = excluded.disk_bytes
WHERE (u.memory_bytes, u.disk_bytes) <> (excluded.memory_bytes, excluded.disk_bytes)
