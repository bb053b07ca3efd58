-- One answer about many texts: infer_fold() takes them as an array, the aggregate infer_agg() gathers them. Safe to run again,
-- after install.sql. The DB node packs them into prompts that fit.

CREATE OR REPLACE FUNCTION stratakv.infer_fold(
    instruction text, contents text[], model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE sql STABLE PARALLEL RESTRICTED COST 1000
RETURN stratakv.infer(
    CASE WHEN instruction IS NOT NULL AND cardinality(array_remove(contents, NULL)) > 0 THEN
        jsonb_build_object('instruction', instruction, 'pieces', to_jsonb(array_remove(contents, NULL)))::text END,
    model, COALESCE(options, '{}') || '{"@fold": true}');

-- The state: instruction, model, options, then the contents. Aggregates know no defaults, and a function around another one
-- would copy the state once more; so each number of arguments is one of its own.
CREATE OR REPLACE FUNCTION stratakv.sql_gather(state text[], instruction text, content text) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF instruction IS NULL OR content IS NULL THEN
        RETURN state;
    END IF;
    IF state IS NULL THEN
        RETURN ARRAY[instruction, NULL, NULL, content];
    END IF;
    IF pg_column_size(state) + octet_length(content) > 16777216 THEN
        RAISE EXCEPTION 'infer_agg: the texts of a group are longer than 16 MiB'
            USING ERRCODE = '54000', HINT = 'Make smaller groups, and fold their answers.';
    END IF;
    state := array_append(state, content);
    RETURN state;
END
$$;

CREATE OR REPLACE FUNCTION stratakv.sql_gather(state text[], instruction text, content text, model text) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF instruction IS NULL OR content IS NULL THEN
        RETURN state;
    END IF;
    IF state IS NULL THEN
        RETURN ARRAY[instruction, model, NULL, content];
    END IF;
    IF pg_column_size(state) + octet_length(content) > 16777216 THEN
        RAISE EXCEPTION 'infer_agg: the texts of a group are longer than 16 MiB'
            USING ERRCODE = '54000', HINT = 'Make smaller groups, and fold their answers.';
    END IF;
    state := array_append(state, content);
    RETURN state;
END
$$;

CREATE OR REPLACE FUNCTION stratakv.sql_gather(
    state text[], instruction text, content text, model text, options jsonb) RETURNS text[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF instruction IS NULL OR content IS NULL THEN
        RETURN state;
    END IF;
    IF state IS NULL THEN
        RETURN ARRAY[instruction, model, options::text, content];
    END IF;
    IF pg_column_size(state) + octet_length(content) > 16777216 THEN
        RAISE EXCEPTION 'infer_agg: the texts of a group are longer than 16 MiB'
            USING ERRCODE = '54000', HINT = 'Make smaller groups, and fold their answers.';
    END IF;
    state := array_append(state, content);
    RETURN state;
END
$$;

CREATE OR REPLACE FUNCTION stratakv.sql_fold(state text[]) RETURNS text
LANGUAGE plpgsql STABLE STRICT PARALLEL RESTRICTED COST 1000 SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- no SQL function around it: infer() trusts only callers whose schema it is told
    RETURN stratakv.infer(
        jsonb_build_object('instruction', state[1], 'pieces', to_jsonb(state[4:]))::text, state[2],
        COALESCE(state[3]::jsonb, '{}') || '{"@fold": true}');
END
$$;

CREATE OR REPLACE AGGREGATE stratakv.infer_agg(instruction text, content text) (
    SFUNC = stratakv.sql_gather, STYPE = text[], FINALFUNC = stratakv.sql_fold, PARALLEL = RESTRICTED);
CREATE OR REPLACE AGGREGATE stratakv.infer_agg(instruction text, content text, model text) (
    SFUNC = stratakv.sql_gather, STYPE = text[], FINALFUNC = stratakv.sql_fold, PARALLEL = RESTRICTED);
CREATE OR REPLACE AGGREGATE stratakv.infer_agg(instruction text, content text, model text, options jsonb) (
    SFUNC = stratakv.sql_gather, STYPE = text[], FINALFUNC = stratakv.sql_fold, PARALLEL = RESTRICTED);

GRANT EXECUTE ON FUNCTION
    stratakv.sql_gather(text[], text, text), stratakv.sql_gather(text[], text, text, text),
    stratakv.sql_gather(text[], text, text, text, jsonb), stratakv.sql_fold(text[]),
    stratakv.infer_fold(text, text[], text, jsonb),
    stratakv.infer_agg(text, text), stratakv.infer_agg(text, text, text), stratakv.infer_agg(text, text, text, jsonb)
    TO PUBLIC;
COMMENT ON FUNCTION stratakv.infer_fold(text, text[], text, jsonb) IS 'The model''s answer about many texts together';
COMMENT ON FUNCTION stratakv.sql_gather(text[], text, text) IS 'Inner part of infer_agg';
COMMENT ON FUNCTION stratakv.sql_gather(text[], text, text, text) IS 'Inner part of infer_agg';
COMMENT ON FUNCTION stratakv.sql_gather(text[], text, text, text, jsonb) IS 'Inner part of infer_agg';
COMMENT ON FUNCTION stratakv.sql_fold(text[]) IS 'Inner part of infer_agg';
COMMENT ON AGGREGATE stratakv.infer_agg(text, text) IS 'The model''s answer about many texts together';
COMMENT ON AGGREGATE stratakv.infer_agg(text, text, text) IS 'The model''s answer about many texts together';
COMMENT ON AGGREGATE stratakv.infer_agg(text, text, text, jsonb) IS 'The model''s answer about many texts together';
