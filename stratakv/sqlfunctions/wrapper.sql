-- Made only where the name is free. No SET and no SECURITY DEFINER, so that the planner inlines it.
CREATE OR REPLACE FUNCTION public.infer(prompt text, model text DEFAULT NULL, options jsonb DEFAULT NULL) RETURNS text
LANGUAGE sql STABLE PARALLEL RESTRICTED COST 1000 AS 'SELECT stratakv.infer($1, $2, $3)';
COMMENT ON FUNCTION public.infer(text, text, jsonb) IS 'stratakv.infer';
