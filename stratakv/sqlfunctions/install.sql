-- The SQL functions. @dblink@ is replaced by the quoted schema of the extension dblink. Safe to run again.
-- Every definer function pins its search_path and qualifies every name that is not in pg_catalog.

CREATE TABLE IF NOT EXISTS stratakv.sql_listeners (
    name       text PRIMARY KEY,
    conninfo   text NOT NULL,
    is_default boolean NOT NULL
);
COMMENT ON TABLE stratakv.sql_listeners IS 'Where infer() calls back to, with the key; for the owner only';

CREATE TABLE IF NOT EXISTS stratakv.sql_install (
    one             boolean PRIMARY KEY DEFAULT true CHECK (one),
    version         integer NOT NULL,
    connection_name text NOT NULL
);
COMMENT ON TABLE stratakv.sql_install IS 'Version of the functions, and the secret name of the dblink connection';

-- Default privileges of the database may have let others in.
DO $$
DECLARE
    entry record;
BEGIN
    FOR entry IN
        SELECT c.relname, a.grantee
        FROM pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) a
        WHERE c.relnamespace = 'stratakv'::regnamespace AND c.relname IN ('sql_listeners', 'sql_install')
          AND a.grantee <> c.relowner
    LOOP
        EXECUTE pg_catalog.format(
            'REVOKE ALL ON stratakv.%I FROM %s', entry.relname,
            CASE entry.grantee WHEN 0 THEN 'PUBLIC' ELSE entry.grantee::regrole::text END);
    END LOOP;
END
$$;

-- Refuses while a role that is neither superuser nor our owner may execute dblink: it could use our connection as anybody.
CREATE OR REPLACE FUNCTION stratakv.sql_check_dblink() RETURNS void
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_catalog.pg_extension e
        JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.refobjid = e.oid
        JOIN pg_catalog.pg_proc p ON d.classid = 'pg_catalog.pg_proc'::regclass AND p.oid = d.objid
        CROSS JOIN LATERAL
            pg_catalog.aclexplode(COALESCE(p.proacl, pg_catalog.acldefault('f', p.proowner))) a
        LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
        WHERE e.extname = 'dblink' AND d.deptype = 'e' AND r.rolname IS DISTINCT FROM current_user
          AND NOT COALESCE(r.rolsuper, false)
    ) THEN
        RAISE EXCEPTION 'a role that is no superuser may execute the functions of dblink: infer() would not be safe'
            USING ERRCODE = '42501', HINT = 'Run "stratakv install" again: it names the privileges to revoke.';
    END IF;
END
$$;

-- Opens the session's connection to a listener, the default one if none is named; false if that is not known.
CREATE OR REPLACE FUNCTION stratakv.sql_connect(link text, listener text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    target text;
BEGIN
    IF listener IS NULL THEN
        SELECT conninfo INTO target FROM stratakv.sql_listeners WHERE is_default;
    ELSE
        SELECT conninfo INTO target FROM stratakv.sql_listeners WHERE name = listener;
    END IF;
    IF target IS NULL THEN
        RETURN false;
    END IF;
    PERFORM stratakv.sql_check_dblink();
    IF link = ANY (@dblink@.dblink_get_connections()) THEN
        PERFORM @dblink@.dblink_disconnect(link);
    END IF;
    -- The DB node knows by it in which cluster a role is.
    PERFORM @dblink@.dblink_connect(
        link, target || pg_catalog.format(' application_name=stratakv:%s', s.system_identifier))
    FROM pg_catalog.pg_control_system() s;
    RETURN true;
END
$$;

-- One question to the listener. All NULL if the connection is dead. Nothing in it raises: dblink() itself would, where a
-- cancelled statement has left an answer unread, and where the connection is known to be dead.
CREATE OR REPLACE FUNCTION stratakv.sql_ask(
    link text, request text, OUT status text, OUT answer text, OUT sqlstate text, OUT message text, OUT hint text)
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED AS $$
BEGIN
    IF @dblink@.dblink_send_query(link, request) = 0 THEN
        FOR unread IN 1 .. 3 LOOP
            PERFORM FROM @dblink@.dblink_get_result(link, false) AS t(a text, b text, c text, d text, e text);
        END LOOP;
        IF @dblink@.dblink_send_query(link, request) = 0 THEN
            RETURN;
        END IF;
    END IF;
    SELECT t.a, t.b, t.c, t.d, t.e INTO status, answer, sqlstate, message, hint
    FROM @dblink@.dblink_get_result(link, false) AS t(a text, b text, c text, d text, e text);
    PERFORM FROM @dblink@.dblink_get_result(link, false) AS t(a text, b text, c text, d text, e text);  -- the end
END
$$;

-- Who asks: the role of SET ROLE, or else the session's user. It survives SECURITY DEFINER. The setting keeps the name under
-- which the role was set; another role may have come to that name since.
CREATE OR REPLACE FUNCTION stratakv.sql_caller() RETURNS text
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED AS $$
DECLARE
    caller text := pg_catalog.current_setting('role');
BEGIN
    IF caller = 'none' THEN
        RETURN session_user;
    END IF;
    IF NOT pg_catalog.pg_has_role(session_user, caller::name, 'MEMBER') THEN
        RAISE EXCEPTION 'role "%" is no longer one that "%" may set', caller, session_user
            USING ERRCODE = '42501', HINT = 'Run SET ROLE again.';
    END IF;
    RETURN caller;
END
$$;

-- The same with the role that has logged in, by its OID and its name: a tenant is known by it, whatever SET ROLE says. Then the
-- caller's OID: another role may come to its name.
CREATE OR REPLACE FUNCTION stratakv.sql_caller_word(caller text) RETURNS text
LANGUAGE sql STABLE PARALLEL RESTRICTED
RETURN pg_catalog.format(
    '%s:%s:%s:%s', pg_catalog.encode(pg_catalog.convert_to(caller, 'UTF8'), 'hex'),
    pg_catalog.to_regrole(pg_catalog.quote_ident(session_user))::oid,
    pg_catalog.encode(pg_catalog.convert_to(session_user::text, 'UTF8'), 'hex'),
    pg_catalog.to_regrole(pg_catalog.quote_ident(caller))::oid);

-- Asks a request that is no infer() and waits for its answer, polling as infer() does.
CREATE OR REPLACE FUNCTION stratakv.sql_call(request text) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED AS $$
DECLARE
    link      text := (SELECT connection_name FROM stratakv.sql_install);
    connected boolean := link = ANY (@dblink@.dblink_get_connections());
    reply     record;
BEGIN
    PERFORM stratakv.sql_check_dblink();
    FOR attempt IN 1 .. 3 LOOP
        IF connected IS NOT TRUE AND NOT stratakv.sql_connect(link, NULL) THEN
            RAISE EXCEPTION 'no DB node is known in this database'
                USING ERRCODE = '55000', HINT = 'Run "stratakv install --database URL".';
        END IF;
        SELECT * INTO reply FROM stratakv.sql_ask(link, request);
        WHILE reply.status IN ('wait', 'flush') LOOP
            IF reply.status = 'flush' THEN  -- PostgreSQL sends the rows that are ready with it; the gateway swallows it
                RAISE INFO '' USING ERRCODE = 'SKV02';
            END IF;
            SELECT * INTO reply FROM stratakv.sql_ask(link, 'poll');
        END LOOP;
        IF reply.status = 'ok' THEN
            RETURN pg_catalog.convert_from(pg_catalog.decode(reply.answer, 'base64'), 'UTF8');
        ELSIF reply.status = 'error' AND reply.hint IS NULL THEN
            RAISE EXCEPTION '%', reply.message USING ERRCODE = reply.sqlstate;
        ELSIF reply.status = 'error' THEN
            RAISE EXCEPTION '%', reply.message USING ERRCODE = reply.sqlstate, HINT = reply.hint;
        END IF;
        connected := reply.status IS NOT NULL;
    END LOOP;
    RAISE EXCEPTION 'the DB node ended during the call' USING ERRCODE = '57P03', HINT = 'Run the statement again.';
END
$$;

-- Ties this session's connection to a session of a DB node's gateway, which calls it with a nonce of its own.
CREATE OR REPLACE FUNCTION stratakv.bind(nonce text, listener text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
DECLARE
    link  text := (SELECT connection_name FROM stratakv.sql_install);
    reply record;
BEGIN
    IF NOT stratakv.sql_connect(link, listener) THEN
        RETURN false;
    END IF;
    SELECT * INTO reply FROM stratakv.sql_ask(
        link, pg_catalog.format('bind %s %s', pg_catalog.encode(pg_catalog.convert_to(nonce, 'UTF8'), 'hex'),
                                pg_catalog.pg_backend_pid()));
    IF reply.status IS DISTINCT FROM 'ok' THEN
        RAISE EXCEPTION '%', COALESCE(reply.message, 'the DB node does not answer')
            USING ERRCODE = COALESCE(reply.sqlstate, '57P03');
    END IF;
    RETURN true;
END
$$;

-- Polls, each answered within a fifth of a second, let cancel and statement_timeout through. No EXCEPTION block: parallel
-- plans of older versions refuse subtransactions. A dead connection answers NULL; then connect and ask again.
CREATE OR REPLACE FUNCTION stratakv.infer(prompt text, model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL RESTRICTED COST 1000 SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
DECLARE
    caller     text := stratakv.sql_caller();
    stack      text;
    link       text;
    request    text;
    suspicious boolean;
    connected  boolean;
    reply      record;
BEGIN
    IF prompt IS NULL THEN
        RETURN NULL;
    END IF;
    IF pg_catalog.current_setting('stratakv.explaining', true) = 'on' THEN
        RAISE EXCEPTION 'stratakv.explain() does not look into views, functions and policies that call infer()'
            USING ERRCODE = '0A000', HINT = 'Explain the query that they consist of.';
    END IF;
    -- Within functions of others: who wrote them relies on the answer, so nothing may stand in for it.
    request := 'infer';
    GET DIAGNOSTICS stack = PG_CONTEXT;
    IF strpos(stack, E'\n') > 0 THEN
        IF EXISTS (SELECT FROM regexp_split_to_table(stack, E'\n') WITH ORDINALITY AS line(content, n)
                   WHERE n > 1 AND content !~ '[ "]stratakv\.') THEN
            request := 'infer_within';
        END IF;
    END IF;
    request := request || pg_catalog.format(
        ' %s %s %s %s %s %s',
        pg_catalog.pg_backend_pid(),
        stratakv.sql_caller_word(caller),
        pg_catalog.encode(pg_catalog.convert_to(pg_catalog.current_database()::text, 'UTF8'), 'hex'),
        COALESCE('=' || pg_catalog.encode(pg_catalog.convert_to(model, 'UTF8'), 'hex'), '-'),
        COALESCE('=' || pg_catalog.encode(pg_catalog.convert_to(options::text, 'UTF8'), 'hex'), '-'),
        '=' || pg_catalog.encode(pg_catalog.convert_to(prompt, 'UTF8'), 'base64'));
    -- A quick look at all of dblink: is there another grantee than the owner?
    SELECT i.connection_name, EXISTS (
        SELECT FROM pg_catalog.pg_proc p
        WHERE p.proname >= 'dblink' AND p.proname < 'dblinl'
          AND (p.proacl IS NULL OR pg_catalog.cardinality(p.proacl) <> 1
               OR NOT p.proacl[1] = pg_catalog.makeaclitem(p.proowner, p.proowner, 'EXECUTE', false)))
    INTO link, suspicious FROM stratakv.sql_install i;
    IF suspicious THEN
        PERFORM stratakv.sql_check_dblink();
    END IF;
    connected := link = ANY (@dblink@.dblink_get_connections());
    FOR attempt IN 1 .. 3 LOOP
        IF connected IS NOT TRUE AND NOT stratakv.sql_connect(link, NULL) THEN
            RAISE EXCEPTION 'no DB node is known in this database'
                USING ERRCODE = '55000', HINT = 'Run "stratakv install --database URL".';
        END IF;
        SELECT * INTO reply FROM stratakv.sql_ask(link, request);
        WHILE reply.status IN ('wait', 'flush') LOOP
            IF reply.status = 'flush' THEN  -- PostgreSQL sends the rows that are ready with it; the gateway swallows it
                RAISE INFO '' USING ERRCODE = 'SKV02';
            END IF;
            SELECT * INTO reply FROM stratakv.sql_ask(link, 'poll');
        END LOOP;
        IF reply.status = 'ok' THEN
            RETURN pg_catalog.convert_from(pg_catalog.decode(reply.answer, 'base64'), 'UTF8');
        ELSIF reply.status = 'error' AND reply.hint IS NULL THEN
            RAISE EXCEPTION '%', reply.message USING ERRCODE = reply.sqlstate;
        ELSIF reply.status = 'error' THEN
            RAISE EXCEPTION '%', reply.message USING ERRCODE = reply.sqlstate, HINT = reply.hint;
        END IF;
        connected := reply.status IS NOT NULL;
    END LOOP;
    RAISE EXCEPTION 'the DB node ended during the call'
        USING ERRCODE = '57P03', HINT = 'Run the statement again.';
END
$$;

DO $$
DECLARE
    entry record;
BEGIN
    FOR entry IN
        SELECT p.oid::regprocedure AS function, a.grantee
        FROM pg_catalog.pg_proc p,
             pg_catalog.aclexplode(COALESCE(p.proacl, pg_catalog.acldefault('f', p.proowner))) a
        WHERE p.pronamespace = 'stratakv'::regnamespace AND a.grantee <> p.proowner
          AND p.proname IN (
              'sql_check_dblink', 'sql_connect', 'sql_ask', 'sql_caller', 'sql_caller_word', 'sql_call')
    LOOP
        EXECUTE pg_catalog.format(
            'REVOKE ALL ON FUNCTION %s FROM %s', entry.function,
            CASE entry.grantee WHEN 0 THEN 'PUBLIC' ELSE entry.grantee::regrole::text END);
    END LOOP;
END
$$;
GRANT EXECUTE ON FUNCTION stratakv.infer(text, text, jsonb), stratakv.bind(text, text) TO PUBLIC;
GRANT USAGE ON SCHEMA stratakv TO PUBLIC;
COMMENT ON FUNCTION stratakv.infer(text, text, jsonb) IS 'The model''s answer to a prompt';
COMMENT ON FUNCTION stratakv.bind(text, text) IS 'Called by the DB node''s gateway only';
