-- The objects that both sides carry, so that the reverse direction is armed before any flip.
-- Idempotent: run by journal::install inside one transaction.

CREATE SCHEMA IF NOT EXISTS pgtandem;
GRANT USAGE ON SCHEMA pgtandem TO PUBLIC;
COMMENT ON SCHEMA pgtandem IS 'journal and state of the pgtandem proxy; leave out of dumps (pg_dump -N pgtandem)';

-- Which database this is and how far its journal has come.
CREATE TABLE IF NOT EXISTS pgtandem.side (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    side text NOT NULL,
    version integer NOT NULL,
    truncations bigint NOT NULL DEFAULT 0
);

-- The name of the pair whose journal this is, the same on both sides; and the id below which
-- transactions' changes may be gone from it (apply::kin).
ALTER TABLE pgtandem.side ADD COLUMN IF NOT EXISTS pair text;
ALTER TABLE pgtandem.side ADD COLUMN IF NOT EXISTS emptied xid8;

-- Epoch, role and journal slot packed into one number, because a sequence is read as it is
-- now, whatever the reader's snapshot. journal::state packs and unpacks it:
-- epoch * 256 + full * 32 + role * 4 + slot.
CREATE SEQUENCE IF NOT EXISTS pgtandem.state MINVALUE 0 START 0;

-- The journal: three tables that take turns, so that an old one can go by TRUNCATE. No key and
-- no sequence (they would change the client's lastval()); the index serves rounds (journal::horizon
-- says how). Rows are only ever inserted, so autovacuum would find nothing to do but its own scan.
CREATE TABLE IF NOT EXISTS pgtandem.change_0 (
    pos pg_lsn NOT NULL DEFAULT pg_catalog.pg_current_wal_insert_lsn(),
    xid xid8 NOT NULL DEFAULT pg_catalog.pg_current_xact_id(),
    rel oid NOT NULL,
    op "char" NOT NULL,
    old text,
    new text
) WITH (autovacuum_enabled = off);
CREATE TABLE IF NOT EXISTS pgtandem.change_1 (LIKE pgtandem.change_0 INCLUDING DEFAULTS) WITH (autovacuum_enabled = off);
CREATE TABLE IF NOT EXISTS pgtandem.change_2 (LIKE pgtandem.change_0 INCLUDING DEFAULTS) WITH (autovacuum_enabled = off);
CREATE INDEX IF NOT EXISTS change_0_pos ON pgtandem.change_0 USING brin (pos) WITH (pages_per_range = 8);
CREATE INDEX IF NOT EXISTS change_1_pos ON pgtandem.change_1 USING brin (pos) WITH (pages_per_range = 8);
CREATE INDEX IF NOT EXISTS change_2_pos ON pgtandem.change_2 USING brin (pos) WITH (pages_per_range = 8);
DROP INDEX IF EXISTS pgtandem.change_0_xid, pgtandem.change_1_xid, pgtandem.change_2_xid;

-- For journal::horizon: the end of the log, and an id given out after it was read. Then summarizes
-- the index of each slot from the given blocks on, up to where writers may still be (a range that
-- is summarized while they fill it would have to be updated with every row), and returns the blocks
-- to go on from.
CREATE OR REPLACE FUNCTION pgtandem.look_out(INOUT next bigint[], OUT log_end pg_lsn, OUT xid xid8)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '20ms'
AS $$
DECLARE
    -- Of the index; and what a writer may have in hand.
    range_blocks constant bigint := 8;
    kept_blocks constant bigint := 32;
    blocks bigint;
BEGIN
    log_end := pg_current_wal_insert_lsn();
    xid := pg_current_xact_id();
    FOR slot IN 0..2 LOOP
        blocks := pg_relation_size(format('pgtandem.change_%s', slot)::regclass) / current_setting('block_size')::bigint;
        IF blocks < next[slot + 1] THEN
            next[slot + 1] := 0;
        END IF;
        WHILE next[slot + 1] + range_blocks + kept_blocks <= blocks LOOP
            PERFORM brin_summarize_range(format('pgtandem.change_%s_pos', slot)::regclass, next[slot + 1]);
            next[slot + 1] := next[slot + 1] + range_blocks;
        END LOOP;
    END LOOP;
END
$$;
REVOKE ALL ON FUNCTION pgtandem.look_out(bigint[]) FROM PUBLIC;

-- A slot that writers have left: every transaction that may have written it is below `closed`.
CREATE TABLE IF NOT EXISTS pgtandem.rotation (
    slot smallint PRIMARY KEY,
    closed xid8
);

-- The tables whose changes this side captures, as they were when last looked at, and in
-- `origin` as they were when capture began: a secondary that comes late starts from there.
CREATE TABLE IF NOT EXISTS pgtandem.captured (
    rel oid PRIMARY KEY,
    schema text NOT NULL,
    name text NOT NULL,
    was_empty boolean NOT NULL,
    shape text NOT NULL,
    filenode oid NOT NULL,
    attributes text NOT NULL,
    attribute_count smallint NOT NULL,
    settings text NOT NULL,
    origin jsonb NOT NULL
);
-- The columns' names by their numbers, which survive a renaming.
ALTER TABLE pgtandem.captured ADD COLUMN IF NOT EXISTS names jsonb;

-- How far this side has followed, while it is the secondary. One row, written in the same
-- transaction as the rows of a round.
CREATE TABLE IF NOT EXISTS pgtandem.watermark (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL,
    primary_side text NOT NULL,
    round bigint NOT NULL,
    snapshot text NOT NULL,
    position pg_lsn NOT NULL,
    target text,
    target_position pg_lsn,
    piece pg_lsn,
    outside text,
    applied_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
) WITH (fillfactor = 10);

-- The primary's tables (by the primary's OID, which survives renames) and this side's.
CREATE TABLE IF NOT EXISTS pgtandem.seeding (
    rel oid PRIMARY KEY,
    local oid,
    schema text NOT NULL,
    name text NOT NULL,
    state text NOT NULL CHECK (state IN ('unseeded', 'seeding', 'synced')),
    paused text,
    note text,
    columns text NOT NULL,
    shape text NOT NULL,
    filenode oid NOT NULL,
    attributes text NOT NULL
);

CREATE TABLE IF NOT EXISTS pgtandem.divergence (
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    round bigint NOT NULL,
    schema text NOT NULL,
    name text NOT NULL,
    kind text NOT NULL,
    key text
);

-- When and at which cut a verification last found a table equal on both sides.
CREATE TABLE IF NOT EXISTS pgtandem.verified (
    schema text NOT NULL,
    name text NOT NULL,
    epoch bigint NOT NULL,
    at timestamptz NOT NULL,
    round bigint NOT NULL,
    snapshot text NOT NULL,
    position pg_lsn NOT NULL,
    rows bigint NOT NULL,
    digest text NOT NULL,
    PRIMARY KEY (schema, name)
);

-- Rows of this side that were mended from the primary.
CREATE TABLE IF NOT EXISTS pgtandem.mended (
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    round bigint NOT NULL,
    schema text NOT NULL,
    name text NOT NULL,
    deleted bigint NOT NULL,
    inserted bigint NOT NULL,
    actor text NOT NULL
);

-- Writers that came to this side while it was the secondary (stray_writers: report).
CREATE TABLE IF NOT EXISTS pgtandem.stray (
    role text NOT NULL,
    application text NOT NULL,
    relation text NOT NULL,
    operation text NOT NULL,
    writes bigint NOT NULL,
    last timestamptz NOT NULL,
    PRIMARY KEY (role, application, relation, operation)
);

-- Those that somebody looked at, and why they may stand.
CREATE TABLE IF NOT EXISTS pgtandem.stray_acknowledged (
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    role text NOT NULL,
    application text NOT NULL,
    relation text NOT NULL,
    operation text NOT NULL,
    writes bigint NOT NULL,
    last timestamptz NOT NULL,
    actor text NOT NULL,
    reason text NOT NULL
);

-- Gone when a crash has emptied this side's unlogged tables.
CREATE UNLOGGED TABLE IF NOT EXISTS pgtandem.intact (
    one boolean PRIMARY KEY DEFAULT true CHECK (one)
);
INSERT INTO pgtandem.intact DEFAULT VALUES ON CONFLICT DO NOTHING;

-- Where a piece too large for the proxy's memory is turned into a difference by the server.
CREATE UNLOGGED TABLE IF NOT EXISTS pgtandem.staged (
    rel oid NOT NULL,
    op "char" NOT NULL,
    pos pg_lsn NOT NULL,
    old text,
    new text
) WITH (autovacuum_enabled = off);
CREATE UNLOGGED TABLE IF NOT EXISTS pgtandem.net (
    img text NOT NULL,
    n bigint NOT NULL
) WITH (autovacuum_enabled = off);

-- Every table that can be captured, and what its definition looks like. `shape` changes with
-- everything that changes how a row is written; `attributes` with every touch of a column's
-- catalog row; a rewrite of the data shows as a new `filenode` together with new `attributes`
-- (VACUUM FULL and TRUNCATE change the file alone). `columns` names types as the reader's
-- search_path makes them: read it with search_path = pg_catalog.
CREATE OR REPLACE VIEW pgtandem.shape AS
SELECT c.oid AS rel,
       n.nspname::text AS schema,
       c.relname::text AS name,
       c.relpersistence AS persistence,
       c.relfilenode AS filenode,
       c.relnatts AS attribute_count,
       (SELECT e.extname::text FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
         WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0
           AND d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e') AS extension,
       (SELECT COALESCE(pg_catalog.md5(pg_catalog.string_agg(pg_catalog.concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attgenerated), ',' ORDER BY a.attnum)), '')
          FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS shape,
       (SELECT COALESCE(pg_catalog.md5(pg_catalog.string_agg(a.xmin::text, ',' ORDER BY a.attnum)), '')
          FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = c.oid AND a.attnum > 0) AS attributes,
       (SELECT COALESCE(pg_catalog.json_agg(pg_catalog.json_build_array(a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attgenerated) ORDER BY a.attnum), '[]')::text
          FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
       -- Every kind of write is seen: in tgtype, 1 is "for each row", 4 INSERT, 8 DELETE, 16 UPDATE,
       -- 32 TRUNCATE. Whatever switches triggers on and off by ALTER TABLE leaves its trace in 'R' and 'A'.
       (SELECT COALESCE(pg_catalog.bool_or(t.tgname = 'zzz_pgtandem_row' AND t.tgenabled = 'O' AND t.tgtype & 25 = 25)
                    AND (pg_catalog.bool_or(t.tgname = 'zzz_pgtandem_row' AND t.tgtype & 4 = 4)
                         OR pg_catalog.bool_or(t.tgname = 'zzz_pgtandem_insert' AND t.tgenabled = 'O')
                        AND pg_catalog.bool_or(t.tgname = 'zzz_pgtandem_attach_by_a_statement_through_the_proxy'))
                    AND pg_catalog.bool_or(t.tgname = 'zzz_pgtandem_replica' AND t.tgenabled = 'R')
                    AND pg_catalog.bool_or(t.tgname = 'zzz_pgtandem_truncate' AND t.tgenabled = 'A'), false)
          FROM pg_catalog.pg_trigger t
         WHERE t.tgrelid = c.oid AND t.tgname LIKE E'zzz\\_pgtandem\\_%'
           AND t.tgfoid IN (SELECT p.oid FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace pn ON pn.oid = p.pronamespace
                             WHERE pn.nspname = 'pgtandem' AND p.pronargs = 0
                               AND p.proname IN ('capture_nothing', pg_catalog.concat('capture_', c.oid), pg_catalog.concat('capture_', c.oid, '_insert'),
                                                 pg_catalog.concat('capture_', c.oid, '_replica'), pg_catalog.concat('capture_', c.oid, '_truncate')))) AS capturing,
       (SELECT COALESCE(pg_catalog.jsonb_object_agg(a.attnum, a.attname), '{}') FROM pg_catalog.pg_attribute a
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS names
  FROM pg_catalog.pg_class c
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r'
   AND c.relpersistence <> 't'
   AND n.nspname NOT IN ('pgtandem', 'information_schema')
   AND n.nspname NOT LIKE E'pg\\_%';
