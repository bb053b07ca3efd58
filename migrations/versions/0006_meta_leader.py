"""The leader among the meta servers of this database, and the fence that keeps all others from writing.

Revision: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE stratakv.meta_leader (
    is_row      boolean PRIMARY KEY DEFAULT true CHECK (is_row),
    term        bigint NOT NULL DEFAULT 0,
    server      text NOT NULL DEFAULT '',
    place       text NOT NULL DEFAULT '',
    expires_at  timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO stratakv.meta_leader DEFAULT VALUES;
COMMENT ON TABLE stratakv.meta_leader IS
    'The lease of the leading meta server, on the clock of this database; every leader has a higher term than those before.';

CREATE TABLE stratakv.meta_servers (
    server          text PRIMARY KEY,
    kvcm_host       text NOT NULL,
    kvcm_grpc_port  integer NOT NULL,
    kvcm_http_port  integer NOT NULL,
    seen_at         timestamptz NOT NULL
);
COMMENT ON TABLE stratakv.meta_servers IS 'Meta servers of this database, leading or standing by, and when each was last alive.';
"""

FENCE = """
-- The lock is shared by all writers and taken alone by who takes over, which so waits for what is being written, and is
-- seen by every write after it. Writers of the release before have no term; they are let in until there is a leader.
CREATE FUNCTION stratakv.check_meta_term() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(6004514643731894861);
    IF (SELECT term FROM stratakv.meta_leader)
        <> coalesce(nullif(current_setting('stratakv.term', true), ''), '0')::bigint THEN
        RAISE EXCEPTION 'another meta server leads' USING ERRCODE = 'SK001';
    END IF;
    RETURN NULL;
END $$;
"""

FENCED = {
    "put_sessions": "INSERT OR UPDATE OF state",
    "removals": "INSERT OR UPDATE OF freed",
    "segments": "INSERT OR UPDATE",
    "cache_rules": "INSERT OR UPDATE",
    "kvcm_storages": "INSERT OR UPDATE OR DELETE",
    "kvcm_groups": "INSERT OR UPDATE OR DELETE",
    "kvcm_instances": "INSERT OR UPDATE OR DELETE",
    "kvcm_writes": "INSERT OR UPDATE OR DELETE",
}
"""Table → what only the leader may do to it; the rest is housekeeping that no two can do differently."""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(FENCE)
    for table, events in FENCED.items():
        op.execute(
            f"CREATE TRIGGER check_meta_term BEFORE {events} ON stratakv.{table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION stratakv.check_meta_term()"
        )


def downgrade() -> None:
    op.execute("DROP FUNCTION stratakv.check_meta_term CASCADE")
    op.execute("DROP TABLE stratakv.meta_servers, stratakv.meta_leader")
