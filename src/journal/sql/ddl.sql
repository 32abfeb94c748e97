-- DDL that the proxy recognises: recorded at its place, new tables captured in the same
-- transaction, and rows that the DDL itself computed (CREATE TABLE AS, a rewrite with a
-- volatile default) journaled after it, so that they are copied and not computed twice.

-- Whether a catalog row that we see was written by this very transaction or a savepoint of it:
-- its writer is still in progress. Savepoints' ids are above the transaction's own; the
-- comparison is modulo 2^32, as xmin has no epoch.
CREATE OR REPLACE FUNCTION pgtandem.ours(writer xid, top bigint) RETURNS boolean
LANGUAGE sql STABLE
AS $$
    SELECT CASE WHEN (writer::text::bigint - top) & 4294967295 < 2147483648 AND writer::text::bigint > 2
                THEN pg_catalog.pg_xact_status((top + ((writer::text::bigint - top) & 4294967295))::text::xid8) = 'in progress'
                ELSE false END
$$;

-- The relations whose rows in the catalog are of this transaction. By age first: that is a
-- subtraction, and there may be a hundred thousand columns.
CREATE OR REPLACE FUNCTION pgtandem.changed_here() RETURNS oid[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    top_xid bigint := pg_current_xact_id()::text::bigint;
BEGIN
    RETURN ARRAY(SELECT c.oid FROM pg_class c WHERE age(c.xmin) <= 0 AND pgtandem.ours(c.xmin, top_xid)
                 UNION
                 SELECT a.attrelid FROM pg_attribute a WHERE age(a.xmin) <= 0 AND pgtandem.ours(a.xmin, top_xid));
END
$$;

-- CREATE TABLE for a table that came from a query: it has columns, and nothing else.
CREATE OR REPLACE FUNCTION pgtandem.plain_table(rel oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format('CREATE %sTABLE %s (%s) USING %I%s', CASE c.relpersistence WHEN 'u' THEN 'UNLOGGED ' ELSE '' END, pgtandem.name_of(c.oid),
               (SELECT string_agg(format('%I %s%s', a.attname, format_type(a.atttypid, a.atttypmod),
                           CASE WHEN a.attcollation <> t.typcollation THEN ' COLLATE ' || a.attcollation::regcollation::text ELSE '' END), ', ' ORDER BY a.attnum)
                  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
               m.amname, (SELECT ' WITH (' || string_agg(format('%s=%L', split_part(o, '=', 1), substr(o, strpos(o, '=') + 1)), ', ') || ')' FROM unnest(c.reloptions) o))
      FROM pg_class c JOIN pg_am m ON m.oid = c.relam WHERE c.oid = plain_table.rel
$$;

-- Journals a table's rows as they are now, after a clear: what came before is void. Nobody else
-- may be writing it. The settings are those under which capture writes images.
CREATE OR REPLACE FUNCTION pgtandem.journal_rows(rel oid) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET "DateStyle" = 'ISO, YMD' SET "TimeZone" = 'UTC' SET "IntervalStyle" = 'postgres'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET lc_monetary = 'C' SET quote_all_identifiers = off SET row_security = off
AS $$
DECLARE
    target text := pgtandem.name_of(rel);
    image_of text;
    state bigint;
    forced boolean := (SELECT c.relrowsecurity AND c.relforcerowsecurity FROM pg_class c WHERE c.oid = rel);
BEGIN
    PERFORM pgtandem.append(rel, 'T', NULL, NULL);
    state := pg_sequence_last_value('pgtandem.state');
    IF state & 255 > 2 THEN
        PERFORM pgtandem.unusual(state, rel, 'DDL');
        RETURN;
    END IF;
    SELECT CASE WHEN bool_or(a.attgenerated = 'v') THEN
               format('ROW(%s)::text', string_agg(CASE a.attgenerated WHEN 'v' THEN 'NULL' ELSE format('t.%I', a.attname) END, ', ' ORDER BY a.attnum))
           ELSE '(t.*)::text' END
      INTO image_of
      FROM pg_attribute a WHERE a.attrelid = rel AND a.attnum > 0 AND NOT a.attisdropped;
    IF forced THEN
        EXECUTE format('ALTER TABLE ONLY %s NO FORCE ROW LEVEL SECURITY', target);
    END IF;
    EXECUTE format('INSERT INTO pgtandem.change_%s (rel, op, old, new) SELECT %s, ''R'', NULL, %s FROM ONLY %s AS t', state & 3, rel, image_of, target);
    IF forced THEN
        EXECUTE format('ALTER TABLE ONLY %s FORCE ROW LEVEL SECURITY', target);
    END IF;
END
$$;

-- Sends a table's rows once more: the secondary lost them, or was left out for a while. Writers of
-- the table wait meanwhile, so that each row is either before this or after; the caller sets
-- lock_timeout.
CREATE OR REPLACE FUNCTION pgtandem.refill(rel oid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_current_xact_id();
    EXECUTE format('LOCK TABLE ONLY %s IN SHARE ROW EXCLUSIVE MODE', pgtandem.name_of(rel));
    -- After DDL that nobody saw, rows may be written in a way that the capture function does not
    -- expect yet.
    PERFORM pgtandem.capture(rel);
    UPDATE pgtandem.captured c
       SET shape = s.shape, filenode = s.filenode, attributes = s.attributes, attribute_count = s.attribute_count,
           schema = s.schema, name = s.name, names = s.names
      FROM pgtandem.shape s WHERE s.rel = refill.rel AND c.rel = refill.rel;
    PERFORM pgtandem.journal_rows(rel);
END
$$;

-- The part that runs under pinned settings: images must be written as capture writes them.
DROP FUNCTION IF EXISTS pgtandem.ddl_effects(text, jsonb);
CREATE OR REPLACE FUNCTION pgtandem.ddl_effects(statement text, context jsonb, from_query boolean) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET "DateStyle" = 'ISO, YMD' SET "TimeZone" = 'UTC' SET "IntervalStyle" = 'postgres'
SET extra_float_digits = 1 SET bytea_output = 'hex' SET lc_monetary = 'C' SET quote_all_identifiers = off SET row_security = off
AS $$
DECLARE
    top_xid bigint := pg_current_xact_id()::text::bigint;
    -- Only what this transaction touched: what others do is theirs to record, and to wait here for
    -- their locks would hang the client.
    touched oid[] := pgtandem.changed_here();
    t record;
    rel oid;
    created jsonb := '[]';
    changed jsonb := '[]';
    filled oid[] := '{}';
    computed jsonb;
    hint text;
    plain text := '';
BEGIN
    -- New tables: their row in pg_class is of this transaction.
    FOR t IN
        SELECT s.*, pgtandem.name_of(s.rel) AS target, pg_get_userbyid(c.relowner) AS owner
          FROM pgtandem.shape s JOIN pg_class c ON c.oid = s.rel
         WHERE s.rel = ANY (touched) AND NOT s.capturing AND s.extension IS NULL
           AND pgtandem.ours(c.xmin, top_xid)
         ORDER BY s.rel
    LOOP
        IF EXISTS (SELECT FROM pgtandem.transform_schema x WHERE x.name = t.schema) THEN
            RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
                MESSAGE = format('pgtandem cannot mirror the new table %s: its schema has another name on the other side', t.target),
                HINT = 'Create it on both sides by a direct connection, then reload proxy.yaml.';
        END IF;
        BEGIN
            PERFORM pgtandem.capture(t.rel);
        EXCEPTION WHEN insufficient_privilege THEN
            hint := format('GRANT %I TO %I;', t.owner, current_user);
            RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
                MESSAGE = format('pgtandem cannot capture the new table %s: %s', t.target, SQLERRM),
                HINT = format('Let the proxy''s role own what %s owns: %s', t.owner, hint);
        END;
        -- By its size: row security may stand between us and the rows already.
        IF pg_relation_size(t.rel) > 0 THEN
            filled := filled || t.rel;
        END IF;
        plain := plain || pgtandem.plain_table(t.rel);
        created := created || jsonb_build_object('rel', t.rel::bigint, 'schema', t.schema, 'name', t.name, 'columns', t.columns,
            'shape', t.shape, 'filenode', t.filenode::bigint, 'attributes', t.attributes);
    END LOOP;

    FOR t IN
        SELECT s.*, c.filenode AS old_filenode, c.attributes AS old_attributes, c.attribute_count AS old_count, c.shape AS old_shape, c.names AS old_names,
               pgtandem.name_of(s.rel) AS target
          FROM pgtandem.shape s JOIN pgtandem.captured c ON c.rel = s.rel
         WHERE s.rel = ANY (touched)
           AND (s.shape, s.filenode, s.attributes, s.schema, s.name) IS DISTINCT FROM (c.shape, c.filenode, c.attributes, c.schema, c.name)
           AND NOT created @> jsonb_build_array(jsonb_build_object('rel', s.rel::bigint))
         ORDER BY s.rel
    LOOP
        PERFORM pgtandem.refuse_transformed(ARRAY[t.rel]);
        -- The function's settings follow the new types.
        PERFORM pgtandem.capture(t.rel);
        computed := '[]';
        IF t.filenode <> t.old_filenode AND t.attributes <> t.old_attributes THEN
            filled := filled || t.rel;
        ELSE
            -- A column added with a stable default (now()) is not rewritten: the value is kept
            -- once, in the catalog, and differs where the statement runs a second time.
            SELECT COALESCE(jsonb_agg(jsonb_build_object('column', a.attname, 'value', a.attmissingval::text)), '[]') INTO computed
              FROM pg_attribute a
             WHERE a.attrelid = t.rel AND a.attnum > t.old_count AND NOT a.attisdropped AND a.atthasmissing;
        END IF;
        changed := changed || jsonb_build_object('rel', t.rel::bigint, 'schema', t.schema, 'name', t.name, 'columns', t.columns,
            'shape', t.shape, 'filenode', t.filenode::bigint, 'attributes', t.attributes, 'computed', computed,
            'filled', t.rel = ANY (filled),
            'renamed', (SELECT COALESCE(jsonb_agg(jsonb_build_array(o.value, n.value)), '[]')
                          FROM jsonb_each_text(t.old_names) o JOIN jsonb_each_text(t.names) n ON n.key = o.key WHERE n.value <> o.value));
        UPDATE pgtandem.captured c
           SET shape = t.shape, filenode = t.filenode, attributes = t.attributes, attribute_count = t.attribute_count,
               schema = t.schema, name = t.name, names = t.names
         WHERE c.rel = t.rel;
    END LOOP;

    -- A query is not run a second time: it may have effects of its own, use what only this session
    -- has, or answer otherwise. The table is made empty there, and its rows follow.
    IF from_query THEN
        IF plain = '' THEN
            RETURN;
        END IF;
        statement := plain;
    END IF;

    PERFORM pgtandem.append(0, 'S', (context || jsonb_build_object('created', created, 'changed', changed))::text, statement);

    FOREACH rel IN ARRAY filled LOOP
        PERFORM pgtandem.journal_rows(rel);
    END LOOP;
END
$$;

-- Which of a table and its partitions are captured as they must be.
CREATE OR REPLACE FUNCTION pgtandem.capturing(rel oid) RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT COALESCE(jsonb_agg(s.rel::bigint), '[]') FROM pgtandem.shape s
     WHERE s.rel = ANY (ARRAY(SELECT capturing.rel UNION SELECT p.relid::oid FROM pg_partition_tree(capturing.rel) p)) AND s.capturing
$$;

-- Run by a client's session right before a DDL statement, in its transaction: afterwards nobody
-- can tell which of the relations it dropped or renamed were temporary, nor whether capture that
-- ALTER TABLE ... DISABLE TRIGGER ALL switched off had been on until then. With the client's own
-- privileges and search path, hence the qualified names.
CREATE OR REPLACE FUNCTION pgtandem.before_ddl(facts jsonb) RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    concerned text;
    temporary boolean := false;
    others jsonb := '[]';
    other_rels jsonb := '[]';
    captured jsonb := '[]';
BEGIN
    PERFORM pgtandem.refuse_transformed(ARRAY(SELECT pg_catalog.to_regclass(named)::pg_catalog.oid
        FROM pg_catalog.jsonb_array_elements_text(facts OPERATOR(pg_catalog.->) 'concerns') AS named WHERE pg_catalog.to_regclass(named) IS NOT NULL));
    IF facts OPERATOR(pg_catalog.->>) 'tag' OPERATOR(pg_catalog.=) 'ALTER TABLE' THEN
        FOR concerned IN SELECT pg_catalog.jsonb_array_elements_text(facts OPERATOR(pg_catalog.->) 'concerns') LOOP
            captured := captured OPERATOR(pg_catalog.||) pgtandem.capturing(pg_catalog.to_regclass(concerned)::pg_catalog.oid);
        END LOOP;
    END IF;
    FOR concerned IN SELECT pg_catalog.jsonb_array_elements_text(facts OPERATOR(pg_catalog.->) 'routes') LOOP
        PERFORM pgtandem.route(pg_catalog.to_regclass(concerned)::pg_catalog.oid);
    END LOOP;
    IF pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid THEN
        FOR concerned IN SELECT pg_catalog.jsonb_array_elements_text(facts OPERATOR(pg_catalog.->) 'concerns') LOOP
            IF EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass(concerned)::pg_catalog.oid
                          AND c.relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()) THEN
                temporary := true;
            ELSE
                others := others OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_array(concerned);
                other_rels := other_rels OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_array(pg_catalog.to_regclass(concerned)::pg_catalog.oid::bigint);
            END IF;
        END LOOP;
    END IF;
    PERFORM pg_catalog.set_config('pgtandem.ddl', (facts OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object('temporary', temporary, 'others', others, 'other_rels', other_rels, 'captured', captured,
        'existed', (SELECT c.oid::bigint FROM pg_catalog.pg_class c WHERE c.relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
                       AND c.relname OPERATOR(pg_catalog.=) (facts OPERATOR(pg_catalog.->>) 'creates'))))::text, true);
END
$$;

-- Whether a statement copies the columns or takes the types of the session's temporary relations,
-- as far as words tell: for what is wrongly taken for one, what it left is recorded all the same.
CREATE OR REPLACE FUNCTION pgtandem.names_temporary(statement text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT statement ~* E'%\\s*type\\M' OR EXISTS (
        SELECT FROM regexp_matches(statement, E'\\mlike\\s+(?:pg_temp\\.)?("[^"]+"|[^\\s,()"]+)', 'gi') m
          JOIN pg_class c ON c.relnamespace = pg_my_temp_schema()
                         AND c.relname = CASE WHEN m[1] LIKE '"%' THEN trim(BOTH '"' FROM m[1]) ELSE lower(m[1]) END)
$$;

-- The tables, sequences and functions of this transaction whose names a statement has.
CREATE OR REPLACE FUNCTION pgtandem.made(statement text) RETURNS oid[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT ARRAY(
        SELECT c.oid FROM pg_class c
         WHERE c.relkind IN ('r', 'p', 'S') AND c.relpersistence <> 't' AND pgtandem.ours(c.xmin, pg_current_xact_id()::text::bigint)
           AND (c.relkind = 'S' OR strpos(lower(statement), lower(c.relname)) > 0)
        UNION ALL
        SELECT p.oid FROM pg_proc p
         WHERE strpos(lower(statement), lower(p.proname)) > 0 AND pgtandem.ours(p.xmin, pg_current_xact_id()::text::bigint))
$$;

-- Whether a statement made a function that needs one of the session's temporary relations: it goes
-- with them, and stays where they are.
CREATE OR REPLACE FUNCTION pgtandem.made_for_temporary(statement text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT EXISTS (
        SELECT FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
         WHERE strpos(lower(statement), lower(p.proname)) > 0 AND pgtandem.ours(p.xmin, pg_current_xact_id()::text::bigint)
           AND (EXISTS (SELECT FROM pg_type t WHERE d.refclassid = 'pg_type'::regclass AND t.oid = d.refobjid AND t.typnamespace = pg_my_temp_schema())
                OR EXISTS (SELECT FROM pg_class c WHERE d.refclassid = 'pg_class'::regclass AND c.oid = d.refobjid AND c.relnamespace = pg_my_temp_schema())))
$$;

-- What objects.sql has of some roots, as a DDL record keeps it. What only the primary has is left
-- out: a default that draws from a temporary sequence goes with that; an index that a concurrent
-- build has not finished comes with the record of the finished one.
CREATE OR REPLACE FUNCTION pgtandem.definitions_of(roots oid[]) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
AS $$
    SELECT COALESCE(jsonb_agg(jsonb_build_array(o.kind, o.name, o.root, o.owner, o.recipe, o.depends)), '[]')
      FROM pgtandem.objects(roots) o
     WHERE (o.kind <> 'index' OR o.recipe::jsonb -> 'invalid' IS NULL)
       AND (o.kind <> 'default' OR NOT EXISTS (
           SELECT FROM pg_attrdef f
             JOIN pg_attribute a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
             JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refclassid = 'pg_class'::regclass
             JOIN pg_class c ON c.oid = d.refobjid AND c.relpersistence = 't'
            WHERE f.adrelid = ANY (roots) AND pgtandem.name_of(f.adrelid) || '.' || quote_ident(a.attname) = o.name))
$$;

-- The context of a record that says what there is after it, and what goes before that.
CREATE OR REPLACE FUNCTION pgtandem.definitions_context(objects jsonb, first jsonb) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
    SELECT pg_catalog.jsonb_build_object('user', session_user, 'role', current_user, 'objects', objects, 'first', first,
        'major', pg_catalog.current_setting('server_version_num')::int OPERATOR(pg_catalog./) 10000)
$$;

-- Run by a client's session right after a DDL statement, in its transaction.
CREATE OR REPLACE FUNCTION pgtandem.ddl(statement text, caller_search_path text, caller_role text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    state bigint;
    facts jsonb := COALESCE(NULLIF(current_setting('pgtandem.ddl', true), ''), '{}');
    others text := (SELECT string_agg(o, ', ') FROM jsonb_array_elements_text(COALESCE(facts -> 'others', '[]')) o);
    -- The roots (objects.sql) of what it left, where its text would mean something else, or nothing,
    -- in a session without this one's temporary relations.
    roots oid[];
BEGIN
    IF facts <> '{}' THEN
        PERFORM set_config('pgtandem.ddl', '', true);
    END IF;
    -- What is temporary stays where it is.
    IF (facts ->> 'temporary')::boolean THEN
        IF others IS NULL THEN
            RETURN;
        ELSIF facts ->> 'tag' LIKE 'DROP %' THEN
            statement := format('%s %s%s', facts ->> 'tag', others, CASE WHEN statement ~* E'\\mcascade\\M' THEN ' CASCADE' ELSE '' END);
        ELSE
            roots := ARRAY(SELECT o::oid FROM jsonb_array_elements_text(facts -> 'other_rels') o);
        END IF;
    ELSIF EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = pg_my_temp_schema() AND c.relname = facts ->> 'creates'
                     AND c.oid::bigint <> COALESCE((facts ->> 'existed')::bigint, 0)) THEN
        RETURN;
    ELSIF pg_my_temp_schema() <> 0 AND facts ->> 'tag' IN ('CREATE TABLE', 'CREATE FUNCTION', 'CREATE PROCEDURE') THEN
        IF pgtandem.made_for_temporary(statement) THEN
            RETURN;
        ELSIF pgtandem.names_temporary(statement) THEN
            roots := pgtandem.made(statement);
            IF roots = '{}' THEN
                RETURN;
            END IF;
        END IF;
    END IF;
    -- The transaction id comes before the state is read: the rotation relies on it.
    PERFORM pg_current_xact_id();
    PERFORM pg_advisory_xact_lock_shared(1885828196, 1);
    state := pg_sequence_last_value('pgtandem.state');
    IF (state >> 2) & 15 <> 0 THEN
        PERFORM pgtandem.unusual(state, 0, 'DDL');
        RETURN;
    END IF;
    IF NOT pg_has_role(session_user, caller_role, 'MEMBER') THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = format('%s is not a member of %s', session_user, caller_role);
    END IF;
    -- Nothing was written since: where the application switches its triggers off, capture goes on.
    PERFORM pgtandem.switch_on(s.rel)
       FROM pgtandem.shape s
      WHERE s.rel = ANY (ARRAY(SELECT c::oid FROM jsonb_array_elements_text(COALESCE(facts -> 'captured', '[]')) c)) AND NOT s.capturing;
    IF roots IS NOT NULL THEN
        PERFORM pgtandem.ddl_effects(format('-- %s, by what it left', facts ->> 'tag'),
            pgtandem.definitions_context(pgtandem.definitions_of(roots), '[]'), false);
        RETURN;
    END IF;
    PERFORM pgtandem.ddl_effects(statement, pgtandem.ddl_context(caller_search_path, caller_role), COALESCE((facts ->> 'from_query')::boolean, false));
END
$$;

-- Run after a DDL statement that may not be in a transaction has succeeded.
CREATE OR REPLACE FUNCTION pgtandem.ddl_outside(statement text, caller_search_path text, caller_role text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_current_xact_id();
    IF NOT pg_has_role(session_user, caller_role, 'MEMBER') THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = format('%s is not a member of %s', session_user, caller_role);
    END IF;
    IF regexp_replace(statement, E'^(\\s+|--[^\\n]*(\\n|$)|/\\*([^*]|\\*[^/])*\\*+/)+', '') ~* E'^reindex\\M' THEN
        PERFORM pgtandem.reindexed(statement);
        RETURN;
    END IF;
    -- An index alone concerns no row: where its table has another shape on the other side, it stays here.
    IF statement ~* E'\\mindex\\M' AND EXISTS (SELECT FROM pgtandem.transform t JOIN pg_class c ON c.oid = t.source
                                             WHERE statement ~* format(E'\\mON\\s+(ONLY\\s+)?(\\S+\\.)?"?%s\\M', regexp_replace(c.relname, E'(\\W)', E'\\\\\\1', 'g'))) THEN
        RAISE WARNING USING MESSAGE = 'pgtandem: this index is on a transformed table and is not made on the other side';
        RETURN;
    END IF;
    PERFORM pgtandem.append(0, 'O', pgtandem.ddl_context(caller_search_path, caller_role)::text, statement);
END
$$;

-- A REINDEX concerns one server's files, unless it completed an index that a concurrent build had
-- left unfinished: that one is not on the secondary yet. Which one it was nobody can tell
-- afterwards, so all that it names are recorded, to be made where they are missing.
CREATE OR REPLACE FUNCTION pgtandem.reindexed(statement text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    indexes jsonb;
BEGIN
    SELECT jsonb_agg(jsonb_build_array(pg_get_userbyid(t.relowner),
               regexp_replace(pg_get_indexdef(i.indexrelid), '^CREATE (UNIQUE )?INDEX ', E'CREATE \\1INDEX IF NOT EXISTS ')))
      INTO indexes
      FROM pg_index i
      JOIN pg_class x ON x.oid = i.indexrelid AND x.relkind = 'i' AND NOT x.relispartition
      JOIN pg_class t ON t.oid = i.indrelid AND t.relpersistence <> 't'
      JOIN pg_namespace n ON n.oid = t.relnamespace
     WHERE i.indisvalid AND n.nspname NOT LIKE E'pg\\_%' AND n.nspname NOT IN ('pgtandem', 'information_schema')
       AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x'))
       AND (statement ~* E'\\m(schema|database|system)\\M' OR strpos(lower(statement), lower(x.relname)) > 0
            OR strpos(lower(statement), lower(t.relname)) > 0);
    IF indexes IS NOT NULL THEN
        PERFORM pgtandem.ddl_effects('-- REINDEX, by what it left', pgtandem.definitions_context('[]', indexes), false);
    END IF;
END
$$;

-- What of the client's session decides what its statement means.
CREATE OR REPLACE FUNCTION pgtandem.ddl_context(caller_search_path text, caller_role text) RETURNS jsonb
LANGUAGE sql STABLE
AS $$
    SELECT pg_catalog.jsonb_build_object('user', session_user, 'role', caller_role, 'settings', pg_catalog.jsonb_build_object(
        'search_path', caller_search_path,
        'TimeZone', pg_catalog.current_setting('TimeZone'),
        'DateStyle', pg_catalog.current_setting('DateStyle'),
        'IntervalStyle', pg_catalog.current_setting('IntervalStyle'),
        'check_function_bodies', pg_catalog.current_setting('check_function_bodies'),
        'transform_null_equals', pg_catalog.current_setting('transform_null_equals'),
        'array_nulls', pg_catalog.current_setting('array_nulls'),
        'xmloption', pg_catalog.current_setting('xmloption'),
        'lc_monetary', pg_catalog.current_setting('lc_monetary'),
        'default_text_search_config', pg_catalog.current_setting('default_text_search_config'),
        'backslash_quote', pg_catalog.current_setting('backslash_quote'),
        'standard_conforming_strings', pg_catalog.current_setting('standard_conforming_strings')))
$$;

-- Whether changes of this database are captured for the other side now.
CREATE OR REPLACE FUNCTION pgtandem.is_captured_primary() RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT (pg_sequence_last_value('pgtandem.state') >> 2) & 15 = 0
$$;

-- Event triggers, where the proxy's role may have them: DDL that does not come through the proxy.
-- Of the client's own single statement the text is known, current_query(), and recorded. What a
-- function or a DO block does, or one of several statements, has no text of its own: there the
-- objects are recorded as they are after it (ddl_within).

-- Whether a statement is a client's own and the only one, from an event trigger's call stack.
CREATE OR REPLACE FUNCTION pgtandem.is_single(context text, bare text) RETURNS boolean
LANGUAGE sql IMMUTABLE
AS $$
    SELECT pg_catalog.strpos(context, pg_catalog.chr(10)) OPERATOR(pg_catalog.=) 0
       AND pg_catalog.strpos(bare, ';') OPERATOR(pg_catalog.=) 0
       AND pg_catalog.strpos(bare, pg_catalog.chr(92)) OPERATOR(pg_catalog.=) 0
$$;

-- A statement without what stands in quotes, where a semicolon ends nothing.
CREATE OR REPLACE FUNCTION pgtandem.bare(statement text) RETURNS text
LANGUAGE sql IMMUTABLE
AS $$
    SELECT pg_catalog.regexp_replace(pg_catalog.regexp_replace(pg_catalog.regexp_replace(statement, E'[;\\s]+$', ''), E'(\\$[A-Za-z_]*\\$).*?\\1', '', 'g'), '''[^'']*''', '', 'g')
$$;

-- The roots (objects.sql) that the commands of an event concern, none of them temporary or ours.
CREATE OR REPLACE FUNCTION pgtandem.touched(tag text) RETURNS oid[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    top_xid bigint := pg_current_xact_id()::text::bigint;
BEGIN
    RETURN ARRAY(
        SELECT DISTINCT CASE c.classid
                   WHEN 'pg_class'::regclass THEN COALESCE((SELECT i.indrelid FROM pg_index i WHERE i.indexrelid = c.objid),
                                                           (SELECT k.reltype FROM pg_class k WHERE k.oid = c.objid AND k.relkind = 'c'), c.objid)
                   WHEN 'pg_constraint'::regclass THEN (SELECT COALESCE(NULLIF(k.conrelid, 0), k.contypid) FROM pg_constraint k WHERE k.oid = c.objid)
                   WHEN 'pg_trigger'::regclass THEN (SELECT g.tgrelid FROM pg_trigger g WHERE g.oid = c.objid)
                   WHEN 'pg_policy'::regclass THEN (SELECT p.polrelid FROM pg_policy p WHERE p.oid = c.objid)
                   WHEN 'pg_rewrite'::regclass THEN (SELECT w.ev_class FROM pg_rewrite w WHERE w.oid = c.objid)
                   WHEN 'pg_statistic_ext'::regclass THEN (SELECT x.stxrelid FROM pg_statistic_ext x WHERE x.oid = c.objid)
                   ELSE c.objid END
          FROM pg_event_trigger_ddl_commands() c
         WHERE c.objid IS NOT NULL AND NOT c.in_extension AND c.schema_name IS DISTINCT FROM 'pg_temp' AND c.schema_name IS DISTINCT FROM 'pgtandem'
        UNION
        -- What ALTER TABLE did to children, partitions and what was one.
        SELECT k.oid FROM pg_class k
         WHERE tag LIKE 'ALTER %TABLE' AND k.relkind IN ('r', 'p', 'S') AND k.relpersistence <> 't' AND pgtandem.ours(k.xmin, top_xid)
        UNION
        -- A GRANT's event does not say on what.
        SELECT g.oid FROM (SELECT oid, xmin, relnamespace AS schema FROM pg_class WHERE relpersistence <> 't' AND relkind IN ('r', 'p', 'v', 'm', 'S')
                           UNION ALL SELECT c.oid, a.xmin, c.relnamespace FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
                                      WHERE a.attacl IS NOT NULL AND c.relpersistence <> 't' AND c.relkind IN ('r', 'p', 'v', 'm')
                           UNION ALL SELECT oid, xmin, pronamespace FROM pg_proc UNION ALL SELECT oid, xmin, oid FROM pg_namespace
                           UNION ALL SELECT oid, xmin, typnamespace FROM pg_type WHERE typtype IN ('e', 'd', 'r')) g
         WHERE tag IN ('GRANT', 'REVOKE') AND g.schema <> 'pgtandem'::regnamespace AND pgtandem.ours(g.xmin, top_xid));
END
$$;

-- Records what DDL without a text of its own did. Nobody can call it but an event, so what it
-- records is true; the definitions are applied as their owners.
CREATE OR REPLACE FUNCTION pgtandem.ddl_within() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    stack text;
    touched oid[];
    objects jsonb := '[]';
    first jsonb := '[]';
BEGIN
    GET DIAGNOSTICS stack = PG_CONTEXT;
    -- Known already (the proxy's hooks stand around it), our own doing, recorded by its text, or
    -- of one server only.
    IF current_setting('pgtandem.ddl', true) <> ''
        OR session_user = current_user
        OR substr(stack, strpos(stack || chr(10), chr(10))) ~ E'\\mpgtandem\\.'
        OR pgtandem.is_single(stack, pgtandem.bare(current_query()))
        OR TG_TAG ~ '^REINDEX|TABLESPACE|SUBSCRIPTION|LARGE OBJECT|DEFAULT PRIVILEGES|EVENT TRIGGER'
        OR NOT pgtandem.is_captured_primary() THEN
        RETURN;
    END IF;
    IF TG_EVENT = 'sql_drop' THEN
        -- What an ALTER TABLE dropped of the table itself shows in the table.
        SELECT jsonb_agg(jsonb_build_array(NULL, format('DROP %s IF EXISTS %s CASCADE', CASE d.object_type WHEN 'statistics object' THEN 'STATISTICS' ELSE upper(d.object_type) END, d.object_identity)))
          INTO first
          FROM pg_event_trigger_dropped_objects() d
         WHERE NOT d.is_temporary AND d.schema_name IS DISTINCT FROM 'pgtandem'
           AND CASE WHEN TG_TAG LIKE 'DROP %' THEN d.original ELSE NOT d.original END
           AND (d.object_type IN ('view', 'materialized view', 'function', 'procedure', 'aggregate', 'trigger', 'policy', 'rule', 'sequence')
                OR (d.original AND d.object_type IN ('table', 'index', 'type', 'schema', 'extension', 'statistics object')));
        IF first IS NULL THEN
            RETURN;
        END IF;
    ELSIF TG_TAG LIKE 'DROP %' THEN
        RETURN;
    ELSE
        touched := pgtandem.touched(TG_TAG);
        IF touched = '{}' THEN
            RETURN;
        END IF;
        PERFORM pgtandem.refuse_transformed(touched);
        objects := pgtandem.definitions_of(touched);
        IF TG_TAG = 'REFRESH MATERIALIZED VIEW' THEN
            SELECT jsonb_agg(jsonb_build_array(pg_get_userbyid(c.relowner), format('REFRESH MATERIALIZED VIEW %s WITH %sDATA', pgtandem.name_of(c.oid),
                       CASE WHEN c.relispopulated THEN '' ELSE 'NO ' END))) INTO first
              FROM pg_class c WHERE c.oid = ANY (touched) AND c.relkind = 'm';
        END IF;
    END IF;
    PERFORM pgtandem.ddl_effects(
        format('-- %s, inside something else%s', TG_TAG, CASE TG_TAG WHEN 'ALTER TYPE' THEN ', which may be ADD VALUE' ELSE '' END),
        pgtandem.definitions_context(objects, COALESCE(first, '[]')), false);
END
$$;

CREATE OR REPLACE FUNCTION pgtandem.refuse_transformed_event(tag text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM pgtandem.transform) THEN
        PERFORM pgtandem.refuse_transformed(pgtandem.touched(tag));
    END IF;
END
$$;

-- With the client's own privileges, hence the names.
CREATE OR REPLACE FUNCTION pgtandem.ddl_seen() RETURNS event_trigger
LANGUAGE plpgsql
AS $$
DECLARE
    context text;
    statement text := pg_catalog.regexp_replace(pg_catalog.current_query(), E'[;\\s]+$', '');
    bare text := pgtandem.bare(statement);
    temporary boolean;
BEGIN
    GET DIAGNOSTICS context = PG_CONTEXT;
    -- Known already (the proxy's hooks stand around it), inside something else, or several.
    IF pg_catalog.current_setting('pgtandem.ddl', true) OPERATOR(pg_catalog.<>) ''
        OR NOT pgtandem.is_single(context, bare)
        OR bare OPERATOR(pg_catalog.~*) E'\\mconcurrently\\M|\\mtablespace\\M|\\msubscription\\M|\\mlarge\\s+object\\M|^\\s*reindex\\M'
        OR NOT pgtandem.is_captured_primary() THEN
        RETURN;
    END IF;
    IF TG_EVENT OPERATOR(pg_catalog.=) 'sql_drop' THEN
        IF TG_TAG OPERATOR(pg_catalog.!~~) 'DROP %' THEN
            RETURN;
        END IF;
        temporary := (SELECT pg_catalog.bool_or(d.is_temporary) FROM pg_catalog.pg_event_trigger_dropped_objects() d WHERE d.original);
    ELSE
        IF TG_TAG OPERATOR(pg_catalog.~~) 'DROP %' THEN
            RETURN;
        END IF;
        temporary := (SELECT pg_catalog.bool_or(c.schema_name OPERATOR(pg_catalog.~~) E'pg\\_temp%') FROM pg_catalog.pg_event_trigger_ddl_commands() c);
    END IF;
    IF temporary THEN
        RETURN;
    END IF;
    IF TG_EVENT OPERATOR(pg_catalog.<>) 'sql_drop' THEN
        PERFORM pgtandem.refuse_transformed_event(TG_TAG);
    END IF;
    PERFORM pg_catalog.set_config('pgtandem.ddl', pg_catalog.jsonb_build_object('tag', TG_TAG, 'temporary', false,
        'from_query', TG_TAG OPERATOR(pg_catalog.=) 'CREATE TABLE AS' OR TG_TAG OPERATOR(pg_catalog.=) 'SELECT INTO')::text, true);
    PERFORM pgtandem.ddl(statement, pg_catalog.current_setting('search_path'), current_user::text);
END
$$;

-- DDL on the side that is not the primary, which no trigger of a table sees. A side that reports
-- strays lets it pass; what it changed shows as a difference of the definitions. Most kinds are
-- refused before they begin; those that may concern temporary relations alone when it is known what
-- they concerned. The lock is the writers' own: so a flip waits for DDL in flight, and what begins
-- under its fence finds out how it ended.
CREATE OR REPLACE FUNCTION pgtandem.ddl_fence() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    maybe_temporary boolean := TG_TAG ~ '^(CREATE|ALTER|DROP) (TABLE|INDEX|SEQUENCE|VIEW)$|^CREATE TABLE AS$|^SELECT INTO$';
    state bigint;
    this_side text;
    that_side text;
BEGIN
    -- The proxy's own role, the way to be rid of pgtandem, and what is of one server only.
    IF session_user = current_user
        OR current_query() ~* E'^\\s*DROP SCHEMA (IF EXISTS )?"?pgtandem"? CASCADE'
        OR TG_TAG ~ '^REINDEX|TABLESPACE|PUBLICATION|SUBSCRIPTION|EVENT TRIGGER' THEN
        RETURN;
    END IF;
    state := CASE WHEN pg_advisory_xact_lock_shared(1885828196, 1) IS NULL THEN NULL ELSE pg_sequence_last_value('pgtandem.state') END;
    IF (state >> 2) & 7 IN (0, 2, 4) THEN
        RETURN;
    END IF;
    CASE TG_EVENT
    WHEN 'ddl_command_start' THEN
        IF maybe_temporary AND current_query() !~* E'\\mconcurrently\\M' THEN
            RETURN;
        END IF;
    WHEN 'sql_drop' THEN
        IF NOT EXISTS (SELECT FROM pg_event_trigger_dropped_objects() d WHERE d.original AND NOT d.is_temporary) THEN
            RETURN;
        END IF;
    ELSE
        IF NOT EXISTS (SELECT FROM pg_event_trigger_ddl_commands() c WHERE c.schema_name IS DISTINCT FROM 'pg_temp') THEN
            RETURN;
        END IF;
    END CASE;
    SELECT s.side, CASE s.side WHEN 'new' THEN 'legacy' ELSE 'new' END INTO this_side, that_side FROM pgtandem.side s;
    RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
        MESSAGE = CASE (state >> 2) & 7 WHEN 1
            THEN format('pgtandem: this database (%s) is the secondary, DDL goes to the primary (%s)', this_side, that_side)
            ELSE format('pgtandem: this database (%s) takes no DDL now, the primary is being flipped', this_side) END,
        DETAIL = format('Refused: %s by role %s.', TG_TAG, session_user),
        HINT = 'Connect through pgtandem, which sends DDL to the primary and mirrors it. A DBA who must do it by hand on both sides sets session_replication_role = replica here.';
END
$$;

DO $$
DECLARE f regprocedure;
BEGIN
    FOR f IN SELECT p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
              WHERE n.nspname = 'pgtandem' AND p.proname IN ('ddl_effects', 'journal_rows', 'refill', 'touched', 'objects', 'definitions_of', 'reindexed')
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f);
    END LOOP;
END
$$;
