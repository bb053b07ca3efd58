-- What users look at. Safe to run again, after install.sql.

-- Statistics from the DB node: those of the session's role, or all for who may read all statistics.
CREATE OR REPLACE FUNCTION stratakv.sql_statement_stats() RETURNS TABLE (
    role text, database text, query text, calls bigint, infer_calls bigint, distinct_prompts bigint, memo_hits bigint,
    prompt_tokens bigint, cached_l1_tokens bigint, cached_l2_tokens bigint, cached_pool_tokens bigint,
    generated_tokens bigint, wait_ms double precision, errors bigint, first_seen timestamptz, last_seen timestamptz)
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED SECURITY DEFINER ROWS 100
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
#variable_conflict use_column
DECLARE
    caller text := stratakv.sql_caller();
    whose  text := '-';
BEGIN
    IF NOT pg_catalog.pg_has_role(caller::name, 'pg_read_all_stats', 'USAGE') THEN
        whose := '=' || pg_catalog.encode(pg_catalog.convert_to(caller, 'UTF8'), 'hex');
    END IF;
    RETURN QUERY SELECT s.* FROM pg_catalog.jsonb_to_recordset(
        stratakv.sql_call(pg_catalog.format('statements %s %s', pg_catalog.pg_backend_pid(), whose))::jsonb
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
