"""Usage by month and by day: every settled request goes on into a partition of its month and into the sums of its day.

`usage_events` stays the table that requests settle in, once each; it is emptied of what is older than some days.

Revision: 0010
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None
compatible = "0007"

TABLES = """
CREATE TABLE stratakv.usage_history (
    request_id          text NOT NULL,
    tenant_id           bigint NOT NULL REFERENCES stratakv.tenants (id),
    model               text NOT NULL,
    source              text NOT NULL,
    prompt_tokens       integer NOT NULL,
    cached_l1_tokens    integer NOT NULL,
    cached_l2_tokens    integer NOT NULL,
    cached_pool_tokens  integer NOT NULL,
    cached_disk_tokens  integer NOT NULL,
    generated_tokens    integer NOT NULL,
    reserved_tokens     integer NOT NULL,
    outcome             text NOT NULL,
    queue_ms            double precision,
    ttft_ms             double precision,
    generation_ms       double precision,
    mean_itl_ms         double precision,
    created_at          timestamptz NOT NULL
) PARTITION BY RANGE (created_at);
CREATE INDEX usage_history_by_tenant ON stratakv.usage_history (tenant_id, created_at);
CREATE INDEX usage_history_by_request ON stratakv.usage_history (request_id);
COMMENT ON TABLE stratakv.usage_history IS
    'Every settled request, in a partition for each month in UTC. DB nodes make partitions ahead and drop old ones.';
COMMENT ON TABLE stratakv.usage_events IS
    'Requests of the last days: here a request settles, once. A trigger adds it to usage_history and usage_daily.';
CREATE INDEX usage_events_created_at ON stratakv.usage_events (created_at);

CREATE TABLE stratakv.usage_daily (
    day                 date NOT NULL,
    tenant_id           bigint NOT NULL REFERENCES stratakv.tenants (id),
    model               text NOT NULL,
    source              text NOT NULL,
    requests            bigint NOT NULL,
    cancelled           bigint NOT NULL,
    failed              bigint NOT NULL,
    prompt_tokens       bigint NOT NULL,
    cached_l1_tokens    bigint NOT NULL,
    cached_l2_tokens    bigint NOT NULL,
    cached_pool_tokens  bigint NOT NULL,
    cached_disk_tokens  bigint NOT NULL,
    generated_tokens    bigint NOT NULL,
    unused_requests     bigint NOT NULL,
    unused_tokens       bigint NOT NULL,
    PRIMARY KEY (day, tenant_id, model, source)
);
CREATE INDEX usage_daily_by_tenant ON stratakv.usage_daily (tenant_id, day);
COMMENT ON TABLE stratakv.usage_daily IS
    'Sums of settled requests by day in UTC. requests has cancelled and failed ones in it. What was inferred ahead of a statement '
    'and not used is in the unused_ columns only.';
"""

SUMS = """
SELECT (created_at AT TIME ZONE 'UTC')::date AS day, tenant_id, model, source,
       count(*) FILTER (WHERE outcome <> 'unused') AS requests,
       count(*) FILTER (WHERE outcome = 'cancelled') AS cancelled,
       count(*) FILTER (WHERE outcome NOT IN ('completed', 'cancelled', 'unused')) AS failed,
       coalesce(sum(prompt_tokens) FILTER (WHERE outcome <> 'unused'), 0) AS prompt_tokens,
       coalesce(sum(cached_l1_tokens) FILTER (WHERE outcome <> 'unused'), 0) AS cached_l1_tokens,
       coalesce(sum(cached_l2_tokens) FILTER (WHERE outcome <> 'unused'), 0) AS cached_l2_tokens,
       coalesce(sum(cached_pool_tokens) FILTER (WHERE outcome <> 'unused'), 0) AS cached_pool_tokens,
       coalesce(sum(cached_disk_tokens) FILTER (WHERE outcome <> 'unused'), 0) AS cached_disk_tokens,
       coalesce(sum(generated_tokens) FILTER (WHERE outcome <> 'unused'), 0) AS generated_tokens,
       count(*) FILTER (WHERE outcome = 'unused') AS unused_requests,
       coalesce(sum(prompt_tokens::bigint + generated_tokens) FILTER (WHERE outcome = 'unused'), 0) AS unused_tokens
"""
GROUPS = "GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"
"""In order, so that DB nodes that add to the same sums lock them in one order."""
COLUMNS = """request_id, tenant_id, model, source, prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens,
        cached_disk_tokens, generated_tokens, reserved_tokens, outcome, queue_ms, ttft_ms, generation_ms, mean_itl_ms, created_at"""

PARTITIONS = """
-- Partitions from the month of the given time to so many months after this one; how many are new. Attached, not created in
-- place, so that readers and writers need not wait.
CREATE FUNCTION stratakv.make_usage_partitions(since timestamptz, months_ahead integer) RETURNS integer
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    first_month  timestamp := date_trunc('month', since AT TIME ZONE 'UTC');
    last_month   timestamp := date_trunc('month', now() AT TIME ZONE 'UTC') + months_ahead * interval '1 month';
    month        timestamp;
    name         text;
    made         integer := 0;
BEGIN
    FOR month IN SELECT generate_series(first_month, last_month, interval '1 month') LOOP
        name := 'usage_history_' || to_char(month, 'YYYY_MM');
        IF to_regclass('stratakv.' || name) IS NULL THEN
            EXECUTE format(
                'CREATE TABLE stratakv.%I (LIKE stratakv.usage_history INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
            EXECUTE format(
                'ALTER TABLE stratakv.usage_history ATTACH PARTITION stratakv.%I FOR VALUES FROM (%L) TO (%L)',
                name, month AT TIME ZONE 'UTC', (month + interval '1 month') AT TIME ZONE 'UTC');
            made := made + 1;
        END IF;
    END LOOP;
    RETURN made;
END $$;
COMMENT ON FUNCTION stratakv.make_usage_partitions(timestamptz, integer) IS 'Called by DB nodes every hour';

-- Takes away the months before the last so many whole ones; their names.
CREATE FUNCTION stratakv.drop_usage_partitions(months_kept integer) RETURNS SETOF text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    first_kept  text := 'usage_history_' || to_char(
        date_trunc('month', now() AT TIME ZONE 'UTC') - months_kept * interval '1 month', 'YYYY_MM');
    name        text;
BEGIN
    FOR name IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'stratakv.usage_history'::regclass AND c.relname < first_kept ORDER BY c.relname
    LOOP
        EXECUTE format('DROP TABLE stratakv.%I', name);
        RETURN NEXT name;
    END LOOP;
END $$;
COMMENT ON FUNCTION stratakv.drop_usage_partitions(integer) IS 'Called by DB nodes every hour';
"""

TRIGGER = f"""
-- With its owner's rights: who may settle requests need not be let into the sums.
CREATE FUNCTION stratakv.keep_usage() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO stratakv.usage_history ({COLUMNS})
    SELECT {COLUMNS} FROM settled;
    INSERT INTO stratakv.usage_daily AS d (
        day, tenant_id, model, source, requests, cancelled, failed, prompt_tokens, cached_l1_tokens, cached_l2_tokens,
        cached_pool_tokens, cached_disk_tokens, generated_tokens, unused_requests, unused_tokens)
    {SUMS} FROM settled {GROUPS}
    ON CONFLICT (day, tenant_id, model, source) DO UPDATE SET
        requests = d.requests + excluded.requests,
        cancelled = d.cancelled + excluded.cancelled,
        failed = d.failed + excluded.failed,
        prompt_tokens = d.prompt_tokens + excluded.prompt_tokens,
        cached_l1_tokens = d.cached_l1_tokens + excluded.cached_l1_tokens,
        cached_l2_tokens = d.cached_l2_tokens + excluded.cached_l2_tokens,
        cached_pool_tokens = d.cached_pool_tokens + excluded.cached_pool_tokens,
        cached_disk_tokens = d.cached_disk_tokens + excluded.cached_disk_tokens,
        generated_tokens = d.generated_tokens + excluded.generated_tokens,
        unused_requests = d.unused_requests + excluded.unused_requests,
        unused_tokens = d.unused_tokens + excluded.unused_tokens;
    RETURN NULL;
END $$;
CREATE TRIGGER keep_usage AFTER INSERT ON stratakv.usage_events
    REFERENCING NEW TABLE AS settled FOR EACH STATEMENT EXECUTE FUNCTION stratakv.keep_usage();
"""

BEFORE = f"""
-- The trigger's lock keeps writers out until the end, so nothing is missed and nothing is there twice.
SELECT stratakv.make_usage_partitions(
    least((SELECT min(created_at) FROM stratakv.usage_events), now() - interval '7 days'), 3);
INSERT INTO stratakv.usage_history ({COLUMNS})
    SELECT {COLUMNS} FROM stratakv.usage_events;
INSERT INTO stratakv.usage_daily {SUMS} FROM stratakv.usage_events {GROUPS};
"""

VIEWS = """
CREATE VIEW stratakv.usage_by_day AS
    SELECT d.day, t.name AS tenant, d.model, d.source, d.requests, d.cancelled, d.failed, d.prompt_tokens,
           d.cached_l1_tokens + d.cached_l2_tokens + d.cached_pool_tokens + d.cached_disk_tokens AS cached_tokens,
           d.generated_tokens, d.unused_requests, d.unused_tokens
    FROM stratakv.usage_daily d JOIN stratakv.tenants t ON t.id = d.tenant_id;
COMMENT ON VIEW stratakv.usage_by_day IS 'Usage of all tenants by day, model and face, for operators';
"""
for _view, _key, _comment in (
    ("usage_by_tenant", "tenant", "Usage by month and tenant, for operators"),
    ("usage_by_model", "model", "Usage by month and model, for operators"),
):
    VIEWS += f"""
CREATE VIEW stratakv.{_view} AS
    SELECT date_trunc('month', day::timestamp)::date AS month, {_key}, sum(requests)::bigint AS requests,
           sum(cancelled)::bigint AS cancelled, sum(failed)::bigint AS failed, sum(prompt_tokens)::bigint AS prompt_tokens,
           sum(cached_tokens)::bigint AS cached_tokens, sum(generated_tokens)::bigint AS generated_tokens,
           sum(unused_requests)::bigint AS unused_requests, sum(unused_tokens)::bigint AS unused_tokens
    FROM stratakv.usage_by_day GROUP BY 1, 2;
COMMENT ON VIEW stratakv.{_view} IS '{_comment}';
"""

RETURN = """
INSERT INTO stratakv.usage_events (
    request_id, tenant_id, model, source, prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens,
    cached_disk_tokens, generated_tokens, reserved_tokens, outcome, queue_ms, ttft_ms, generation_ms, mean_itl_ms, created_at)
SELECT request_id, tenant_id, model, source, prompt_tokens, cached_l1_tokens, cached_l2_tokens, cached_pool_tokens,
       cached_disk_tokens, generated_tokens, reserved_tokens, outcome, queue_ms, ttft_ms, generation_ms, mean_itl_ms, created_at
FROM stratakv.usage_history ORDER BY created_at
ON CONFLICT (request_id) DO NOTHING;
"""


def upgrade() -> None:
    for step in (TABLES, PARTITIONS, TRIGGER, BEFORE, VIEWS):
        op.execute(step)


def downgrade() -> None:
    op.execute("DROP TRIGGER keep_usage ON stratakv.usage_events")
    op.execute(RETURN)
    op.execute("DROP VIEW stratakv.usage_by_model, stratakv.usage_by_tenant, stratakv.usage_by_day")
    op.execute("DROP TABLE stratakv.usage_daily, stratakv.usage_history")
    op.execute("DROP FUNCTION stratakv.keep_usage, stratakv.make_usage_partitions, stratakv.drop_usage_partitions")
    op.execute("DROP INDEX stratakv.usage_events_created_at")
    op.execute("COMMENT ON TABLE stratakv.usage_events IS NULL")
