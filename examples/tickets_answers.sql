-- What a model can do for a table, each in one statement:
--   psql postgresql://postgres@127.0.0.1:6432/stratakv -f examples/tickets.sql -f examples/tickets_answers.sql

-- Free text. All rows are answered together, since the DB node looks ahead.
SELECT id, infer('Summarise in one sentence: ' || body, options => '{"max_tokens": 32}') AS summary
FROM tickets ORDER BY id;

-- One of some words, and nothing else.
SELECT id, product, infer_choice('What does the customer want? ' || body, ARRAY['help', 'money back', 'a replacement']) AS wish
FROM tickets ORDER BY id;

-- A condition. LIMIT stops asking when enough is found.
SELECT id, body FROM tickets WHERE NOT infer_bool('Is this customer content? ' || body) ORDER BY id LIMIT 2;

-- Fields, as JSON of a schema.
SELECT id, answer ->> 'fault' AS fault, (answer ->> 'urgent')::boolean AS urgent
FROM tickets, infer_json('Fault and urgency of this ticket: ' || body,
    '{"type": "object", "required": ["fault", "urgent"], "additionalProperties": false,
      "properties": {"fault": {"type": "string", "maxLength": 40}, "urgent": {"type": "boolean"}}}') AS answer
ORDER BY id;

-- One answer about many rows, also about more than fit a prompt.
SELECT product, infer_agg('In one sentence: what do these customers complain about?', body, NULL, '{"max_tokens": 32}' ORDER BY id)
FROM tickets GROUP BY product ORDER BY product;
