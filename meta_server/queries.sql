-- SQL of the meta server. Keys travel packed, 32 bytes each; extents packed, offset and generation as 8 big-endian bytes each.

-- name: set_term
-- Writes over this connection are those of one term.
SELECT set_config('stratakv.term', $1, false)

-- name: leader
-- Who leads, and the seconds that are left of its lease.
SELECT l.term, l.server, l.place, extract(epoch FROM greatest(l.expires_at, '2000-01-01') - clock_timestamp())::float8 AS left_s,
       coalesce(m.kvcm_host, '') AS kvcm_host, coalesce(m.kvcm_grpc_port, 0) AS kvcm_grpc_port,
       coalesce(m.kvcm_http_port, 0) AS kvcm_http_port
FROM stratakv.meta_leader l LEFT JOIN stratakv.meta_servers m USING (server)

-- name: show_server
-- This meta server is alive.
INSERT INTO stratakv.meta_servers (server, kvcm_host, kvcm_grpc_port, kvcm_http_port, seen_at)
VALUES ($1, $2, $3, $4, clock_timestamp())
ON CONFLICT (server) DO UPDATE SET kvcm_host = excluded.kvcm_host, kvcm_grpc_port = excluded.kvcm_grpc_port,
    kvcm_http_port = excluded.kvcm_http_port, seen_at = excluded.seen_at

-- name: hide_server
-- This meta server ends.
DELETE FROM stratakv.meta_servers WHERE server = $1

-- name: other_servers
-- The other meta servers that were alive within so many seconds.
SELECT server FROM stratakv.meta_servers
WHERE server <> $1 AND seen_at > clock_timestamp() - $2::float8 * interval '1 second' ORDER BY server

-- name: take_lead
-- A new term, unless somebody else's lease has not run out. Waits for what is being written, and is seen by all writes after it.
-- Terms rise also when the database was set up anew, or has lost its latest changes.
WITH alone AS MATERIALIZED (SELECT pg_advisory_xact_lock(6004514643731894861))
UPDATE stratakv.meta_leader
SET term = greatest(term + 1, (extract(epoch FROM clock_timestamp()) * 1000)::bigint), server = $1, place = $2,
    expires_at = clock_timestamp() + $3::float8 * interval '1 second'
FROM alone WHERE expires_at <= clock_timestamp() OR (place = $2 AND place <> '')
RETURNING term

-- name: renew_lead
-- The leader is alive. A lease that ran out is renewed too as long as nobody has taken it.
UPDATE stratakv.meta_leader SET expires_at = clock_timestamp() + $2::float8 * interval '1 second' WHERE term = $1 RETURNING term

-- name: give_up_lead
-- The leader steps down: whoever asks next leads.
UPDATE stratakv.meta_leader SET expires_at = clock_timestamp(), place = '' WHERE term = $1

-- name: live_segments
-- Segments whose places are not void.
SELECT epoch, node, host, port, socket_name, size_bytes, disk_of FROM stratakv.segments WHERE state = 'live'

-- name: dead_epochs
-- The latest epochs that are over, oldest first.
SELECT epoch FROM (
    SELECT epoch, died_at FROM stratakv.segments WHERE state = 'dead' ORDER BY died_at DESC LIMIT $1
) AS latest ORDER BY died_at

-- name: pending_puts
-- Puts that may still be finished, with the seconds they have left.
SELECT p.put_id, p.namespace, p.epoch, p.worker, p.page_bytes, p.block_size, p.keys,
       extract(epoch FROM p.expires_at - now())::float8 AS left_s, p.owner
FROM stratakv.put_sessions p JOIN stratakv.segments s USING (epoch)
WHERE p.state = 'pending' AND s.state = 'live' ORDER BY p.seq

-- name: unfilled_puts
-- Committed puts that the tables blocks and replicas do not have yet.
SELECT p.namespace, p.epoch, p.page_bytes, p.keys, p.extents, p.owner
FROM stratakv.put_sessions p JOIN stratakv.segments s USING (epoch)
WHERE p.state = 'committed' AND NOT p.filled AND s.state = 'live' ORDER BY p.seq

-- name: replica_runs
-- Every page of a live segment, packed again by the put that brought it, whose row stays as long as they do.
WITH runs AS (
    SELECT r.put_seq, r.namespace, r.epoch, r.page_bytes,
           string_agg(r.key, ''::bytea ORDER BY r.put_position) AS keys,
           string_agg(int8send(r.page_offset) || int8send(r.generation), ''::bytea ORDER BY r.put_position) AS extents
    FROM stratakv.replicas r JOIN stratakv.segments s USING (epoch)
    WHERE s.state = 'live' GROUP BY r.put_seq, r.namespace, r.epoch, r.page_bytes
)
SELECT runs.namespace, runs.epoch, runs.page_bytes, runs.keys, runs.extents, coalesce(p.owner, 0) AS owner
FROM runs LEFT JOIN stratakv.put_sessions p ON p.seq = runs.put_seq ORDER BY runs.put_seq

-- name: open_removals
-- Pages out of the index that may still be in put_sessions or replicas, or that the daemon has not freed.
SELECT m.id, m.epoch, m.extents, m.page_bytes, m.freed
FROM stratakv.removals m JOIN stratakv.segments s USING (epoch) WHERE s.state = 'live' ORDER BY m.id

-- name: last_removal
-- The highest removal id in use.
SELECT coalesce(max(id), 0) FROM stratakv.removals

-- name: decided_puts
-- The latest puts that were committed or voided, oldest first.
SELECT put_id, state FROM (
    SELECT put_id, state, ended_at FROM stratakv.put_sessions WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT $1
) AS latest ORDER BY ended_at

-- name: put_states
-- What became of these puts.
SELECT put_id, state FROM stratakv.put_sessions WHERE put_id = ANY($1::bytea[])

-- name: add_node
-- A daemon announced itself.
INSERT INTO stratakv.nodes (name) VALUES ($1) ON CONFLICT (name) DO UPDATE SET seen_at = now()

-- name: end_older_segments
-- The node's earlier epochs are over, and so are puts into them.
WITH dead AS (
    UPDATE stratakv.segments SET state = 'dead', died_at = now()
    WHERE node = $1 AND epoch <> $2 AND state = 'live' RETURNING epoch
)
UPDATE stratakv.put_sessions p SET state = 'void', ended_at = now()
FROM dead WHERE p.epoch = dead.epoch AND p.state = 'pending'

-- name: add_segment
-- A daemon's new epoch, or the same one announced again.
INSERT INTO stratakv.segments (epoch, node, host, port, socket_name, size_bytes, disk_of)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (epoch) DO UPDATE SET host = excluded.host, port = excluded.port, socket_name = excluded.socket_name,
    size_bytes = excluded.size_bytes

-- name: add_worker
-- A worker registered.
INSERT INTO stratakv.workers (name, epoch, url, role, model, namespace, block_size, max_model_len, node)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
ON CONFLICT (name) DO UPDATE SET epoch = excluded.epoch, url = excluded.url, role = excluded.role,
    model = excluded.model, namespace = excluded.namespace, block_size = excluded.block_size,
    max_model_len = excluded.max_model_len, node = excluded.node, registered_at = now()

-- name: start_puts
-- Puts that were granted room. A daemon that copies pages to another does not know their block size.
INSERT INTO stratakv.put_sessions (put_id, namespace, epoch, worker, page_bytes, block_size, keys, expires_at, owner)
SELECT put_id, namespace, epoch, worker, page_bytes,
       CASE WHEN block_size > 0 THEN block_size
            ELSE coalesce((SELECT b.block_size FROM stratakv.blocks b WHERE b.namespace = t.namespace LIMIT 1), 0) END,
       keys, now() + left_s * interval '1 second', owner
FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::text[], $5::bigint[], $6::integer[], $7::bytea[], $8::float8[], $9::bigint[])
    AS t (put_id, namespace, epoch, worker, page_bytes, block_size, keys, left_s, owner)
ON CONFLICT (put_id) DO NOTHING

-- name: void_puts
-- Puts that expired or were revoked, unless they were finished first.
UPDATE stratakv.put_sessions SET state = 'void', ended_at = now() WHERE put_id = ANY($1::bytea[]) AND state = 'pending'

-- name: end_puts
-- Puts whose pages are written; the commit that makes them visible.
UPDATE stratakv.put_sessions p SET state = 'committed', extents = t.extents, ended_at = now()
FROM unnest($1::bytea[], $2::bytea[]) AS t (put_id, extents)
WHERE p.put_id = t.put_id AND p.state = 'pending'

-- name: add_pages
-- Pages that a daemon has copied to another of its segments: committed from the start.
INSERT INTO stratakv.put_sessions (put_id, namespace, epoch, worker, page_bytes, block_size, keys, extents, state,
                                   expires_at, ended_at, owner)
SELECT put_id, namespace, epoch, '', page_bytes,
       coalesce((SELECT b.block_size FROM stratakv.blocks b WHERE b.namespace = t.namespace LIMIT 1), 0),
       keys, extents, 'committed', now(), now(), owner
FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::bigint[], $5::bytea[], $6::bytea[], $7::bigint[])
    AS t (put_id, namespace, epoch, page_bytes, keys, extents, owner)
ON CONFLICT (put_id) DO NOTHING

-- name: add_removals
-- Pages that left the index.
INSERT INTO stratakv.removals (id, epoch, extents, page_bytes, reason)
SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bytea[], $4::bytea[], $5::text[]) ON CONFLICT (id) DO NOTHING

-- name: finish_removals
-- The daemon has all pages of these removals back.
UPDATE stratakv.removals SET freed = true WHERE id = ANY($1::bigint[])

-- name: cache_rules
-- What operators have said of namespaces.
SELECT namespace, ttl_s, memory_bytes_max, disk_bytes_max, is_kept FROM stratakv.cache_rules

-- name: set_cache_rule
-- An operator has changed a namespace's rule.
INSERT INTO stratakv.cache_rules (namespace, ttl_s, memory_bytes_max, disk_bytes_max, is_kept)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (namespace) DO UPDATE SET ttl_s = excluded.ttl_s, memory_bytes_max = excluded.memory_bytes_max,
    disk_bytes_max = excluded.disk_bytes_max, is_kept = excluded.is_kept, changed_at = now()

-- name: removals_to_apply
-- Removals whose pages may still be in replicas. Read before the puts are filled, so that all their pages are there.
SELECT id FROM stratakv.removals WHERE NOT applied ORDER BY id LIMIT $1

-- name: fill_puts
-- Unpack committed puts into blocks and replicas; those of dead segments are only marked.
WITH batch AS (
    SELECT seq, put_id, namespace, epoch, page_bytes, block_size, keys, extents FROM stratakv.put_sessions
    WHERE state = 'committed' AND NOT filled ORDER BY seq LIMIT $1 FOR UPDATE
), pages AS (
    SELECT b.seq, b.namespace, b.epoch, b.page_bytes, b.block_size, i AS position, substr(b.keys, i * 32 + 1, 32) AS key,
           ('x' || encode(substr(b.extents, i * 16 + 1, 8), 'hex'))::bit(64)::bigint AS page_offset,
           ('x' || encode(substr(b.extents, i * 16 + 9, 8), 'hex'))::bit(64)::bigint AS generation
    FROM batch b JOIN stratakv.segments s USING (epoch)
    CROSS JOIN LATERAL generate_series(0, length(b.keys) / 32 - 1) AS i
    WHERE s.state = 'live'
), new_blocks AS (
    INSERT INTO stratakv.blocks (namespace, key, block_size)
    SELECT DISTINCT namespace, key, block_size FROM pages ON CONFLICT DO NOTHING
), new_replicas AS (
    INSERT INTO stratakv.replicas (epoch, page_offset, generation, namespace, key, page_bytes, put_seq, put_position)
    SELECT epoch, page_offset, generation, namespace, key, page_bytes, seq, position FROM pages ON CONFLICT DO NOTHING
)
UPDATE stratakv.put_sessions p SET filled = true, keys = '', extents = '' FROM batch b WHERE p.put_id = b.put_id

-- name: apply_removals
-- Take removed pages out of replicas; their keys.
WITH batch AS (
    UPDATE stratakv.removals SET applied = true WHERE id = ANY($1::bigint[]) RETURNING epoch, extents
), pages AS (
    SELECT b.epoch, ('x' || encode(substr(b.extents, i * 16 + 1, 8), 'hex'))::bit(64)::bigint AS page_offset,
           ('x' || encode(substr(b.extents, i * 16 + 9, 8), 'hex'))::bit(64)::bigint AS generation
    FROM batch b CROSS JOIN LATERAL generate_series(0, length(b.extents) / 16 - 1) AS i
)
DELETE FROM stratakv.replicas r USING pages p
WHERE r.epoch = p.epoch AND r.page_offset = p.page_offset AND r.generation = p.generation
RETURNING r.namespace, r.key

-- name: drop_dead_replicas
-- Some replicas of dead segments; their keys.
DELETE FROM stratakv.replicas WHERE ctid = ANY(ARRAY(
    SELECT r.ctid FROM stratakv.replicas r JOIN stratakv.segments s USING (epoch) WHERE s.state = 'dead' LIMIT $1
)) RETURNING namespace, key

-- name: drop_lost_blocks
-- Those of these blocks that lie nowhere any more.
DELETE FROM stratakv.blocks b USING unnest($1::bytea[], $2::bytea[]) AS t (namespace, key)
WHERE b.namespace = t.namespace AND b.key = t.key AND NOT EXISTS (
    SELECT FROM stratakv.replicas r WHERE r.namespace = b.namespace AND r.key = b.key
)

-- name: prune_puts
-- Puts that nobody asks for any more: decided long ago, and none of their pages is left.
DELETE FROM stratakv.put_sessions p
WHERE ended_at < now() - $1 * interval '1 second'
  AND (state = 'void' OR (filled AND NOT EXISTS (SELECT FROM stratakv.replicas r WHERE r.put_seq = p.seq)))

-- name: prune_lost_puts
-- Pending puts that no meta server keeps any more (their segment is dead).
DELETE FROM stratakv.put_sessions WHERE state = 'pending' AND expires_at < now() - $1 * interval '1 second'

-- name: prune_removals
-- Removals that everybody knows of.
DELETE FROM stratakv.removals m USING stratakv.segments s
WHERE s.epoch = m.epoch AND ((m.applied AND m.freed) OR s.state = 'dead')
