-- SQL of conversations. All but the sweeper's name the tenant: another's conversation looks like none.
-- One has not ended before its time, nor while a turn is under way.

-- name: count_conversations
-- Of a tenant, as far as a limit.
SELECT count(*) FROM (
    SELECT FROM stratakv.conversations WHERE tenant_id = $1 AND expires_at > now() LIMIT $2
) AS found

-- name: count_open
-- Of all tenants.
SELECT count(*) FROM stratakv.conversations WHERE expires_at > now()

-- name: insert_conversation
-- A new one, empty as yet.
INSERT INTO stratakv.conversations (id, tenant_id, metadata, forked_from, expires_at)
VALUES ($1, $2, $3::text::jsonb, $4, now() + $5::double precision * interval '1 second')

-- name: conversation
-- One that has not ended, with what is under way in it.
SELECT id, created_at, expires_at, metadata::text AS metadata, version, num_items, size_bytes, forked_from,
       turn_id, turn_ends_at > clock_timestamp() AS is_busy, last_turn_id
FROM stratakv.conversations WHERE id = $2 AND tenant_id = $1 AND (expires_at > now() OR turn_ends_at > now())

-- name: conversations
-- Those of a tenant, the newest first, after the given one.
SELECT id, created_at, expires_at, metadata::text AS metadata, version, num_items, size_bytes, forked_from
FROM stratakv.conversations
WHERE tenant_id = $1 AND (expires_at > now() OR turn_ends_at > now())
  AND ($2::text IS NULL OR (created_at, id) < (
      SELECT created_at, id FROM stratakv.conversations WHERE id = $2 AND tenant_id = $1))
ORDER BY created_at DESC, id DESC LIMIT $3

-- name: change_metadata
-- Replaces them all.
UPDATE stratakv.conversations SET metadata = $3::text::jsonb, version = version + 1
WHERE id = $2 AND tenant_id = $1 AND (expires_at > now() OR turn_ends_at > now())

-- name: delete_conversation
-- With its items.
DELETE FROM stratakv.conversations
WHERE id = $2 AND tenant_id = $1 AND (expires_at > now() OR turn_ends_at > now()) RETURNING id

-- name: items
-- All, in order.
SELECT position, item_id, role, content, token_ids, after_position, end_chars, text_digest, created_at
FROM stratakv.conversation_items WHERE conversation_id = $1 ORDER BY position

-- name: items_after
-- Some, from a place on, forwards; without tokens.
SELECT position, item_id, role, content, created_at FROM stratakv.conversation_items
WHERE conversation_id = $1 AND position > $2 ORDER BY position LIMIT $3

-- name: items_before
-- Some, from a place on, backwards; without tokens.
SELECT position, item_id, role, content, created_at FROM stratakv.conversation_items
WHERE conversation_id = $1 AND position < $2 ORDER BY position DESC LIMIT $3

-- name: item
-- One; without tokens.
SELECT position, item_id, role, content, created_at FROM stratakv.conversation_items
WHERE conversation_id = $1 AND item_id = $2

-- name: insert_items
-- At the end, by columns as arrays.
INSERT INTO stratakv.conversation_items (
    conversation_id, position, item_id, role, content, token_ids, after_position, end_chars, text_digest)
SELECT $1, new.* FROM unnest(
    $2::integer[], $3::text[], $4::text[], $5::text[], $6::bytea[], $7::integer[], $8::integer[], $9::bytea[]
) AS new (position, item_id, role, content, token_ids, after_position, end_chars, text_digest)

-- name: copy_items
-- As far as a place, into another conversation; how many, and how long they are.
WITH copied AS (
    INSERT INTO stratakv.conversation_items
    SELECT $2, position, item_id, role, content, token_ids, after_position, end_chars, text_digest, created_at
    FROM stratakv.conversation_items WHERE conversation_id = $1 AND position <= $3
    RETURNING octet_length(content) AS size_bytes
)
SELECT count(*)::integer AS num_items, coalesce(sum(size_bytes), 0)::bigint AS size_bytes FROM copied

-- name: grow
-- Items have been added; the turn, if it was one, is over.
UPDATE stratakv.conversations SET
    version = version + 1, num_items = num_items + $2, size_bytes = size_bytes + $3, turn_id = NULL, turn_ends_at = NULL,
    last_turn_id = $4, used_at = now(), expires_at = now() + $5::double precision * interval '1 second'
WHERE id = $1

-- name: begin_turn
-- For so long at most.
UPDATE stratakv.conversations
SET turn_id = $2, turn_ends_at = clock_timestamp() + $3::double precision * interval '1 second' WHERE id = $1

-- name: give_up_turn
-- Nothing has come of it.
UPDATE stratakv.conversations SET turn_id = NULL, turn_ends_at = NULL WHERE id = $1 AND turn_id = $2

-- name: sweep
-- Some of those that have ended, or whose tenant was deleted; several DB nodes take different ones.
DELETE FROM stratakv.conversations WHERE id IN (
    SELECT id FROM stratakv.conversations
    WHERE (expires_at <= now() AND coalesce(turn_ends_at <= now(), true))
       OR tenant_id = ANY (ARRAY(SELECT id FROM stratakv.tenants WHERE deleted_at IS NOT NULL))
    LIMIT $1 FOR UPDATE SKIP LOCKED
)
