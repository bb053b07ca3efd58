-- What users look at. Safe to run again, after install.sql.

-- Asks the DB node about a topic, in the name of the session.
CREATE OR REPLACE FUNCTION stratakv.sql_ask_node(topic text, payload jsonb) RETURNS text
LANGUAGE sql VOLATILE PARALLEL RESTRICTED
RETURN stratakv.sql_call(pg_catalog.format(
    'ask %s %s %s %s =%s', pg_catalog.pg_backend_pid(), stratakv.sql_caller_word(stratakv.sql_caller()),
    pg_catalog.encode(pg_catalog.convert_to(pg_catalog.current_database()::text, 'UTF8'), 'hex'), topic,
    pg_catalog.encode(pg_catalog.convert_to(payload::text, 'UTF8'), 'base64')));
REVOKE ALL ON FUNCTION stratakv.sql_ask_node(text, jsonb) FROM PUBLIC;

-- Statistics from the DB node: those of the session's role, or all of the cluster for who may read all statistics.
CREATE OR REPLACE FUNCTION stratakv.sql_statement_stats() RETURNS TABLE (
    role text, database text, query text, calls bigint, infer_calls bigint, distinct_prompts bigint, memo_hits bigint,
    prompt_tokens bigint, cached_l1_tokens bigint, cached_l2_tokens bigint, cached_pool_tokens bigint,
    generated_tokens bigint, wait_ms double precision, errors bigint, first_seen timestamptz, last_seen timestamptz)
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED SECURITY DEFINER ROWS 100
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT s.* FROM pg_catalog.jsonb_to_recordset(
        stratakv.sql_ask_node('statements', pg_catalog.jsonb_build_object(
            'all', pg_catalog.pg_has_role(stratakv.sql_caller()::name, 'pg_read_all_stats', 'USAGE')))::jsonb
    ) AS s(
        role text, database text, query text, calls bigint, infer_calls bigint, distinct_prompts bigint, memo_hits bigint,
        prompt_tokens bigint, cached_l1_tokens bigint, cached_l2_tokens bigint, cached_pool_tokens bigint,
        generated_tokens bigint, wait_ms double precision, errors bigint, first_seen timestamptz, last_seen timestamptz);
END
$$;

CREATE OR REPLACE VIEW stratakv.statement_stats AS SELECT * FROM stratakv.sql_statement_stats();

GRANT EXECUTE ON FUNCTION stratakv.sql_statement_stats() TO PUBLIC;
GRANT SELECT ON stratakv.statement_stats TO PUBLIC;
COMMENT ON FUNCTION stratakv.sql_statement_stats() IS 'Inner part of the view statement_stats';
COMMENT ON VIEW stratakv.statement_stats IS 'Statements that call infer(): what they asked of the model, and got';

-- What the tenant of the session's role has used and may use. The database that has the metadata has views of these names itself.
CREATE OR REPLACE FUNCTION stratakv.sql_my_usage() RETURNS TABLE (
    day date, model text, source text, requests bigint, cancelled bigint, failed bigint, prompt_tokens bigint,
    cached_l1_tokens bigint, cached_l2_tokens bigint, cached_pool_tokens bigint, cached_disk_tokens bigint,
    generated_tokens bigint)
LANGUAGE sql VOLATILE PARALLEL RESTRICTED SECURITY DEFINER ROWS 100
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
    SELECT * FROM pg_catalog.jsonb_to_recordset(stratakv.sql_ask_node('usage', '{}')::jsonb) AS r(
        day date, model text, source text, requests bigint, cancelled bigint, failed bigint, prompt_tokens bigint,
        cached_l1_tokens bigint, cached_l2_tokens bigint, cached_pool_tokens bigint, cached_disk_tokens bigint,
        generated_tokens bigint)
$$;

CREATE OR REPLACE FUNCTION stratakv.sql_my_requests() RETURNS TABLE (
    created_at timestamptz, request_id text, model text, source text, outcome text, prompt_tokens integer,
    cached_l1_tokens integer, cached_l2_tokens integer, cached_pool_tokens integer, cached_disk_tokens integer,
    generated_tokens integer, queue_ms double precision, ttft_ms double precision, generation_ms double precision,
    mean_itl_ms double precision)
LANGUAGE sql VOLATILE PARALLEL RESTRICTED SECURITY DEFINER ROWS 1000
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
    SELECT * FROM pg_catalog.jsonb_to_recordset(stratakv.sql_ask_node('requests', '{}')::jsonb) AS r(
        created_at timestamptz, request_id text, model text, source text, outcome text, prompt_tokens integer,
        cached_l1_tokens integer, cached_l2_tokens integer, cached_pool_tokens integer, cached_disk_tokens integer,
        generated_tokens integer, queue_ms double precision, ttft_ms double precision, generation_ms double precision,
        mean_itl_ms double precision)
$$;

CREATE OR REPLACE FUNCTION stratakv.sql_my_limits() RETURNS TABLE ("limit" text, maximum bigint, used bigint)
LANGUAGE sql VOLATILE PARALLEL RESTRICTED SECURITY DEFINER ROWS 4
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
    SELECT * FROM pg_catalog.jsonb_to_recordset(stratakv.sql_ask_node('limits', '{}')::jsonb) AS r(
        "limit" text, maximum bigint, used bigint)
$$;

DO $$
DECLARE
    name text;
BEGIN
    IF pg_catalog.to_regclass('stratakv.schema_version') IS NULL THEN
        FOREACH name IN ARRAY ARRAY['my_usage', 'my_requests', 'my_limits'] LOOP
            EXECUTE pg_catalog.format('CREATE OR REPLACE VIEW stratakv.%I AS SELECT * FROM stratakv.%I()', name, 'sql_' || name);
            EXECUTE pg_catalog.format('GRANT SELECT ON stratakv.%I TO PUBLIC', name);
        END LOOP;
    END IF;
END
$$;
GRANT EXECUTE ON FUNCTION stratakv.sql_my_usage(), stratakv.sql_my_requests(), stratakv.sql_my_limits() TO PUBLIC;
COMMENT ON FUNCTION stratakv.sql_my_usage() IS 'Inner part of the view my_usage';
COMMENT ON FUNCTION stratakv.sql_my_requests() IS 'Inner part of the view my_requests';
COMMENT ON FUNCTION stratakv.sql_my_limits() IS 'Inner part of the view my_limits';
