-- stratakv.explain(): what a query would ask the model, without asking. @dblink@ is replaced as in install.sql. Safe to run again.
-- The query runs as the caller, in a read-only subtransaction that is rolled back. In its text the calls of infer() and its kin
-- are replaced by those of schema stratakv_probe, which report their arguments and are worth NULL; while it runs, the real ones
-- refuse. So nothing is shown that the query would not show with NULL written for infer().

-- Like infer(), for the DB node's eyes only. It does not connect: stratakv.explain() has.
CREATE OR REPLACE FUNCTION stratakv_probe.infer(prompt text, model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED COST 1000 SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
DECLARE
    caller text := stratakv.sql_caller();
    link   text := (SELECT connection_name FROM stratakv.sql_install);
    reply  record;
BEGIN
    IF link = ANY (@dblink@.dblink_get_connections()) THEN
        SELECT * INTO reply FROM stratakv.sql_ask(link, pg_catalog.format(
            'probe %s %s %s %s %s %s',
            pg_catalog.pg_backend_pid(),
            stratakv.sql_caller_word(caller),
            pg_catalog.encode(pg_catalog.convert_to(pg_catalog.current_database()::text, 'UTF8'), 'hex'),
            COALESCE('=' || pg_catalog.encode(pg_catalog.convert_to(model, 'UTF8'), 'hex'), '-'),
            COALESCE('=' || pg_catalog.encode(pg_catalog.convert_to(options::text, 'UTF8'), 'hex'), '-'),
            COALESCE('=' || pg_catalog.encode(pg_catalog.convert_to(prompt, 'UTF8'), 'base64'), '-')));
        IF reply.status = 'ok' THEN
            RETURN NULL;
        ELSIF reply.status = 'error' THEN
            RAISE EXCEPTION '%', reply.message USING ERRCODE = reply.sqlstate;
        END IF;
    END IF;
    RAISE EXCEPTION 'functions of stratakv_probe are for stratakv.explain() only' USING ERRCODE = '55000';
END
$$;

CREATE OR REPLACE FUNCTION stratakv.sql_explain_begin(query text, names text[]) RETURNS jsonb
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
BEGIN
    RETURN stratakv.sql_call(pg_catalog.format(
        'explain %s %s %s %s =%s',
        pg_catalog.pg_backend_pid(),
        pg_catalog.encode(pg_catalog.convert_to(stratakv.sql_caller(), 'UTF8'), 'hex'),
        pg_catalog.encode(pg_catalog.convert_to(pg_catalog.current_database()::text, 'UTF8'), 'hex'),
        pg_catalog.encode(pg_catalog.convert_to(pg_catalog.array_to_string(names, ','), 'UTF8'), 'hex'),
        pg_catalog.encode(pg_catalog.convert_to(query, 'UTF8'), 'base64')))::jsonb;
END
$$;

CREATE OR REPLACE FUNCTION stratakv.sql_explain_end(token text, num_rows bigint) RETURNS jsonb
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
BEGIN
    RETURN stratakv.sql_call(pg_catalog.format(
        'explained %s %s %s', pg_catalog.pg_backend_pid(),
        pg_catalog.encode(pg_catalog.convert_to(token, 'UTF8'), 'hex'), num_rows))::jsonb;
END
$$;

-- Functions of ours that the session finds without a schema. No SET here: it is about the session's own search_path.
CREATE OR REPLACE FUNCTION stratakv.sql_own_names() RETURNS text[]
LANGUAGE sql STABLE PARALLEL SAFE
RETURN ARRAY(
    SELECT own.proname::text FROM pg_catalog.pg_proc own
    WHERE own.pronamespace OPERATOR(pg_catalog.=) 'stratakv_probe'::pg_catalog.regnamespace AND (
        SELECT s.name OPERATOR(pg_catalog.=) 'stratakv'
               OR pg_catalog.strpos(p.prosrc, pg_catalog.format('stratakv.%s(', own.proname)) OPERATOR(pg_catalog.>) 0
               OR EXISTS (
                   SELECT FROM pg_catalog.pg_aggregate a
                   WHERE a.aggfnoid::pg_catalog.oid OPERATOR(pg_catalog.=) p.oid AND a.aggfinalfn::pg_catalog.oid
                       OPERATOR(pg_catalog.=) pg_catalog.to_regprocedure('stratakv.sql_fold(text[])')::pg_catalog.oid)
        FROM pg_catalog.unnest(pg_catalog.current_schemas(true)) WITH ORDINALITY AS s(name, number)
        JOIN pg_catalog.pg_namespace n ON n.nspname OPERATOR(pg_catalog.=) s.name
        JOIN pg_catalog.pg_proc p
          ON p.pronamespace OPERATOR(pg_catalog.=) n.oid AND p.proname OPERATOR(pg_catalog.=) own.proname
        ORDER BY s.number LIMIT 1));

-- Runs with the rights and the search_path of its caller, so every name and operator is qualified.
CREATE OR REPLACE FUNCTION stratakv.sql_explain(query text) RETURNS jsonb
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
DECLARE
    begun    jsonb;
    found    record;
    num_rows bigint := 0;
BEGIN
    IF query IS NULL THEN
        RETURN NULL;
    END IF;
    IF pg_catalog.current_setting('stratakv.explaining', true) OPERATOR(pg_catalog.=) 'on' THEN
        RAISE EXCEPTION 'stratakv.explain() cannot explain itself' USING ERRCODE = '0A000';
    END IF;
    begun := stratakv.sql_explain_begin(query, stratakv.sql_own_names());
    BEGIN
        PERFORM pg_catalog.set_config('transaction_read_only', 'on', true),
                pg_catalog.set_config('stratakv.explaining', 'on', true);
        FOR found IN EXECUTE begun OPERATOR(pg_catalog.->>) 'query' LOOP
            num_rows := num_rows OPERATOR(pg_catalog.+) 1;
        END LOOP;
        RAISE EXCEPTION 'nothing of it stays' USING ERRCODE = 'SKV02';
    EXCEPTION
        WHEN SQLSTATE 'SKV01' OR SQLSTATE 'SKV02' THEN
            NULL;
    END;
    RETURN stratakv.sql_explain_end(begun OPERATOR(pg_catalog.->>) 'token', num_rows);
END
$$;

CREATE OR REPLACE FUNCTION stratakv.explain_json(query text) RETURNS jsonb
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE AS $$
BEGIN
    RETURN stratakv.sql_explain(query) OPERATOR(pg_catalog.->) 'report';
END
$$;

CREATE OR REPLACE FUNCTION stratakv.explain(query text) RETURNS TABLE (item text, value text)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE ROWS 12 AS $$
BEGIN
    RETURN QUERY
    SELECT l.line OPERATOR(pg_catalog.->>) 0, l.line OPERATOR(pg_catalog.->>) 1
    FROM pg_catalog.jsonb_array_elements(stratakv.sql_explain(query) OPERATOR(pg_catalog.->) 'lines')
         WITH ORDINALITY AS l(line, number)
    ORDER BY l.number;
END
$$;

GRANT USAGE ON SCHEMA stratakv_probe TO PUBLIC;
GRANT EXECUTE ON FUNCTION
    stratakv_probe.infer(text, text, jsonb), stratakv.sql_explain_begin(text, text[]),
    stratakv.sql_explain_end(text, bigint), stratakv.sql_own_names(), stratakv.sql_explain(text),
    stratakv.explain_json(text), stratakv.explain(text)
    TO PUBLIC;
COMMENT ON SCHEMA stratakv_probe IS 'Stand-ins for infer() and its kin in stratakv.explain(); of no other use';
COMMENT ON FUNCTION stratakv.explain(text) IS 'What a query would ask the model, and what that would cost';
COMMENT ON FUNCTION stratakv.explain_json(text) IS 'The same as JSON';
COMMENT ON FUNCTION stratakv.sql_explain(text) IS 'Inner part of explain';
COMMENT ON FUNCTION stratakv.sql_explain_begin(text, text[]) IS 'Inner part of explain';
COMMENT ON FUNCTION stratakv.sql_explain_end(text, bigint) IS 'Inner part of explain';
COMMENT ON FUNCTION stratakv.sql_own_names() IS 'Inner part of explain';
