"""Conversations: histories that the DB nodes keep for their tenants.

Revision: 0012
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None
compatible = "0007"

TABLES = """
CREATE TABLE stratakv.conversations (
    id            text PRIMARY KEY,
    tenant_id     bigint NOT NULL REFERENCES stratakv.tenants (id) ON DELETE CASCADE,
    metadata      jsonb NOT NULL DEFAULT '{}',
    version       bigint NOT NULL DEFAULT 0,
    num_items     integer NOT NULL DEFAULT 0,
    size_bytes    bigint NOT NULL DEFAULT 0,
    forked_from   text,
    turn_id       text,
    turn_ends_at  timestamptz,
    last_turn_id  text,
    created_at    timestamptz NOT NULL DEFAULT now(),
    used_at       timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz NOT NULL
);
CREATE INDEX conversations_by_tenant ON stratakv.conversations (tenant_id, created_at, id);
CREATE INDEX conversations_by_end ON stratakv.conversations (expires_at);
COMMENT ON TABLE stratakv.conversations IS
    'Histories kept for tenants. version counts changes. turn_id: the turn that is under way, until turn_ends_at at most; '
    'last_turn_id: the one before, so that it can be asked for again.';

CREATE TABLE stratakv.conversation_items (
    conversation_id  text NOT NULL REFERENCES stratakv.conversations (id) ON DELETE CASCADE,
    position         integer NOT NULL,
    item_id          text NOT NULL,
    role             text NOT NULL,
    content          text NOT NULL,
    token_ids        bytea,
    after_position   integer,
    end_chars        integer,
    text_digest      bytea,
    created_at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (conversation_id, position),
    UNIQUE (conversation_id, item_id)
);
COMMENT ON TABLE stratakv.conversation_items IS
    'Messages. An answer has its token_ids (4 bytes each) with those of the prompt since the answer at after_position, and how '
    'long the text is that they all stand for, with its digest: as long as that is so, the same tokens are sent again.';
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE stratakv.conversation_items, stratakv.conversations")
