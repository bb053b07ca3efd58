-- The kin of infer(). Safe to run again, after install.sql.
-- All but the template's filler are plain SQL around stratakv.infer, which alone knows who calls and where to ask; the planner
-- inlines them. Names in a body written after RETURN are resolved here and now, so no search_path matters later.
-- What an answer must be goes to the DB node among the options, under names that begin with @.

CREATE OR REPLACE FUNCTION stratakv.infer_json(
    prompt text, schema jsonb, model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS jsonb
LANGUAGE sql STABLE PARALLEL RESTRICTED COST 1000
RETURN stratakv.infer(
    prompt, model,
    -- NULL must not become "any answer": the DB node refuses a list by name
    COALESCE(options, '{}') || jsonb_build_object('@json_schema', COALESCE(NULLIF(schema, 'null'), '[]')))::jsonb;

CREATE OR REPLACE FUNCTION stratakv.infer_choice(
    prompt text, choices text[], model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE sql STABLE PARALLEL RESTRICTED COST 1000
RETURN stratakv.infer(
    prompt, model, COALESCE(options, '{}') || jsonb_build_object('@choices', COALESCE(to_jsonb(choices), '[]')));

-- Whichever way the model would put it; boolean reads them all.
CREATE OR REPLACE FUNCTION stratakv.infer_bool(
    prompt text, model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS boolean
LANGUAGE sql STABLE PARALLEL RESTRICTED COST 1000
RETURN stratakv.infer(
    prompt, model,
    COALESCE(options, '{}') || '{"@choices": ["Yes", "No", "yes", "no", "True", "False", "true", "false"]}')::boolean;

CREATE OR REPLACE FUNCTION stratakv.infer_tokens(content text, model text DEFAULT NULL) RETURNS integer
LANGUAGE sql STABLE PARALLEL RESTRICTED COST 1000
RETURN stratakv.infer(content, model, '{"@count_tokens": true}')::integer;

-- {name} stands for a field, {*} for all others, {{ and }} for braces. What the DB node gets is JSON: the text before {*} and
-- after it, and the fields that stand there; it puts them in the order that lets rows begin alike.
CREATE OR REPLACE FUNCTION stratakv.sql_fill_template(template text, fields jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part        text;
    before      text;
    filled      text := '';
    others      jsonb := fields;
    has_fields  boolean := false;
BEGIN
    IF template IS NULL OR fields IS NULL THEN
        RETURN NULL;
    END IF;
    IF pg_catalog.jsonb_typeof(fields) <> 'object' THEN
        RAISE EXCEPTION 'infer_row: fields must be a JSON object'
            USING ERRCODE = '22023', HINT = 'For a row, write to_jsonb(t).';
    END IF;
    FOR part IN
        SELECT m.match[1] FROM pg_catalog.regexp_matches(template, '\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+', 'g') AS m(match)
    LOOP
        IF part IN ('{', '}') THEN
            RAISE EXCEPTION 'infer_row: the template has a single %', part
                USING ERRCODE = '22023', HINT = 'Write {name} for a field, and {{ or }} for a brace.';
        ELSIF part IN ('{{', '}}') THEN
            filled := filled || pg_catalog.left(part, 1);
        ELSIF part NOT LIKE '{%' THEN
            filled := filled || part;
        ELSIF part = '{*}' THEN
            IF before IS NOT NULL THEN
                RAISE EXCEPTION 'infer_row: the template has {*} twice' USING ERRCODE = '22023';
            END IF;
            before := filled;
            filled := '';
        ELSE
            has_fields := true;
            part := pg_catalog.substr(part, 2, pg_catalog.length(part) - 2);
            IF NOT fields ? part THEN
                RAISE EXCEPTION 'infer_row: the template names {%}, which is no field', part USING ERRCODE = '22023';
            END IF;
            filled := filled || COALESCE(fields ->> part, '');
            others := others - part;
        END IF;
    END LOOP;
    IF before IS NULL AND has_fields THEN
        RETURN pg_catalog.jsonb_build_object('before', filled, 'after', '', 'fields', '{}'::jsonb);
    END IF;
    SELECT pg_catalog.jsonb_object_agg(f.key, COALESCE(f.value, '')) INTO others FROM pg_catalog.jsonb_each_text(others) f;
    RETURN pg_catalog.jsonb_build_object(
        'before', COALESCE(before, filled || E'\n'), 'after', CASE WHEN before IS NULL THEN '' ELSE filled END,
        'fields', COALESCE(others, '{}'));
END
$$;

CREATE OR REPLACE FUNCTION stratakv.infer_row(
    template text, fields jsonb, model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE sql STABLE PARALLEL RESTRICTED COST 1000
RETURN stratakv.infer(
    stratakv.sql_fill_template(template, fields), model, COALESCE(options, '{}') || '{"@row": true}');

GRANT EXECUTE ON FUNCTION
    stratakv.infer_json(text, jsonb, text, jsonb), stratakv.infer_choice(text, text[], text, jsonb),
    stratakv.infer_bool(text, text, jsonb), stratakv.infer_tokens(text, text),
    stratakv.infer_row(text, jsonb, text, jsonb), stratakv.sql_fill_template(text, jsonb)
    TO PUBLIC;
COMMENT ON FUNCTION stratakv.infer_json(text, jsonb, text, jsonb) IS 'The model''s answer as JSON that fits a schema';
COMMENT ON FUNCTION stratakv.infer_choice(text, text[], text, jsonb) IS 'The model''s choice';
COMMENT ON FUNCTION stratakv.infer_bool(text, text, jsonb) IS 'The model''s yes or no';
COMMENT ON FUNCTION stratakv.infer_tokens(text, text) IS 'How many tokens a text has';
COMMENT ON FUNCTION stratakv.infer_row(text, jsonb, text, jsonb) IS 'The model''s answer to a template filled with fields';
COMMENT ON FUNCTION stratakv.sql_fill_template(text, jsonb) IS 'A template with its fields, as infer() takes it';
