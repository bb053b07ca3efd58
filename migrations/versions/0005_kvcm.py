"""Tables of the KVCM API: storages, instance groups, instances, write sessions.

Revision: 0005
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE stratakv.kvcm_storages (
    name        text PRIMARY KEY,
    config      bytea NOT NULL,
    is_enabled  boolean NOT NULL
);
COMMENT ON TABLE stratakv.kvcm_storages IS 'Storages of the KVCM API; config is a StorageConfig message.';

CREATE TABLE stratakv.kvcm_groups (
    name    text PRIMARY KEY,
    config  bytea NOT NULL
);
COMMENT ON TABLE stratakv.kvcm_groups IS 'Instance groups of the KVCM API; config is an InstanceGroup message.';

CREATE TABLE stratakv.kvcm_instances (
    instance_id  text PRIMARY KEY,
    config       bytea NOT NULL
);
COMMENT ON TABLE stratakv.kvcm_instances IS 'Instances of the KVCM API; config is a RegisterInstanceRequest message.';

CREATE TABLE stratakv.kvcm_writes (
    session_id   text PRIMARY KEY,
    instance_id  text NOT NULL,
    group_name   text NOT NULL,
    place        text NOT NULL,
    layouts      text NOT NULL,
    layout_of    bytea NOT NULL,
    keys         bytea NOT NULL,
    status       bytea NOT NULL,
    success      bytea,
    created_s    bigint NOT NULL,
    ends_at      timestamptz NOT NULL
);
COMMENT ON TABLE stratakv.kvcm_writes IS
    'Write sessions of the KVCM API and their blocks; status has a byte per block: 2 writing, 3 serving, 4 to be deleted, 0 gone.';
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE stratakv.kvcm_writes, stratakv.kvcm_instances, stratakv.kvcm_groups, stratakv.kvcm_storages")
