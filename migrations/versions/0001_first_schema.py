"""First schema: tenants, models, nodes, segments, workers, put sessions, blocks, replicas, usage events.

Revision: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE stratakv.tenants (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text NOT NULL UNIQUE,
    salt        text NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT now()
);
INSERT INTO stratakv.tenants (name) VALUES ('default');

CREATE TABLE stratakv.models (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name           text NOT NULL UNIQUE,
    revision       text NOT NULL DEFAULT '',
    namespace      bytea,
    block_size     integer,
    max_model_len  integer,
    created_at     timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE stratakv.nodes (
    name        text PRIMARY KEY,
    created_at  timestamptz NOT NULL DEFAULT now(),
    seen_at     timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE stratakv.segments (
    epoch          bytea PRIMARY KEY,
    node           text NOT NULL REFERENCES stratakv.nodes (name),
    host           text NOT NULL,
    port           integer NOT NULL,
    socket_name    text NOT NULL,
    size_bytes     bigint NOT NULL,
    state          text NOT NULL DEFAULT 'live' CHECK (state IN ('live', 'dead')),
    registered_at  timestamptz NOT NULL DEFAULT now(),
    died_at        timestamptz
);
CREATE UNIQUE INDEX segments_one_live_per_node ON stratakv.segments (node) WHERE state = 'live';
COMMENT ON TABLE stratakv.segments IS 'Memory of one start of a daemon; places of a dead one are void.';

CREATE TABLE stratakv.workers (
    name           text PRIMARY KEY,
    epoch          bytea NOT NULL,
    url            text NOT NULL,
    role           text NOT NULL,
    model          text NOT NULL,
    namespace      bytea NOT NULL,
    block_size     integer NOT NULL,
    max_model_len  integer NOT NULL,
    node           text,
    registered_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE stratakv.put_sessions (
    put_id      bytea PRIMARY KEY,
    seq         bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    namespace   bytea NOT NULL,
    epoch       bytea NOT NULL REFERENCES stratakv.segments (epoch),
    worker      text NOT NULL,
    page_bytes  bigint NOT NULL,
    block_size  integer NOT NULL,
    keys        bytea NOT NULL,
    extents     bytea NOT NULL DEFAULT '',
    state       text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'committed', 'void')),
    filled      boolean NOT NULL DEFAULT false,
    started_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    ended_at    timestamptz
);
ALTER TABLE stratakv.put_sessions ALTER COLUMN keys SET STORAGE EXTERNAL, ALTER COLUMN extents SET STORAGE EXTERNAL;
CREATE INDEX put_sessions_pending ON stratakv.put_sessions (seq) WHERE state = 'pending';
CREATE INDEX put_sessions_unfilled ON stratakv.put_sessions (seq) WHERE state = 'committed' AND NOT filled;
CREATE INDEX put_sessions_ended ON stratakv.put_sessions (ended_at);
COMMENT ON TABLE stratakv.put_sessions IS
    'One row per put. keys: 32 bytes each; extents: offset and generation, 8 bytes each, big-endian. '
    'A committed row is the truth until its blocks are in the tables blocks and replicas (filled).';

CREATE TABLE stratakv.blocks (
    namespace   bytea NOT NULL,
    key         bytea NOT NULL,
    block_size  integer NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, key)
);

CREATE TABLE stratakv.replicas (
    epoch         bytea NOT NULL REFERENCES stratakv.segments (epoch),
    page_offset   bigint NOT NULL,
    generation    bigint NOT NULL,
    namespace     bytea NOT NULL,
    key           bytea NOT NULL,
    page_bytes    bigint NOT NULL,
    put_seq       bigint NOT NULL,
    put_position  integer NOT NULL,
    PRIMARY KEY (epoch, page_offset, generation)
);
CREATE INDEX replicas_by_key ON stratakv.replicas (namespace, key);
CREATE INDEX replicas_by_put ON stratakv.replicas (put_seq);

CREATE TABLE stratakv.removals (
    id          bigint PRIMARY KEY,
    epoch       bytea NOT NULL REFERENCES stratakv.segments (epoch),
    extents     bytea NOT NULL,
    page_bytes  bytea NOT NULL,
    reason      text NOT NULL,
    applied     boolean NOT NULL DEFAULT false,
    freed       boolean NOT NULL DEFAULT false,
    created_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE stratakv.removals IS
    'Pages taken out of the index: applied when they have left replicas, freed when the daemon has taken the memory back.';

CREATE TABLE stratakv.usage_events (
    id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    request_id        text NOT NULL UNIQUE,
    tenant_id         bigint NOT NULL REFERENCES stratakv.tenants (id),
    model             text NOT NULL,
    source            text NOT NULL CHECK (source IN ('sql', 'rest')),
    prompt_tokens     integer NOT NULL DEFAULT 0,
    cached_l1_tokens  integer NOT NULL DEFAULT 0,
    cached_l2_tokens  integer NOT NULL DEFAULT 0,
    cached_pool_tokens  integer NOT NULL DEFAULT 0,
    cached_disk_tokens  integer NOT NULL DEFAULT 0,
    generated_tokens  integer NOT NULL DEFAULT 0,
    reserved_tokens   integer NOT NULL DEFAULT 0,
    outcome           text NOT NULL,
    queue_ms          double precision,
    ttft_ms           double precision,
    generation_ms     double precision,
    mean_itl_ms       double precision,
    created_at        timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX usage_events_by_tenant ON stratakv.usage_events (tenant_id, created_at);
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute(
        "DROP TABLE stratakv.usage_events, stratakv.removals, stratakv.replicas, stratakv.blocks, stratakv.put_sessions,"
        " stratakv.workers, stratakv.segments, stratakv.nodes, stratakv.models, stratakv.tenants"
    )
