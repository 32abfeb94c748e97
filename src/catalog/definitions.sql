WITH
-- What an extension brought along is the extension's; what is temporary or ours is nobody's.
hidden AS (
    SELECT classid, objid FROM pg_depend WHERE deptype = 'e' AND refclassid = 'pg_extension'::regclass
),
schemas AS (
    SELECT n.oid, n.nspname, quote_ident(n.nspname) AS name, n.nspowner, n.nspacl
      FROM pg_namespace n
     WHERE n.nspname NOT IN ('pgtandem', 'information_schema') AND n.nspname NOT LIKE 'pg\_%'
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
     WHERE NOT EXISTS (SELECT FROM hidden h WHERE h.classid = 'pg_type'::regclass AND h.objid = t.oid)
),
functions AS (
    SELECT p.*, format('%s.%I(%s)', s.name, p.proname, pg_get_function_identity_arguments(p.oid)) AS name
      FROM pg_proc p JOIN schemas s ON s.oid = p.pronamespace
     WHERE NOT EXISTS (SELECT FROM hidden h WHERE h.classid = 'pg_proc'::regclass AND h.objid = p.oid)
),
grants(kind, name, acl) AS (
    SELECT 'schema', name, COALESCE(nspacl, acldefault('n', nspowner)) FROM schemas
    UNION ALL SELECT 'relation', name, COALESCE(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner)) FROM relations WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
    UNION ALL SELECT 'column', r.name || '.' || quote_ident(a.attname), a.attacl FROM relations r JOIN pg_attribute a ON a.attrelid = r.oid WHERE a.attacl IS NOT NULL AND NOT a.attisdropped
    UNION ALL SELECT 'function', name, COALESCE(proacl, acldefault('f', proowner)) FROM functions
    UNION ALL SELECT 'type', name, COALESCE(typacl, acldefault('T', typowner)) FROM types WHERE typtype IN ('e', 'd', 'r') OR (typtype = 'c' AND EXISTS (SELECT FROM relations c WHERE c.oid = typrelid AND c.relkind = 'c'))
),
described(classid, objid, objsubid, description) AS (
    SELECT d.classoid, d.objoid, d.objsubid, d.description FROM pg_description d WHERE d.objoid >= 16384
)
SELECT 'schema', name, concat_ws(' ', 'owner=' || pg_get_userbyid(nspowner)) FROM schemas
UNION ALL
SELECT CASE r.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view'
                      WHEN 'f' THEN 'foreign table' WHEN 'S' THEN 'sequence' ELSE 'composite type' END,
       r.name,
       concat_ws(' ', 'owner=' || pg_get_userbyid(r.relowner), 'persistence=' || r.relpersistence::text, 'options=' || r.reloptions::text,
           CASE WHEN r.relrowsecurity THEN 'row security' END, CASE WHEN r.relforcerowsecurity THEN 'forced' END,
           'replica identity=' || r.relreplident::text, 'partition by ' || pg_get_partkeydef(r.oid), 'bound ' || pg_get_expr(r.relpartbound, r.oid),
           'of ' || NULLIF(r.reloftype, 0)::regtype::text,
           'inherits ' || (SELECT string_agg(i.inhparent::regclass::text || CASE WHEN i.inhdetachpending THEN ' (detaching)' ELSE '' END, ', ' ORDER BY i.inhseqno) FROM pg_inherits i WHERE i.inhrelid = r.oid),
           CASE WHEN r.relkind = 'm' AND NOT r.relispopulated THEN 'not populated' END,
           'method=' || (SELECT amname FROM pg_am WHERE oid = r.relam))
  FROM relations r WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c')
UNION ALL
SELECT 'column', r.name || '.' || quote_ident(a.attname),
       concat_ws(' ', '#' || rank() OVER (PARTITION BY r.oid ORDER BY a.attnum), format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN 'NOT NULL' END,
           CASE WHEN a.attgenerated <> '' THEN 'generated ' || a.attgenerated::text END, 'default ' || pg_get_expr(d.adbin, d.adrelid),
           CASE WHEN a.attidentity <> '' THEN 'identity ' || a.attidentity::text END,
           'collation ' || CASE WHEN a.attcollation <> t.typcollation THEN a.attcollation::regcollation::text END,
           'storage ' || a.attstorage::text, 'compression ' || NULLIF(a.attcompression::text, ''), 'statistics ' || NULLIF(a.attstattarget, -1),
           'options ' || a.attoptions::text, CASE WHEN NOT a.attislocal THEN 'inherited' END)
  FROM relations r JOIN pg_attribute a ON a.attrelid = r.oid JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f', 'c') AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
-- NOT NULL is a column's property here, as it was before 18 made constraints of it.
SELECT 'constraint', format('%s.%I', COALESCE(r.name, t.name), k.conname),
       concat_ws(' ', pg_get_constraintdef(k.oid), CASE WHEN NOT k.convalidated THEN 'not validated' END, CASE WHEN NOT k.conislocal THEN 'inherited' END)
  FROM pg_constraint k LEFT JOIN relations r ON r.oid = k.conrelid LEFT JOIN types t ON t.oid = k.contypid
 WHERE COALESCE(r.oid, t.oid) IS NOT NULL AND k.contype NOT IN ('n', 't')
   -- A foreign key to a partitioned table has one more for each partition, named as the version likes.
   AND NOT EXISTS (SELECT FROM pg_constraint up WHERE up.oid = k.conparentid AND up.conrelid = k.conrelid AND k.contype = 'f')
UNION ALL
SELECT 'index', c.name, concat_ws(' ', pg_get_indexdef(i.indexrelid), CASE WHEN NOT i.indisvalid THEN 'invalid' END, CASE WHEN i.indisclustered THEN 'clustered' END,
           CASE WHEN i.indisreplident THEN 'replica identity' END,
           'part of ' || (SELECT h.inhparent::regclass::text FROM pg_inherits h WHERE h.inhrelid = i.indexrelid))
  FROM pg_index i JOIN relations c ON c.oid = i.indexrelid
UNION ALL
SELECT 'query', r.name, pg_get_viewdef(r.oid) FROM relations r WHERE r.relkind IN ('v', 'm')
UNION ALL
SELECT 'rule', r.name || '.' || quote_ident(w.rulename), concat_ws(' ', pg_get_ruledef(w.oid), w.ev_enabled)
  FROM pg_rewrite w JOIN relations r ON r.oid = w.ev_class WHERE w.rulename <> '_RETURN'
UNION ALL
SELECT 'trigger', r.name || '.' || quote_ident(g.tgname), concat_ws(' ', pg_get_triggerdef(g.oid), g.tgenabled)
  FROM pg_trigger g JOIN relations r ON r.oid = g.tgrelid
 WHERE NOT g.tgisinternal AND g.tgname NOT LIKE 'zzz\_pgtandem\_%'
UNION ALL
SELECT 'policy', r.name || '.' || quote_ident(p.polname),
       concat_ws(' ', p.polcmd, p.polpermissive::text, (SELECT string_agg(COALESCE(NULLIF(x, 0)::regrole::text, 'public'), ',' ORDER BY 1) FROM unnest(p.polroles) x),
           'using ' || pg_get_expr(p.polqual, p.polrelid), 'check ' || pg_get_expr(p.polwithcheck, p.polrelid))
  FROM pg_policy p JOIN relations r ON r.oid = p.polrelid
UNION ALL
SELECT 'sequence parameters', r.name,
       concat_ws(' ', format_type(q.seqtypid, NULL), 'start', q.seqstart, 'increment', q.seqincrement, 'min', q.seqmin, 'max', q.seqmax, 'cache', q.seqcache,
           CASE WHEN q.seqcycle THEN 'cycle' END,
           (SELECT format('owned by %s.%I (%s)', d.refobjid::regclass, a.attname, d.deptype) FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE d.classid = 'pg_class'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')))
  FROM pg_sequence q JOIN relations r ON r.oid = q.seqrelid
UNION ALL
SELECT 'function', p.name, concat_ws(' ', 'owner=' || pg_get_userbyid(p.proowner), pg_get_functiondef(p.oid))
  FROM functions p WHERE p.prokind IN ('f', 'p', 'w')
UNION ALL
SELECT 'aggregate', p.name, concat_ws(' ', 'owner=' || pg_get_userbyid(p.proowner), a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggtranstype::regtype, a.agginitval, a.aggkind, a.aggsortop, p.proparallel)
  FROM functions p JOIN pg_aggregate a ON a.aggfnoid = p.oid
UNION ALL
SELECT 'type', t.name,
       concat_ws(' ', t.typtype, 'owner=' || pg_get_userbyid(t.typowner),
           'labels ' || (SELECT string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder) FROM pg_enum e WHERE e.enumtypid = t.oid),
           'base ' || format_type(NULLIF(t.typbasetype, 0), t.typtypmod), CASE WHEN t.typnotnull THEN 'NOT NULL' END, 'default ' || t.typdefault,
           (SELECT concat_ws(' ', 'subtype', g.rngsubtype::regtype, g.rngmultitypid::regtype, g.rngcanonical, g.rngsubdiff, NULLIF(g.rngcollation, 0)::regcollation) FROM pg_range g WHERE g.rngtypid = t.oid))
  FROM types t WHERE t.typtype IN ('e', 'd', 'r') OR (t.typtype = 'p' AND NOT t.typisdefined)
UNION ALL
SELECT 'extension', e.extname, concat_ws(' ', 'schema=' || n.nspname, 'version=' || e.extversion)
  FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
UNION ALL
SELECT 'grant', g.kind || ' ' || g.name,
       (SELECT string_agg(format('%s=%s%s/%s', COALESCE(NULLIF(x.grantee, 0)::regrole::text, 'public'), x.privilege_type, CASE WHEN x.is_grantable THEN '*' ELSE '' END, x.grantor::regrole), ' '
                          ORDER BY x.privilege_type, x.grantee = 0, COALESCE(NULLIF(x.grantee, 0)::regrole::text, ''), x.grantor::regrole::text)
          FROM aclexplode(g.acl) x)
  FROM grants g
UNION ALL
SELECT 'default privilege', concat_ws(' ', pg_get_userbyid(d.defaclrole), d.defaclobjtype, s.name),
       (SELECT string_agg(format('%s=%s%s', COALESCE(NULLIF(x.grantee, 0)::regrole::text, 'public'), x.privilege_type, CASE WHEN x.is_grantable THEN '*' ELSE '' END), ' ' ORDER BY x.privilege_type, COALESCE(NULLIF(x.grantee, 0)::regrole::text, ''))
          FROM aclexplode(d.defaclacl) x)
  FROM pg_default_acl d LEFT JOIN schemas s ON s.oid = d.defaclnamespace
UNION ALL
SELECT 'comment', i.type || ' ' || i.identity, d.description
  FROM described d CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, d.objsubid) i
 WHERE NOT EXISTS (SELECT FROM hidden h WHERE h.classid = d.classid AND h.objid = d.objid)
   AND d.classid <> 'pg_extension'::regclass
   AND i.identity NOT LIKE 'pgtandem%' AND i.identity NOT LIKE 'pg\_temp\_%'
UNION ALL
SELECT 'statistics', x.stxnamespace::regnamespace::text || '.' || quote_ident(x.stxname), concat_ws(' ', pg_get_statisticsobjdef(x.oid), 'owner=' || pg_get_userbyid(x.stxowner))
  FROM pg_statistic_ext x JOIN schemas s ON s.oid = x.stxnamespace
UNION ALL
SELECT 'event trigger', e.evtname, concat_ws(' ', e.evtevent, e.evtfoid::regproc, e.evtenabled, e.evttags::text)
  FROM pg_event_trigger e WHERE e.evtname NOT LIKE 'pgtandem\_%'
UNION ALL
SELECT 'setting', concat_ws(' ', 'role', COALESCE(NULLIF(v.setrole, 0)::regrole::text, 'any')), array_to_string(v.setconfig, ', ')
  FROM pg_db_role_setting v JOIN pg_database b ON b.oid = v.setdatabase WHERE b.datname = current_database()
UNION ALL
SELECT i.type, i.identity, 'present'
  FROM (SELECT 'pg_operator'::regclass, oid FROM pg_operator UNION ALL SELECT 'pg_cast'::regclass, oid FROM pg_cast UNION ALL SELECT 'pg_collation'::regclass, oid FROM pg_collation
        UNION ALL SELECT 'pg_conversion'::regclass, oid FROM pg_conversion UNION ALL SELECT 'pg_ts_config'::regclass, oid FROM pg_ts_config UNION ALL SELECT 'pg_ts_dict'::regclass, oid FROM pg_ts_dict
        UNION ALL SELECT 'pg_ts_parser'::regclass, oid FROM pg_ts_parser UNION ALL SELECT 'pg_ts_template'::regclass, oid FROM pg_ts_template
        UNION ALL SELECT 'pg_opclass'::regclass, oid FROM pg_opclass UNION ALL SELECT 'pg_opfamily'::regclass, oid FROM pg_opfamily
        UNION ALL SELECT 'pg_foreign_data_wrapper'::regclass, oid FROM pg_foreign_data_wrapper UNION ALL SELECT 'pg_foreign_server'::regclass, oid FROM pg_foreign_server
        UNION ALL SELECT 'pg_user_mapping'::regclass, umid FROM pg_user_mappings UNION ALL SELECT 'pg_language'::regclass, oid FROM pg_language
        UNION ALL SELECT 'pg_publication'::regclass, oid FROM pg_publication UNION ALL SELECT 'pg_transform'::regclass, oid FROM pg_transform) o(class, oid)
 CROSS JOIN LATERAL pg_identify_object(o.class, o.oid, 0) i
 WHERE o.oid >= 16384 AND NOT EXISTS (SELECT FROM hidden h WHERE h.classid = o.class AND h.objid = o.oid)
