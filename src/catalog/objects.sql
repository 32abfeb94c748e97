-- Kind, name, root (the table or other object that it goes with), owner, recipe (what its
-- statements are made from) and dependencies ([kind, name] each) of every object, or of those
-- whose root has an OID in $1. Used by the proxy, and in schema pgtandem by event triggers.
WITH
hidden AS (
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e' AND refclassid = 'pg_extension'::regclass
),
schemas AS (
    SELECT n.oid, quote_ident(n.nspname) AS name, n.nspowner, n.nspacl
      FROM pg_namespace n
     WHERE n.nspname NOT IN ('pgtandem', 'information_schema') AND n.nspname NOT LIKE 'pg\_%'
       AND NOT EXISTS (SELECT FROM hidden h WHERE h.classid = 'pg_namespace'::regclass AND h.objid = n.oid)
),
relations AS (
    SELECT c.*, s.name || '.' || quote_ident(c.relname) AS name
      FROM pg_class c JOIN schemas s ON s.oid = c.relnamespace
     WHERE c.relpersistence <> 't'
       AND NOT EXISTS (SELECT FROM hidden h WHERE h.classid = 'pg_class'::regclass AND h.objid = c.oid)
),
types AS (
    SELECT t.*, s.name || '.' || quote_ident(t.typname) AS name
      FROM pg_type t JOIN schemas s ON s.oid = t.typnamespace
     WHERE (t.typtype IN ('e', 'd', 'r') OR (t.typtype = 'c' AND EXISTS (SELECT FROM relations c WHERE c.oid = t.typrelid AND c.relkind = 'c')))
       AND NOT EXISTS (SELECT FROM hidden h WHERE h.classid = 'pg_type'::regclass AND h.objid = t.oid)
),
functions AS (
    SELECT p.*, format('%s.%I(%s)', s.name, p.proname, pg_get_function_identity_arguments(p.oid)) AS name
      FROM pg_proc p JOIN schemas s ON s.oid = p.pronamespace
     WHERE NOT EXISTS (SELECT FROM hidden h WHERE h.classid = 'pg_proc'::regclass AND h.objid = p.oid)
),
identity_sequences AS (
    SELECT d.objid AS oid, d.refobjid AS rel, d.refobjsubid AS attnum FROM pg_depend d
     WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'i' AND d.refobjsubid > 0
),
nodes(classid, objid, objsubid, kind, name, root, root_name, owner) AS MATERIALIZED (
    SELECT 'pg_namespace'::regclass, oid, 0, 'schema', name, oid, name, nspowner FROM schemas
    UNION ALL
    SELECT 'pg_extension'::regclass, oid, 0, 'extension', quote_ident(extname), oid, quote_ident(extname), extowner FROM pg_extension
    UNION ALL
    SELECT 'pg_type'::regclass, oid, 0, 'type', name, oid, name, typowner FROM types
    UNION ALL
    SELECT 'pg_class'::regclass, r.oid, 0, CASE WHEN r.relkind IN ('r', 'p') THEN 'table' WHEN r.relkind = 'S' THEN 'sequence' ELSE 'view' END,
           r.name, r.oid, r.name, r.relowner
      FROM relations r WHERE r.relkind IN ('r', 'p', 'v', 'm') OR (r.relkind = 'S' AND r.oid NOT IN (SELECT i.oid FROM identity_sequences i))
    UNION ALL
    SELECT 'pg_proc'::regclass, oid, 0, CASE prokind WHEN 'a' THEN 'aggregate' ELSE 'function' END, name, oid, name, proowner FROM functions
    UNION ALL
    SELECT 'pg_class'::regclass, r.oid, a.attnum, 'column', r.name || '.' || quote_ident(a.attname), r.oid, r.name, r.relowner
      FROM relations r JOIN pg_attribute a ON a.attrelid = r.oid WHERE r.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT 'pg_attrdef'::regclass, d.oid, 0, 'default', r.name || '.' || quote_ident(a.attname), r.oid, r.name, r.relowner
      FROM relations r JOIN pg_attribute a ON a.attrelid = r.oid JOIN pg_attrdef d ON d.adrelid = r.oid AND d.adnum = a.attnum
     WHERE r.relkind IN ('r', 'p') AND a.attgenerated = '' AND NOT a.attisdropped
    UNION ALL
    SELECT 'pg_constraint'::regclass, k.oid, 0, 'constraint', format('%s.%I', COALESCE(r.name, t.name), k.conname),
           COALESCE(r.oid, t.oid), COALESCE(r.name, t.name), COALESCE(r.relowner, t.typowner)
      FROM pg_constraint k LEFT JOIN relations r ON r.oid = k.conrelid LEFT JOIN types t ON t.oid = k.contypid
     WHERE COALESCE(r.oid, t.oid) IS NOT NULL AND k.contype NOT IN ('n', 't') AND k.conislocal AND k.conparentid = 0
    UNION ALL
    SELECT 'pg_class'::regclass, c.oid, 0, 'index', c.name, i.indrelid, r.name, c.relowner
      FROM pg_index i JOIN relations c ON c.oid = i.indexrelid JOIN relations r ON r.oid = i.indrelid
     WHERE NOT c.relispartition AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = c.oid AND k.contype IN ('p', 'u', 'x'))
    UNION ALL
    SELECT 'pg_rewrite'::regclass, w.oid, 0, 'rule', r.name || '.' || quote_ident(w.rulename), r.oid, r.name, r.relowner
      FROM pg_rewrite w JOIN relations r ON r.oid = w.ev_class WHERE w.rulename <> '_RETURN'
    UNION ALL
    SELECT 'pg_trigger'::regclass, g.oid, 0, 'trigger', r.name || '.' || quote_ident(g.tgname), r.oid, r.name, r.relowner
      FROM pg_trigger g JOIN relations r ON r.oid = g.tgrelid
     WHERE NOT g.tgisinternal AND g.tgparentid = 0 AND g.tgname NOT LIKE 'zzz\_pgtandem\_%'
    UNION ALL
    SELECT 'pg_policy'::regclass, p.oid, 0, 'policy', r.name || '.' || quote_ident(p.polname), r.oid, r.name, r.relowner
      FROM pg_policy p JOIN relations r ON r.oid = p.polrelid
    UNION ALL
    SELECT 'pg_statistic_ext'::regclass, x.oid, 0, 'statistics', s.name || '.' || quote_ident(x.stxname), x.stxrelid, r.name, x.stxowner
      FROM pg_statistic_ext x JOIN schemas s ON s.oid = x.stxnamespace JOIN relations r ON r.oid = x.stxrelid
),
-- Nothing is described that nobody asked for: it may be gone by then.
wanted AS MATERIALIZED (
    SELECT * FROM nodes WHERE $1::oid[] IS NULL OR root = ANY ($1)
),
-- What stands for a node in pg_depend besides itself.
map(classid, objid, objsubid, kind, name) AS MATERIALIZED (
    SELECT n.classid, n.objid, n.objsubid, n.kind, n.name FROM nodes n
    UNION ALL
    SELECT 'pg_attrdef'::regclass, d.oid, 0, 'column', n.name
      FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
      JOIN nodes n ON n.classid = 'pg_class'::regclass AND n.objid = d.adrelid AND n.objsubid = d.adnum WHERE a.attgenerated <> ''
    UNION ALL
    SELECT 'pg_rewrite'::regclass, w.oid, 0, n.kind, n.name FROM pg_rewrite w JOIN nodes n ON n.classid = 'pg_class'::regclass AND n.objid = w.ev_class AND n.objsubid = 0
     WHERE w.rulename = '_RETURN'
    UNION ALL
    SELECT 'pg_type'::regclass, t.oid, 0, n.kind, n.name FROM pg_type t JOIN nodes n ON n.classid = 'pg_class'::regclass AND n.objid = t.typrelid AND n.objsubid = 0
    UNION ALL
    SELECT 'pg_type'::regclass, t.typarray, 0, n.kind, n.name FROM pg_type t JOIN nodes n ON n.classid = 'pg_type'::regclass AND n.objid = t.oid WHERE t.typarray <> 0
    UNION ALL
    SELECT 'pg_type'::regclass, t.typarray, 0, n.kind, n.name FROM pg_type t JOIN nodes n ON n.classid = 'pg_class'::regclass AND n.objid = t.typrelid AND n.objsubid = 0 WHERE t.typarray <> 0
    UNION ALL
    SELECT 'pg_type'::regclass, g.rngmultitypid, 0, n.kind, n.name FROM pg_range g JOIN nodes n ON n.classid = 'pg_type'::regclass AND n.objid = g.rngtypid
    UNION ALL
    SELECT 'pg_class'::regclass, t.typrelid, 0, n.kind, n.name FROM pg_type t JOIN nodes n ON n.classid = 'pg_type'::regclass AND n.objid = t.oid WHERE t.typrelid <> 0
    UNION ALL
    SELECT 'pg_class'::regclass, k.conindid, 0, n.kind, n.name FROM pg_constraint k JOIN nodes n ON n.classid = 'pg_constraint'::regclass AND n.objid = k.oid
     WHERE k.contype IN ('p', 'u', 'x')
),
edges AS (
    SELECT m.kind, m.name, json_agg(DISTINCT jsonb_build_array(f.kind, f.name)) AS depends
      FROM pg_depend d
      JOIN map m ON m.classid = d.classid AND m.objid = d.objid AND (m.objsubid = d.objsubid OR (d.classid <> 'pg_class'::regclass AND m.objsubid = 0))
      JOIN map f ON f.classid = d.refclassid AND f.objid = d.refobjid AND f.objsubid IN (d.refobjsubid, 0)
     WHERE d.deptype IN ('n', 'a', 'i') AND EXISTS (SELECT FROM wanted w WHERE w.kind = m.kind AND w.name = m.name) AND (m.kind, m.name) <> (f.kind, f.name)
       AND NOT (m.kind = 'sequence' AND f.kind IN ('table', 'column'))
       AND NOT (m.kind = 'table' AND f.kind = 'column' AND d.objid = d.refobjid)
     GROUP BY m.kind, m.name
),
recipes(kind, name, recipe) AS (
    SELECT n.kind, n.name, '{}'::jsonb FROM wanted n WHERE n.kind = 'schema'
    UNION ALL
    SELECT n.kind, n.name, jsonb_build_object('schema', e.extnamespace::regnamespace::text)
      FROM wanted n JOIN pg_extension e ON e.oid = n.objid WHERE n.kind = 'extension'
    UNION ALL
    SELECT n.kind, n.name, jsonb_strip_nulls(jsonb_build_object('form', t.typtype,
               'labels', (SELECT jsonb_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid),
               'base', CASE WHEN t.typtype = 'd' THEN format_type(t.typbasetype, t.typtypmod) END,
               'collation', CASE WHEN t.typtype = 'd' AND t.typcollation <> (SELECT b.typcollation FROM pg_type b WHERE b.oid = t.typbasetype) THEN t.typcollation::regcollation::text END,
               'not_null', NULLIF(t.typnotnull, false), 'default', CASE WHEN t.typtype = 'd' THEN t.typdefault END,
               'range', (SELECT concat_ws(', ', 'subtype = ' || format_type(g.rngsubtype, NULL), 'collation = ' || NULLIF(g.rngcollation, 0)::regcollation::text,
                                'canonical = ' || NULLIF(g.rngcanonical, 0)::regproc::text, 'subtype_diff = ' || NULLIF(g.rngsubdiff, 0)::regproc::text,
                                'multirange_type_name = ' || (SELECT format('%I.%I', mn.nspname, m.typname) FROM pg_type m JOIN pg_namespace mn ON mn.oid = m.typnamespace WHERE m.oid = g.rngmultitypid))
                           FROM pg_range g WHERE g.rngtypid = t.oid),
               'attributes', (SELECT jsonb_agg(jsonb_build_array(quote_ident(a.attname), format_type(a.atttypid, a.atttypmod)
                                  || CASE WHEN a.attcollation <> b.typcollation THEN ' COLLATE ' || a.attcollation::regcollation::text ELSE '' END) ORDER BY a.attnum)
                                FROM pg_attribute a JOIN pg_type b ON b.oid = a.atttypid WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped)))
      FROM wanted n JOIN pg_type t ON t.oid = n.objid WHERE n.kind = 'type'
    UNION ALL
    SELECT n.kind, n.name, jsonb_strip_nulls(jsonb_build_object('persistence', c.relpersistence,
               'parameters', format('AS %s START %s INCREMENT %s MINVALUE %s MAXVALUE %s CACHE %s %sCYCLE', format_type(q.seqtypid, NULL), q.seqstart, q.seqincrement, q.seqmin, q.seqmax, q.seqcache,
                   CASE WHEN q.seqcycle THEN '' ELSE 'NO ' END),
               'owned_by', (SELECT format('%s.%I', d.refobjid::regclass, a.attname) FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                             WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'a')))
      FROM wanted n JOIN pg_class c ON c.oid = n.objid JOIN pg_sequence q ON q.seqrelid = n.objid WHERE n.kind = 'sequence'
    UNION ALL
    SELECT n.kind, n.name, jsonb_build_object('create', pg_get_functiondef(p.oid), 'result', COALESCE(pg_get_function_result(p.oid), ''), 'is', p.prokind)
      FROM wanted n JOIN pg_proc p ON p.oid = n.objid WHERE n.kind = 'function'
    UNION ALL
    SELECT n.kind, n.name, jsonb_strip_nulls(jsonb_build_object('ordinary', NULLIF(a.aggkind = 'n' AND a.aggmtransfn = 0, false),
               'parts', concat_ws(', ', 'SFUNC = ' || a.aggtransfn::text, 'STYPE = ' || format_type(a.aggtranstype, NULL), 'FINALFUNC = ' || NULLIF(a.aggfinalfn::oid, 0)::regproc::text,
                   'COMBINEFUNC = ' || NULLIF(a.aggcombinefn::oid, 0)::regproc::text, 'INITCOND = ' || quote_literal(a.agginitval),
                   'SORTOP = ' || (SELECT format('OPERATOR(%I.%s)', on_.nspname, o.oprname) FROM pg_operator o JOIN pg_namespace on_ ON on_.oid = o.oprnamespace WHERE o.oid = a.aggsortop),
                   'PARALLEL = ' || CASE p.proparallel WHEN 's' THEN 'SAFE' WHEN 'r' THEN 'RESTRICTED' END)))
      FROM wanted n JOIN pg_proc p ON p.oid = n.objid JOIN pg_aggregate a ON a.aggfnoid = p.oid WHERE n.kind = 'aggregate'
    UNION ALL
    SELECT n.kind, n.name, jsonb_strip_nulls(jsonb_build_object('persistence', c.relpersistence, 'options', to_jsonb(c.reloptions), 'row_security', NULLIF(c.relrowsecurity, false),
               'forced', NULLIF(c.relforcerowsecurity, false), 'replica_identity', c.relreplident,
               'identity_index', (SELECT quote_ident(x.relname) FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid AND i.indisreplident),
               'clustered', (SELECT quote_ident(x.relname) FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid AND i.indisclustered),
               'partition_by', pg_get_partkeydef(c.oid), 'bound', pg_get_expr(c.relpartbound, c.oid), 'of_type', NULLIF(c.reloftype, 0)::regtype::text,
               'parents', (SELECT jsonb_agg(i.inhparent::regclass::text ORDER BY i.inhseqno) FROM pg_inherits i WHERE i.inhrelid = c.oid),
               'method', (SELECT m.amname FROM pg_am m WHERE m.oid = c.relam)))
      FROM wanted n JOIN pg_class c ON c.oid = n.objid WHERE n.kind = 'table'
    UNION ALL
    SELECT n.kind, n.name, jsonb_strip_nulls(jsonb_build_object('at', a.attnum, 'column', quote_ident(a.attname), 'type', format_type(a.atttypid, a.atttypmod),
               'collation', CASE WHEN a.attcollation <> t.typcollation THEN a.attcollation::regcollation::text END,
               'not_null', NULLIF(a.attnotnull, false), 'inherited', NULLIF(NOT a.attislocal, false),
               'generated', CASE WHEN a.attgenerated <> '' THEN format('GENERATED ALWAYS AS (%s) %s', pg_get_expr(d.adbin, d.adrelid), CASE a.attgenerated WHEN 's' THEN 'STORED' ELSE 'VIRTUAL' END) END,
               'identity', CASE a.attidentity WHEN 'a' THEN 'ALWAYS' WHEN 'd' THEN 'BY DEFAULT' END,
               'identity_sequence', CASE WHEN a.attidentity <> '' THEN (SELECT jsonb_build_object('name', i.oid::regclass::text, 'type', format_type(q.seqtypid, NULL), 'parameters', format('START %s INCREMENT %s MINVALUE %s MAXVALUE %s CACHE %s %sCYCLE', q.seqstart, q.seqincrement, q.seqmin, q.seqmax, q.seqcache,
                        CASE WHEN q.seqcycle THEN '' ELSE 'NO ' END))
                      FROM identity_sequences i JOIN pg_sequence q ON q.seqrelid = i.oid WHERE i.rel = a.attrelid AND i.attnum = a.attnum) END,
               'storage', CASE a.attstorage WHEN 'p' THEN 'PLAIN' WHEN 'e' THEN 'EXTERNAL' WHEN 'm' THEN 'MAIN' ELSE 'EXTENDED' END,
               'storage_usual', NULLIF(a.attstorage = t.typstorage, false),
               'compression', CASE a.attcompression WHEN 'p' THEN 'pglz' WHEN 'l' THEN 'lz4' END, 'statistics', NULLIF(a.attstattarget, -1), 'options', to_jsonb(a.attoptions)))
      FROM wanted n JOIN pg_attribute a ON a.attrelid = n.objid AND a.attnum = n.objsubid JOIN pg_type t ON t.oid = a.atttypid
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum WHERE n.kind = 'column'
    UNION ALL
    SELECT n.kind, n.name, jsonb_build_object('column', quote_ident(a.attname), 'default', pg_get_expr(d.adbin, d.adrelid))
      FROM wanted n JOIN pg_attrdef d ON d.oid = n.objid JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum WHERE n.kind = 'default'
    UNION ALL
    SELECT n.kind, n.name, jsonb_strip_nulls(jsonb_build_object('constraint', quote_ident(k.conname), 'definition', pg_get_constraintdef(k.oid), 'form', k.contype,
               'of_domain', NULLIF(k.contypid <> 0, false), 'invalid', NULLIF(NOT k.convalidated, false)))
      FROM wanted n JOIN pg_constraint k ON k.oid = n.objid WHERE n.kind = 'constraint'
    UNION ALL
    SELECT n.kind, n.name, jsonb_strip_nulls(jsonb_build_object('definition', pg_get_indexdef(i.indexrelid), 'invalid', NULLIF(NOT i.indisvalid, false)))
      FROM wanted n JOIN pg_index i ON i.indexrelid = n.objid WHERE n.kind = 'index'
    UNION ALL
    SELECT n.kind, n.name, jsonb_strip_nulls(jsonb_build_object('is', c.relkind, 'query', rtrim(pg_get_viewdef(c.oid), '; '), 'options', to_jsonb(c.reloptions),
               'columns', (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0),
               'unpopulated', NULLIF(c.relkind = 'm' AND NOT c.relispopulated, false)))
      FROM wanted n JOIN pg_class c ON c.oid = n.objid WHERE n.kind = 'view'
    UNION ALL
    SELECT n.kind, n.name, jsonb_build_object('rule', quote_ident(w.rulename), 'definition', pg_get_ruledef(w.oid), 'enabled', w.ev_enabled)
      FROM wanted n JOIN pg_rewrite w ON w.oid = n.objid WHERE n.kind = 'rule'
    UNION ALL
    SELECT n.kind, n.name, jsonb_build_object('trigger', quote_ident(g.tgname), 'definition', pg_get_triggerdef(g.oid), 'enabled', g.tgenabled)
      FROM wanted n JOIN pg_trigger g ON g.oid = n.objid WHERE n.kind = 'trigger'
    UNION ALL
    SELECT n.kind, n.name, jsonb_build_object('policy', quote_ident(p.polname), 'definition', concat_ws(' ',
               'AS', CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
               'FOR', CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
               'TO', (SELECT string_agg(COALESCE(NULLIF(x, 0)::regrole::text, 'PUBLIC'), ', ' ORDER BY 1) FROM unnest(p.polroles) x),
               'USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', 'WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')'))
      FROM wanted n JOIN pg_policy p ON p.oid = n.objid WHERE n.kind = 'policy'
    UNION ALL
    SELECT n.kind, n.name, jsonb_build_object('definition', pg_get_statisticsobjdef(n.objid)) FROM wanted n WHERE n.kind = 'statistics'
),
grants AS (
    SELECT g.kind, g.name, g.root, g.root_name, g.owner, g.usual, g.acl
      FROM (SELECT 'SCHEMA' AS kind, name, oid AS root, name AS root_name, nspowner AS owner, acldefault('n', nspowner) AS usual, nspacl AS acl FROM schemas
            UNION ALL SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, name, oid, name, relowner, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner), relacl
              FROM relations WHERE relkind IN ('r', 'p', 'v', 'm', 'S')
            UNION ALL SELECT CASE prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END, name, oid, name, proowner, acldefault('f', proowner), proacl FROM functions
            UNION ALL SELECT 'TYPE', name, oid, name, typowner, acldefault('T', typowner), typacl FROM types
            UNION ALL SELECT 'COLUMN ' || quote_ident(a.attname), r.name, r.oid, r.name, r.relowner, NULL::aclitem[], a.attacl
              FROM relations r JOIN pg_attribute a ON a.attrelid = r.oid WHERE a.attacl IS NOT NULL AND NOT a.attisdropped) g
),
described AS (
    SELECT i.type, i.identity, d.description, n.root, n.root_name, n.owner, n.kind, n.name
      FROM pg_description d
      JOIN LATERAL (SELECT m.* FROM wanted m
                     WHERE (m.classid, m.objid) = (d.classoid, d.objoid) AND m.objsubid IN (d.objsubid, 0) ORDER BY m.objsubid DESC LIMIT 1) n ON true
     CROSS JOIN LATERAL pg_identify_object(d.classoid, d.objoid, d.objsubid) i
     WHERE d.objoid >= 16384 AND d.classoid <> 'pg_extension'::regclass
)
SELECT n.kind::text, n.name, n.root_name, pg_get_userbyid(n.owner)::text, r.recipe::text, COALESCE(e.depends::text, '[]')
  FROM wanted n JOIN recipes r ON r.kind = n.kind AND r.name = n.name
  LEFT JOIN edges e ON e.kind = n.kind AND e.name = n.name
UNION ALL
SELECT 'grant', g.kind || ' ' || g.name, g.root_name, pg_get_userbyid(g.owner)::text,
       (SELECT jsonb_build_object('acl', (SELECT COALESCE(jsonb_agg(jsonb_build_array(COALESCE(NULLIF(x.grantee, 0)::regrole::text, 'PUBLIC'), x.privilege_type, x.is_grantable) ORDER BY x.grantee, x.privilege_type), '[]') FROM aclexplode(COALESCE(g.acl, g.usual)) x),
            'usual', (SELECT COALESCE(jsonb_agg(jsonb_build_array(COALESCE(NULLIF(x.grantee, 0)::regrole::text, 'PUBLIC'), x.privilege_type, x.is_grantable) ORDER BY x.grantee, x.privilege_type), '[]') FROM aclexplode(g.usual) x)))::text,
       '[]'
  FROM grants g WHERE $1::oid[] IS NULL OR g.root = ANY ($1)
UNION ALL
SELECT 'comment', d.type || ' ' || d.identity, d.root_name, pg_get_userbyid(d.owner)::text,
       jsonb_build_object('type', d.type, 'identity', d.identity, 'text', d.description)::text, jsonb_build_array(jsonb_build_array(d.kind, d.name))::text
  FROM described d
