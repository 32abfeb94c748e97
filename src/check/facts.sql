-- What `check` reads of one side, as one JSON document. Works on every version from 13 on: what a
-- later version added to a catalog is taken by name, out of its row as JSON.
WITH tables AS (
    SELECT c.*, n.nspname
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p', 'f') AND c.relpersistence <> 't'
       AND n.nspname NOT IN ('pgtandem', 'information_schema') AND n.nspname NOT LIKE 'pg\_%'
),
described AS (
    SELECT jsonb_build_object(
        'schema', c.nspname, 'name', c.relname, 'kind', c.relkind, 'persistence', c.relpersistence,
        'owner', pg_get_userbyid(c.relowner), 'owned', pg_has_role(c.relowner, 'USAGE'),
        'readable', has_table_privilege(c.oid, 'SELECT'), 'partition', c.relispartition,
        'row_security', c.relrowsecurity, 'forced', c.relforcerowsecurity,
        'bytes', CASE WHEN c.relkind = 'r' THEN pg_table_size(c.oid) ELSE 0 END,
        'extension', (SELECT e.extname FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
                       WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0
                         AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' LIMIT 1),
        'key', (SELECT CASE WHEN bool_or(i.indisprimary) THEN 'primary'
                            WHEN bool_or(NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey) AND NOT a.attnotnull)) THEN 'unique' END
                  FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate
                   AND i.indpred IS NULL AND i.indexprs IS NULL),
        'columns', (SELECT COALESCE(jsonb_agg(jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
                           'generated', a.attgenerated, 'identity', a.attidentity,
                           -- Of the server's own: others come with the schema.
                           'collation', (SELECT l.collname FROM pg_collation l WHERE l.oid = a.attcollation AND l.collnamespace = 'pg_catalog'::regnamespace
                                            AND l.collname <> 'default')) ORDER BY a.attnum), '[]')
                      FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
        'triggers', (SELECT COALESCE(jsonb_agg(jsonb_build_array(t.tgname, t.tgenabled) ORDER BY t.tgname), '[]') FROM pg_trigger t
                      WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgname NOT LIKE 'zzz\_pgtandem\_%'),
        'rules', (SELECT COALESCE(jsonb_agg(jsonb_build_array(r.rulename, r.ev_enabled) ORDER BY r.rulename), '[]') FROM pg_rewrite r
                   WHERE r.ev_class = c.oid AND r.ev_type <> '1')) AS document
      FROM tables c
)
SELECT jsonb_build_object(
    'version', current_setting('server_version_num')::integer,
    'database', current_database(),
    'recovering', pg_is_in_recovery(),
    'encoding', current_setting('server_encoding'),
    'locale', (SELECT jsonb_build_object('provider', COALESCE(to_jsonb(d) ->> 'datlocprovider', 'c'),
                 'name', COALESCE(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', d.datcollate), 'ctype', d.datctype,
                 'recorded', to_jsonb(d) ->> 'datcollversion')
                 FROM pg_database d WHERE d.datname = current_database()),
    'collations', (SELECT jsonb_agg(DISTINCT l.collname) FROM pg_collation l
                    WHERE l.collnamespace = 'pg_catalog'::regnamespace AND l.collencoding IN (-1, pg_char_to_encoding(getdatabaseencoding()))),
    'settings', (SELECT jsonb_object_agg(s.name, s.reset_val) FROM pg_settings s
                  WHERE s.name IN ('TimeZone', 'DateStyle', 'IntervalStyle', 'bytea_output', 'extra_float_digits', 'lc_monetary', 'lc_numeric', 'lc_time',
                      'standard_conforming_strings', 'default_transaction_isolation', 'default_transaction_read_only', 'search_path')),
    'extensions', (SELECT COALESCE(jsonb_object_agg(e.extname, e.extversion), '{}') FROM pg_extension e),
    'available', (SELECT COALESCE(jsonb_object_agg(e.name, e.default_version), '{}') FROM pg_available_extensions e),
    'role', (SELECT jsonb_build_object('name', r.rolname, 'superuser', r.rolsuper, 'bypasses_row_security', r.rolbypassrls OR r.rolsuper,
                 'connections', r.rolconnlimit) FROM pg_roles r WHERE r.rolname = current_user),
    'roles', (SELECT jsonb_object_agg(r.rolname, r.rolcanlogin) FROM pg_roles r),
    'concerned', (SELECT COALESCE(jsonb_agg(DISTINCT pg_get_userbyid(x.role)), '[]') FROM (
            SELECT c.relowner FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname <> 'pgtandem' AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\_%'
            UNION SELECT n.nspowner FROM pg_namespace n WHERE n.nspname <> 'pgtandem' AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\_%'
            UNION SELECT p.proowner FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname <> 'pgtandem' AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\_%'
            UNION SELECT d.refobjid FROM pg_shdepend d JOIN pg_database b ON b.oid = d.dbid AND b.datname = current_database()
                   WHERE d.refclassid = 'pg_authid'::regclass AND d.deptype IN ('a', 'o', 'r') AND d.classid <> 'pg_default_acl'::regclass
                     AND NOT (d.classid = 'pg_namespace'::regclass AND d.objid = to_regnamespace('pgtandem'))
                     AND NOT (d.classid = 'pg_class'::regclass AND d.objid IN (SELECT c.oid FROM pg_class c WHERE c.relnamespace = to_regnamespace('pgtandem')))
                     AND NOT (d.classid = 'pg_proc'::regclass AND d.objid IN (SELECT p.oid FROM pg_proc p WHERE p.pronamespace = to_regnamespace('pgtandem')))) AS x(role)
        WHERE EXISTS (SELECT FROM pg_roles r WHERE r.oid = x.role)),
    'tables', (SELECT COALESCE(jsonb_agg(d.document ORDER BY d.document ->> 'schema', d.document ->> 'name'), '[]') FROM described d),
    'sequences', (SELECT COALESCE(jsonb_agg(jsonb_build_object('name', format('%I.%I', s.schemaname, s.sequencename), 'last', s.last_value, 'min', s.min_value, 'max', s.max_value,
                       'increment', s.increment_by, 'cycles', s.cycle,
                       'owned_by', (SELECT format('%s.%I', d.refobjid::regclass, a.attname) FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                                     WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') LIMIT 1)) ORDER BY c.oid), '[]')
                    FROM pg_sequences s JOIN pg_namespace n ON n.nspname = s.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.sequencename
                   WHERE s.schemaname <> 'pgtandem'),
    'large_objects', (SELECT count(*) FROM pg_largeobject_metadata),
    'event_triggers', (SELECT COALESCE(jsonb_agg(e.evtname ORDER BY e.evtname), '[]') FROM pg_event_trigger e WHERE e.evtname NOT LIKE 'pgtandem\_%'),
    'prepared', (SELECT COALESCE(jsonb_agg(p.gid ORDER BY p.prepared), '[]') FROM pg_prepared_xacts p),
    'oldest_transaction_seconds', (SELECT COALESCE(max(extract(epoch FROM clock_timestamp() - a.xact_start)), 0)::bigint FROM pg_stat_activity a
                                    WHERE a.backend_type = 'client backend' AND a.backend_xid IS NOT NULL),
    'connections', jsonb_build_object('max', current_setting('max_connections')::integer, 'reserved', current_setting('superuser_reserved_connections')::integer,
        'used', (SELECT count(*) FROM pg_stat_activity a WHERE a.backend_type = 'client backend'),
        'of_database', (SELECT d.datconnlimit FROM pg_database d WHERE d.datname = current_database())),
    'bytes', pg_database_size(current_database())
)::text
