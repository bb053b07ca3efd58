-- SQL of the KVCM API. Configurations are protobuf messages; keys are packed, 8 big-endian bytes each.

-- name: storages
-- All storages.
SELECT config, is_enabled FROM stratakv.kvcm_storages ORDER BY name

-- name: groups
-- All instance groups.
SELECT config FROM stratakv.kvcm_groups ORDER BY name

-- name: instances
-- All instances.
SELECT config FROM stratakv.kvcm_instances ORDER BY instance_id

-- name: accounts
-- All accounts.
SELECT user_name, role, password_hash FROM stratakv.kvcm_accounts ORDER BY user_name

-- name: writes
-- All write sessions of which something is left, with the seconds that open ones have left.
SELECT session_id, instance_id, group_name, place, layouts, layout_of, keys, status, success, created_s,
       extract(epoch FROM ends_at - now())::float8 AS left_s
FROM stratakv.kvcm_writes ORDER BY created_s, session_id

-- name: set_storage
-- A storage was added or changed.
INSERT INTO stratakv.kvcm_storages (name, config, is_enabled) VALUES ($1, $2, $3)
ON CONFLICT (name) DO UPDATE SET config = excluded.config, is_enabled = excluded.is_enabled

-- name: remove_storage
-- A storage was removed.
DELETE FROM stratakv.kvcm_storages WHERE name = $1

-- name: set_group
-- An instance group was added or changed.
INSERT INTO stratakv.kvcm_groups (name, config) VALUES ($1, $2)
ON CONFLICT (name) DO UPDATE SET config = excluded.config

-- name: remove_group
-- An instance group was removed.
DELETE FROM stratakv.kvcm_groups WHERE name = $1

-- name: set_instance
-- An instance was registered.
INSERT INTO stratakv.kvcm_instances (instance_id, config) VALUES ($1, $2)
ON CONFLICT (instance_id) DO UPDATE SET config = excluded.config

-- name: remove_instance
-- An instance was removed.
DELETE FROM stratakv.kvcm_instances WHERE instance_id = $1

-- name: add_account
-- An account was added.
INSERT INTO stratakv.kvcm_accounts (user_name, role, password_hash) VALUES ($1, $2, $3)
ON CONFLICT (user_name) DO UPDATE SET role = excluded.role, password_hash = excluded.password_hash

-- name: remove_account
-- An account was removed.
DELETE FROM stratakv.kvcm_accounts WHERE user_name = $1

-- name: add_write
-- A write session was opened.
INSERT INTO stratakv.kvcm_writes (session_id, instance_id, group_name, place, layouts, layout_of, keys, status,
                                  created_s, ends_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, now() + $10::float8 * interval '1 second')
ON CONFLICT (session_id) DO NOTHING

-- name: end_write
-- A session was finished or has run out: what became of its blocks.
UPDATE stratakv.kvcm_writes SET status = $2, success = $3, ends_at = now() + $4::float8 * interval '1 second'
WHERE session_id = $1

-- name: set_status
-- Blocks of finished sessions were removed.
UPDATE stratakv.kvcm_writes w SET status = t.status
FROM unnest($1::text[], $2::bytea[]) AS t (session_id, status) WHERE w.session_id = t.session_id

-- name: remove_writes
-- Nothing is left of these sessions.
DELETE FROM stratakv.kvcm_writes WHERE session_id = ANY($1::text[])
