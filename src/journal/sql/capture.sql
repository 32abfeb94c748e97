-- Capture: the trigger functions and what generates them.

-- A name that can be pasted into SQL.
CREATE OR REPLACE FUNCTION pgtandem.name_of(rel oid) RETURNS text
LANGUAGE sql STABLE
AS $$
    SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
     WHERE c.oid = rel
$$;

-- The settings that the text of this table's rows depends on, as SET clauses of a function:
-- each costs every captured row about a microsecond, so only those that its types need. Looks
-- through domains, arrays, composites, ranges. A base type of an extension that is not known
-- to ignore them gets all.
CREATE OR REPLACE FUNCTION pgtandem.settings_of(rel oid) RETURNS text
LANGUAGE sql STABLE
AS $$
    WITH RECURSIVE used(type) AS (
        SELECT a.atttypid FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = rel AND a.attnum > 0 AND NOT a.attisdropped
        UNION
        SELECT inner_type.type
          FROM used u
          JOIN pg_catalog.pg_type t ON t.oid = u.type
         CROSS JOIN LATERAL (
               SELECT t.typbasetype WHERE t.typtype = 'd'
               UNION ALL
               SELECT t.typelem WHERE t.typelem <> 0 AND t.typtype = 'b'
               UNION ALL
               SELECT a.atttypid FROM pg_catalog.pg_attribute a
                WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
               UNION ALL
               SELECT r.rngsubtype FROM pg_catalog.pg_range r WHERE r.rngtypid = t.oid
               UNION ALL
               SELECT r.rngtypid FROM pg_catalog.pg_range r
                WHERE pg_catalog.to_jsonb(r) OPERATOR(pg_catalog.->>) 'rngmultitypid' OPERATOR(pg_catalog.=) t.oid::text
         ) AS inner_type(type)
    ),
    base AS (
        SELECT t.typname::text AS name, n.nspname OPERATOR(pg_catalog.=) 'pg_catalog' AS builtin
          FROM used u
          JOIN pg_catalog.pg_type t ON t.oid = u.type
          JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
         WHERE t.typtype = 'b' AND NOT (t.typcategory = 'A' AND t.typelem <> 0)
    ),
    foreign_base AS (
        SELECT 1 FROM base
         WHERE NOT builtin AND name NOT IN ('citext', 'hstore', 'ltree', 'lquery', 'ltxtquery', 'vector', 'halfvec', 'sparsevec', 'geometry', 'geography', 'isbn', 'ean13')
    ),
    pins(setting, value, needed) AS (VALUES
        ('DateStyle', 'ISO, YMD', EXISTS (SELECT 1 FROM foreign_base) OR EXISTS (SELECT 1 FROM base WHERE name IN ('date', 'timestamp', 'timestamptz'))),
        ('TimeZone', 'UTC', EXISTS (SELECT 1 FROM foreign_base) OR EXISTS (SELECT 1 FROM base WHERE name IN ('timestamptz'))),
        ('IntervalStyle', 'postgres', EXISTS (SELECT 1 FROM foreign_base) OR EXISTS (SELECT 1 FROM base WHERE name IN ('interval'))),
        ('extra_float_digits', '1', EXISTS (SELECT 1 FROM foreign_base) OR EXISTS (SELECT 1 FROM base WHERE name IN ('float4', 'float8', 'point', 'line', 'lseg', 'box', 'path', 'polygon', 'circle'))),
        ('bytea_output', 'hex', EXISTS (SELECT 1 FROM base WHERE name IN ('bytea'))),
        ('lc_monetary', 'C', EXISTS (SELECT 1 FROM base WHERE name IN ('money'))),
        ('search_path', 'pg_catalog, pg_temp', EXISTS (SELECT 1 FROM base WHERE name LIKE 'reg%')),
        ('quote_all_identifiers', 'off', EXISTS (SELECT 1 FROM base WHERE name LIKE 'reg%'))
    )
    SELECT COALESCE(pg_catalog.string_agg(
               CASE WHEN setting = 'search_path' THEN 'SET search_path = pg_catalog, pg_temp'
                    ELSE pg_catalog.format('SET %I = %L', setting, value) END, ' ' ORDER BY setting), '')
      FROM pins WHERE needed
$$;

-- What a capture trigger does when the state is anything but "primary, slot 0 to 2": refuses,
-- reports or lets pass. A function of its own, to keep the ordinary path short.
CREATE OR REPLACE FUNCTION pgtandem.unusual(state bigint, rel oid, operation text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    this_side text := (SELECT s.side FROM pgtandem.side s);
    that_side text := CASE this_side WHEN 'new' THEN 'legacy' ELSE 'new' END;
    role integer := (state >> 2) & 7;
BEGIN
    -- The applier, where it may not run as replica.
    IF role <> 0 AND session_user = current_user THEN
        RETURN;
    END IF;
    -- A rehearsal, which is never committed (rehearse.sql): only its own transaction sees the row.
    IF role IN (1, 2) AND EXISTS (SELECT FROM pgtandem.rehearsing) THEN
        RETURN;
    END IF;
    CASE role
    WHEN 0 THEN
        -- The primary, with a full journal.
        RAISE EXCEPTION USING ERRCODE = 'disk_full',
            MESSAGE = 'pgtandem: the journal has reached journal.max_bytes, writes are refused until it has drained',
            DETAIL = format('The secondary (%s) does not follow; see "pgtandem status".', that_side),
            HINT = 'Bring the secondary back, raise journal.max_bytes, or set journal.when_full: stop_mirroring.';
    WHEN 2 THEN
        -- The writer's own transaction carries the note, so only what commits is reported.
        INSERT INTO pgtandem.stray AS s (role, application, relation, operation, writes, last)
        VALUES (session_user, current_setting('application_name'), pgtandem.name_of(rel), operation, 1, clock_timestamp())
        ON CONFLICT ON CONSTRAINT stray_pkey DO UPDATE SET writes = s.writes + 1, last = EXCLUDED.last;
    WHEN 4 THEN
        -- Mirroring was stopped: the status says that the secondary must be seeded again.
        NULL;
    ELSE
        RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
            MESSAGE = CASE role WHEN 1
                THEN format('pgtandem: this database (%s) is the secondary, writes go to the primary (%s)', this_side, that_side)
                ELSE format('pgtandem: this database (%s) takes no writes now, the primary is being flipped', this_side) END,
            DETAIL = format('Refused: %s on %s by role %s.', operation, pgtandem.name_of(rel), session_user),
            HINT = 'Connect through pgtandem, which sends every write to the primary.';
    END CASE;
END
$$;

-- The function of a capture trigger. `changes` is the query that makes the journal's rows of what
-- it sees, `source` where a query finds that; `guard` is what else the function asks first.
--
-- Each expression of PL/pgSQL that is met in a transaction is prepared anew and costs its writer
-- about a microsecond, hence constants instead of TG_RELID and TG_OP, and no variable more than it
-- takes. Everything is named with its schema instead of pinning search_path, which would cost each
-- row as much. The rows are of type record there, so a cast that a table's owner defines on his
-- row type does not come into it. The lock is taken before the state is read (CASE guarantees the
-- order): so whoever holds it exclusively can change the state knowing that nobody acts on the old
-- one. To take it again in the same transaction is a look into a local table. A name means ours,
-- whatever the table's columns are called.
CREATE OR REPLACE FUNCTION pgtandem.define_capture(function_name text, rel oid, pins text, guard text, changes text, source text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format($f$
CREATE OR REPLACE FUNCTION pgtandem.%1$I() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER %2$s
AS $capture$
#variable_conflict use_variable
DECLARE
    state bigint := CASE WHEN pg_catalog.pg_advisory_xact_lock_shared(1885828196, 1) IS NULL THEN NULL ELSE pg_catalog.pg_sequence_last_value(%3$s) END;
BEGIN
    %4$s
    IF state OPERATOR(pg_catalog.&) 255 OPERATOR(pg_catalog.=) 0 THEN
        INSERT INTO pgtandem.change_0 (rel, op, old, new) %5$s;
    ELSIF state OPERATOR(pg_catalog.&) 255 OPERATOR(pg_catalog.=) 1 THEN
        INSERT INTO pgtandem.change_1 (rel, op, old, new) %5$s;
    ELSIF state OPERATOR(pg_catalog.&) 255 OPERATOR(pg_catalog.=) 2 THEN
        INSERT INTO pgtandem.change_2 (rel, op, old, new) %5$s;
    ELSE
        PERFORM pgtandem.unusual(state, %6$s, TG_OP) %7$s;
    END IF;
    RETURN NULL;
END
$capture$ $f$, function_name, pins, 'pgtandem.state'::regclass::oid, guard, changes, rel, source);
    EXECUTE format('REVOKE ALL ON FUNCTION pgtandem.%I() FROM PUBLIC', function_name);
END
$$;

-- The functions of all of a table's triggers; `pins` as settings_of() gives them.
CREATE OR REPLACE FUNCTION pgtandem.define_functions(rel oid, pins text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    name text := 'capture_' || rel;
    images text := format('VALUES (%s, ''R'', OLD::pg_catalog.text, NEW::pg_catalog.text)', rel);
BEGIN
    PERFORM pgtandem.define_capture(name, rel, pins, '', images, '');
    PERFORM pgtandem.define_capture(name || '_insert', rel, pins, '',
        format('SELECT %s, ''R'', NULL, (pgtandem_new.*)::pg_catalog.text FROM pgtandem_new', rel), 'FROM pgtandem_new');
    -- It may have been switched on for everybody, by ALTER TABLE ... ENABLE TRIGGER.
    PERFORM pgtandem.define_capture(name || '_replica', rel, pins,
        'IF pg_catalog.current_setting(''session_replication_role'') OPERATOR(pg_catalog.<>) ''replica'' THEN RETURN NULL; END IF;',
        images, '');
    PERFORM pgtandem.define_capture(name || '_truncate', rel, '', '', format('VALUES (%s, ''T'', NULL, NULL)', rel), '');
END
$$;

-- After the SQL has changed: what stands on the tables is made anew. Locks none of them.
CREATE OR REPLACE FUNCTION pgtandem.define_again() RETURNS void
LANGUAGE sql
AS $$
    UPDATE pgtandem.captured c SET settings = pgtandem.settings_of(c.rel)
      FROM pgtandem.shape s WHERE s.rel OPERATOR(pg_catalog.=) c.rel AND s.capturing;
    SELECT pgtandem.define_functions(c.rel, c.settings)
      FROM pgtandem.captured c JOIN pgtandem.shape s ON s.rel OPERATOR(pg_catalog.=) c.rel WHERE s.capturing
$$;

-- Whether rows reach this table by another's name: then no trigger of its own that fires once for
-- a statement sees them.
CREATE OR REPLACE FUNCTION pgtandem.is_routed(rel oid) RETURNS boolean
LANGUAGE sql STABLE
AS $$
    SELECT EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhrelid OPERATOR(pg_catalog.=) rel)
$$;

-- For DDL that makes a table a partition or an inheritance child: capture that does not depend on
-- how rows get in. Takes the lock that such DDL takes. For whoever may run that DDL.
CREATE OR REPLACE FUNCTION pgtandem.route(rel oid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    target text := pgtandem.name_of(rel);
BEGIN
    IF NOT EXISTS (SELECT FROM pg_class c JOIN pg_trigger g ON g.tgrelid = c.oid
                    WHERE c.oid = route.rel AND g.tgname = 'zzz_pgtandem_insert' AND pg_has_role(session_user, c.relowner, 'MEMBER')) THEN
        RETURN;
    END IF;
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', target);
    PERFORM pgtandem.create_triggers(rel, target, true);
END
$$;

-- The triggers of a captured table. Capture fires for everyone but the applier, which is the
-- proxy's role running as replica:
--   row       the rows of UPDATE and DELETE; of INSERT, too, where rows are routed to the table
--   insert    the rows of an INSERT or COPY all at once, a third of what row by row costs in bulk
--   replica   all of it for those who run as replica, for whom the two above do not fire
--   truncate  TRUNCATE, whoever runs it
-- A trigger with a transition table lets Postgres refuse to make the table a partition or a child,
-- after which "insert" would miss rows; it is switched off and never fires. DDL that comes as a
-- statement through the proxy is preceded by pgtandem.route().
--
-- No WHEN on the first two: it is read and planned anew for every statement, a quarter of what
-- capture costs a short one. Where the applier may not run as replica, they need it.
CREATE OR REPLACE FUNCTION pgtandem.create_triggers(rel oid, target text, routed boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET client_min_messages = warning
AS $$
DECLARE
    others text := format('WHEN (session_user <> %L)', current_user);
    origin text := CASE WHEN pgtandem.may_run_as_replica() THEN '' ELSE others END;
    name text := 'capture_' || rel;
BEGIN
    EXECUTE format('DROP TRIGGER IF EXISTS zzz_pgtandem_row ON %1$s; DROP TRIGGER IF EXISTS zzz_pgtandem_insert ON %1$s;
                    DROP TRIGGER IF EXISTS zzz_pgtandem_replica ON %1$s; DROP TRIGGER IF EXISTS zzz_pgtandem_truncate ON %1$s;
                    DROP TRIGGER IF EXISTS zzz_pgtandem_attach_by_a_statement_through_the_proxy ON %1$s', target);
    EXECUTE format('CREATE TRIGGER zzz_pgtandem_row AFTER %s UPDATE OR DELETE ON %s FOR EACH ROW %s EXECUTE FUNCTION pgtandem.%I()',
        CASE WHEN routed THEN 'INSERT OR' END, target, origin, name);
    IF NOT routed THEN
        EXECUTE format('CREATE TRIGGER zzz_pgtandem_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS pgtandem_new FOR EACH STATEMENT %s EXECUTE FUNCTION pgtandem.%I()',
            target, origin, name || '_insert');
        EXECUTE format('CREATE TRIGGER zzz_pgtandem_attach_by_a_statement_through_the_proxy AFTER INSERT ON %s REFERENCING NEW TABLE AS pgtandem_new FOR EACH ROW EXECUTE FUNCTION pgtandem.capture_nothing()', target);
    END IF;
    EXECUTE format('CREATE TRIGGER zzz_pgtandem_replica AFTER INSERT OR UPDATE OR DELETE ON %s FOR EACH ROW %s EXECUTE FUNCTION pgtandem.%I()',
        target, others, name || '_replica');
    EXECUTE format('CREATE TRIGGER zzz_pgtandem_truncate AFTER TRUNCATE ON %s FOR EACH STATEMENT %s EXECUTE FUNCTION pgtandem.%I()',
        target, others, name || '_truncate');
    PERFORM pgtandem.switch_on(rel);
END
$$;

-- The triggers of a captured table are switched as they must be. Takes SHARE ROW EXCLUSIVE on the
-- table, as whatever switches triggers does.
CREATE OR REPLACE FUNCTION pgtandem.switch_on(rel oid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    actions text := (
        SELECT string_agg(CASE g.tgname WHEN 'zzz_pgtandem_replica' THEN 'ENABLE REPLICA'
                                        WHEN 'zzz_pgtandem_truncate' THEN 'ENABLE ALWAYS'
                                        WHEN 'zzz_pgtandem_attach_by_a_statement_through_the_proxy' THEN 'DISABLE'
                                        ELSE 'ENABLE' END || ' TRIGGER ' || quote_ident(g.tgname), ', ')
          FROM pg_trigger g WHERE g.tgrelid = switch_on.rel AND g.tgname LIKE E'zzz\\_pgtandem\\_%');
BEGIN
    IF actions IS NOT NULL THEN
        EXECUTE format('ALTER TABLE ONLY %s %s', pgtandem.name_of(rel), actions);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION pgtandem.capture_nothing() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    RETURN NULL;
END
$$;

-- By GRANT SET ON PARAMETER from Postgres 15 on, before that as superuser.
CREATE OR REPLACE FUNCTION pgtandem.may_run_as_replica() RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF (SELECT r.rolsuper FROM pg_roles r WHERE r.rolname = current_user) THEN
        RETURN true;
    ELSIF current_setting('server_version_num')::integer < 150000 THEN
        RETURN false;
    END IF;
    RETURN has_parameter_privilege('session_replication_role', 'SET');
END
$$;

-- Captures a table: generates its functions, creates its triggers. Takes SHARE ROW EXCLUSIVE on
-- the table; the caller sets lock_timeout. Answers 'kept' (all was there), 'new', or 'again'
-- (captured before, but a trigger was dropped or switched off: changes may be lost).
CREATE OR REPLACE FUNCTION pgtandem.capture(rel oid) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    t record;
    known pgtandem.captured%ROWTYPE;
    pins text := pgtandem.settings_of(rel);
    target text := pgtandem.name_of(rel);
    outcome text;
    empty boolean;
BEGIN
    IF target IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_table', MESSAGE = format('no table with OID %s', rel);
    END IF;
    SELECT * INTO t FROM pgtandem.shape s WHERE s.rel = capture.rel;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type', MESSAGE = format('%s cannot be captured', target);
    END IF;
    SELECT * INTO known FROM pgtandem.captured c WHERE c.rel = capture.rel;
    IF t.capturing AND known.settings = pins THEN
        RETURN 'kept';
    END IF;
    PERFORM pgtandem.define_functions(rel, pins);
    IF t.capturing THEN
        UPDATE pgtandem.captured c SET settings = pins WHERE c.rel = capture.rel;
        RETURN 'kept';
    END IF;

    EXECUTE format('LOCK TABLE ONLY %s IN SHARE ROW EXCLUSIVE MODE', target);
    -- Nobody else can have an uncommitted row here now, so what is seen is all there is.
    -- By its size where row security might hide rows from us.
    IF EXISTS (SELECT FROM pg_class c WHERE c.oid = capture.rel AND c.relrowsecurity AND c.relforcerowsecurity) THEN
        empty := pg_relation_size(capture.rel) = 0;
    ELSE
        EXECUTE format('SELECT NOT EXISTS (SELECT FROM ONLY %s)', target) INTO empty;
    END IF;
    PERFORM pgtandem.create_triggers(rel, target, pgtandem.is_routed(rel));
    outcome := CASE WHEN known.rel IS NULL THEN 'new' ELSE 'again' END;
    INSERT INTO pgtandem.captured AS c (rel, schema, name, was_empty, shape, filenode, attributes, attribute_count, settings, names, origin)
    SELECT s.rel, s.schema, s.name, empty AND outcome = 'new', s.shape, s.filenode, s.attributes, s.attribute_count, pins, s.names,
           jsonb_build_object('rel', s.rel::bigint, 'schema', s.schema, 'name', s.name, 'columns', s.columns,
               'shape', s.shape, 'filenode', s.filenode::bigint, 'attributes', s.attributes)
      FROM pgtandem.shape s WHERE s.rel = capture.rel
    ON CONFLICT ON CONSTRAINT captured_pkey DO UPDATE SET schema = EXCLUDED.schema, name = EXCLUDED.name,
        was_empty = EXCLUDED.was_empty, shape = EXCLUDED.shape, filenode = EXCLUDED.filenode,
        attributes = EXCLUDED.attributes, attribute_count = EXCLUDED.attribute_count, settings = EXCLUDED.settings, names = EXCLUDED.names,
        origin = EXCLUDED.origin;
    RETURN outcome;
END
$$;

-- Writes one record into the journal's current slot, as a trigger would.
CREATE OR REPLACE FUNCTION pgtandem.append(rel oid, op "char", old text, new text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    state bigint;
BEGIN
    -- A position is taken after its transaction's id: journal::horizon relies on it.
    PERFORM pg_current_xact_id();
    PERFORM pg_advisory_xact_lock_shared(1885828196, 1);
    state := pg_sequence_last_value('pgtandem.state');
    CASE state & 255
    WHEN 0 THEN INSERT INTO pgtandem.change_0 (rel, op, old, new) VALUES (append.rel, append.op, append.old, append.new);
    WHEN 1 THEN INSERT INTO pgtandem.change_1 (rel, op, old, new) VALUES (append.rel, append.op, append.old, append.new);
    WHEN 2 THEN INSERT INTO pgtandem.change_2 (rel, op, old, new) VALUES (append.rel, append.op, append.old, append.new);
    ELSE PERFORM pgtandem.unusual(state, rel, 'DDL');
    END CASE;
END
$$;

DO $$
DECLARE f regprocedure;
BEGIN
    FOR f IN SELECT p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
              WHERE n.nspname = 'pgtandem' AND p.proname IN ('capture', 'define_capture', 'define_functions', 'define_again', 'create_triggers', 'switch_on', 'capture_nothing', 'append', 'unusual', 'settings_of')
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f);
    END LOOP;
END
$$;
