"""What the gateway asks of the catalog before it runs anything of its own on a client's backend, as the client's role.

Whoever may create objects in a database could otherwise have the gateway run them for others. The session's search_path is
the client's: every name and operator is qualified, and every operator has the exact types of its operands.
"""

from __future__ import annotations

DEMAND_OUR_BIND = b"""\
SELECT (CASE WHEN pg_catalog.bool_and(f.prosecdef AND (o.rolsuper OR COALESCE(a.is_alone, false)))
             THEN 'true' ELSE 'stratakv.bind is not here, or not ours' END)::boolean
FROM pg_catalog.pg_proc f
JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) f.pronamespace
JOIN pg_catalog.pg_roles o ON o.oid OPERATOR(pg_catalog.=) f.proowner
CROSS JOIN LATERAL (
    SELECT pg_catalog.bool_or(g.grantee OPERATOR(pg_catalog.=) f.proowner)
           AND pg_catalog.bool_and(g.grantee OPERATOR(pg_catalog.=) f.proowner OR COALESCE(r.rolsuper, false)) AS is_alone
    FROM pg_catalog.pg_extension e
    JOIN pg_catalog.pg_depend d ON d.refobjid OPERATOR(pg_catalog.=) e.oid
    JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) d.objid
    CROSS JOIN LATERAL pg_catalog.aclexplode(COALESCE(p.proacl, pg_catalog.acldefault('f', p.proowner))) g
    LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) g.grantee
    WHERE e.extname OPERATOR(pg_catalog.=) 'dblink'::pg_catalog.name
      AND d.deptype OPERATOR(pg_catalog.=) 'e'::pg_catalog."char"
      AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_extension'::pg_catalog.regclass::pg_catalog.oid
      AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid) a
WHERE n.nspname OPERATOR(pg_catalog.=) 'stratakv'::pg_catalog.name
  AND f.proname OPERATOR(pg_catalog.=) 'bind'::pg_catalog.name"""
"""Fails unless `stratakv.bind` was installed, not planted; what follows it up to Sync is then not even parsed.

The owner must be a superuser, or the one role that may use dblink; no other can come to that without a superuser's help. In
databases without the functions anybody might own that schema.
"""

NULL_HIDES_ROWS = """\
(SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) CURRENT_USER)
OR NOT EXISTS (
    WITH RECURSIVE reached AS (
        SELECT d.refobjid AS oid
        FROM pg_catalog.pg_depend d
        WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_policy'::pg_catalog.regclass::pg_catalog.oid
          AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid
        UNION
        SELECT d.refobjid
        FROM pg_catalog.pg_class v
        CROSS JOIN LATERAL pg_catalog.unnest(v.reloptions) AS o (setting)
        JOIN pg_catalog.pg_rewrite w ON w.ev_class OPERATOR(pg_catalog.=) v.oid
        JOIN pg_catalog.pg_depend d ON d.objid OPERATOR(pg_catalog.=) w.oid
        WHERE pg_catalog.starts_with(o.setting, 'security_barrier=')
          AND pg_catalog.split_part(o.setting, '=', 2)::boolean
          AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_rewrite'::pg_catalog.regclass::pg_catalog.oid
          AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid
        UNION
        SELECT g.oid
        FROM reached
        JOIN pg_catalog.pg_proc f ON f.oid OPERATOR(pg_catalog.=) reached.oid
        JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) f.prolang
        CROSS JOIN pg_catalog.pg_proc g
        WHERE l.lanname OPERATOR(pg_catalog.=) 'sql'::pg_catalog.name AND NOT f.prosecdef AND f.proconfig IS NULL
          AND g.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
          AND (pg_catalog.strpos(pg_catalog.lower(f.prosrc), pg_catalog.lower(g.proname::pg_catalog.text))
                   OPERATOR(pg_catalog.>) 0
               OR EXISTS (
                   SELECT FROM pg_catalog.pg_depend d
                   WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid
                     AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid
                     AND d.objid OPERATOR(pg_catalog.=) f.oid AND d.refobjid OPERATOR(pg_catalog.=) g.oid)))
    SELECT FROM reached
    JOIN pg_catalog.pg_proc f ON f.oid OPERATOR(pg_catalog.=) reached.oid
    JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) f.pronamespace
    WHERE n.nspname OPERATOR(pg_catalog.=) 'stratakv'::pg_catalog.name)"""
"""Whether no row becomes visible while infer() answers NULL in a pass: true if no policy and no security barrier calls it.

`NULL IS DISTINCT FROM 'secret'` lets every row through, to functions of the reader's that keep what they see. What calls
infer() within other functions is told by the call itself, unless it is plain SQL, which the planner inlines; hence the search.
"""
