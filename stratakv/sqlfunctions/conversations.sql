-- Conversations. Safe to run again, after observe.sql. All are volatile: they are never called ahead of the statement itself, and
-- what they do stays done when its transaction is rolled back.

-- The model's answer to a message, after all that was said in the conversation before. A turn has an id of its own, so that a
-- connection that is lost in the middle does not make it two.
CREATE OR REPLACE FUNCTION stratakv.infer_chat(conversation text, message text, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED COST 1000 SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
BEGIN
    IF conversation IS NULL OR message IS NULL THEN
        RETURN NULL;
    END IF;
    IF pg_catalog.current_setting('stratakv.explaining', true) = 'on' THEN
        RAISE EXCEPTION 'stratakv.explain() does not take turns in conversations' USING ERRCODE = '0A000';
    END IF;
    RETURN stratakv.sql_ask_node('chat', pg_catalog.jsonb_build_object(
        'conversation', conversation, 'message', message, 'options', options, 'turn', pg_catalog.gen_random_uuid()));
END
$$;

CREATE OR REPLACE FUNCTION stratakv.create_conversation(system text DEFAULT NULL, metadata jsonb DEFAULT '{}') RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED COST 1000 SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
BEGIN
    RETURN stratakv.sql_ask_node(
        'conversationcreate', pg_catalog.jsonb_build_object('system', system, 'metadata', COALESCE(metadata, '{}')));
END
$$;

CREATE OR REPLACE FUNCTION stratakv.fork_conversation(conversation text, item text DEFAULT NULL) RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED COST 1000 SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
BEGIN
    IF conversation IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN stratakv.sql_ask_node(
        'conversationfork', pg_catalog.jsonb_build_object('conversation', conversation, 'item', item));
END
$$;

CREATE OR REPLACE FUNCTION stratakv.delete_conversation(conversation text) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED COST 1000 SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
BEGIN
    IF conversation IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN stratakv.sql_ask_node(
        'conversationdelete', pg_catalog.jsonb_build_object('conversation', conversation))::boolean;
END
$$;

CREATE OR REPLACE FUNCTION stratakv.conversation_items(conversation text) RETURNS TABLE (
    "position" integer, id text, role text, content text, created_at timestamptz)
LANGUAGE plpgsql VOLATILE PARALLEL RESTRICTED SECURITY DEFINER ROWS 20
SET search_path = pg_catalog, pg_temp SET client_min_messages = error AS $$
#variable_conflict use_column
BEGIN
    IF conversation IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY SELECT r.* FROM pg_catalog.jsonb_to_recordset(stratakv.sql_ask_node(
        'conversationitems', pg_catalog.jsonb_build_object('conversation', conversation))::jsonb) AS r(
        "position" integer, id text, role text, content text, created_at timestamptz);
END
$$;

GRANT EXECUTE ON FUNCTION
    stratakv.infer_chat(text, text, jsonb), stratakv.create_conversation(text, jsonb),
    stratakv.fork_conversation(text, text), stratakv.delete_conversation(text), stratakv.conversation_items(text)
    TO PUBLIC;
COMMENT ON FUNCTION stratakv.infer_chat(text, text, jsonb) IS 'The model''s answer to a message of a conversation';
COMMENT ON FUNCTION stratakv.create_conversation(text, jsonb) IS 'A new conversation''s id';
COMMENT ON FUNCTION stratakv.fork_conversation(text, text) IS 'Id of a new conversation that begins as another one, up to an item';
COMMENT ON FUNCTION stratakv.delete_conversation(text) IS 'Deletes a conversation';
COMMENT ON FUNCTION stratakv.conversation_items(text) IS 'What was said in a conversation';
