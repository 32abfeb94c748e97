-- Tables of this side that have another shape on the other one (transform: in proxy.yaml). Each is
-- seen through a view with the other side's columns, whose OID stands for the other side's table.
CREATE TABLE IF NOT EXISTS pgtandem.transform (
    rel oid PRIMARY KEY,
    -- The view's name; the function that maps an image has the same one.
    face text NOT NULL,
    source oid NOT NULL,
    -- The other side's table, and its columns as view pgtandem.shape has them.
    schema text NOT NULL,
    name text NOT NULL,
    columns text NOT NULL,
    -- Columns of one value and type under two names: the other side's, then this one's.
    same jsonb NOT NULL,
    -- Every value is told from the other side's row: rows that were mapped there and back are the same.
    exact boolean NOT NULL,
    definition text NOT NULL
);
-- All tables that its rows come from, source first: of several, the rows of one key make one row.
ALTER TABLE pgtandem.transform ADD COLUMN IF NOT EXISTS sources oid[];
UPDATE pgtandem.transform SET sources = ARRAY[source] WHERE sources IS NULL;

-- Schemas of this side that have another name on the other one.
CREATE TABLE IF NOT EXISTS pgtandem.transform_schema (
    name text PRIMARY KEY,
    other text NOT NULL
);

-- The tables of this side as the other one has them: what is mirrored, by the OID that its changes
-- have when they leave the journal.
CREATE OR REPLACE VIEW pgtandem.mirrored AS
SELECT s.rel, s.rel AS source, s.schema, s.name, s.shape, s.filenode, s.attributes, s.columns, NULL::jsonb AS same, true AS exact, pgtandem.name_of(s.rel) AS relation,
       ARRAY[s.rel] AS sources
  FROM pgtandem.shape s WHERE NOT EXISTS (SELECT FROM pgtandem.transform t WHERE s.rel = ANY (t.sources))
UNION ALL
SELECT t.rel, t.source, t.schema, t.name, s.shape, s.filenode, s.attributes, t.columns, t.same, t.exact, pg_catalog.format('pgtandem.%I', t.face),
       t.sources
  FROM pgtandem.transform t JOIN pg_catalog.pg_class v ON v.oid = t.rel
  JOIN LATERAL (SELECT pg_catalog.string_agg(s.shape, ' ' ORDER BY s.rel) AS shape,
                       CASE count(*) WHEN 1 THEN min(s.filenode)
                            ELSE (pg_catalog.hashtext(pg_catalog.string_agg(s.filenode::text, ' ' ORDER BY s.rel)) & 2147483647)::oid END AS filenode,
                       pg_catalog.string_agg(s.attributes, ' ' ORDER BY s.rel) AS attributes
                  FROM pgtandem.shape s WHERE s.rel = ANY (t.sources)
                HAVING count(*) = pg_catalog.cardinality(t.sources)) s ON true;

-- The table behind what is mirrored under this OID.
CREATE OR REPLACE FUNCTION pgtandem.source_of(rel oid) RETURNS oid
LANGUAGE sql STABLE
AS $$ SELECT COALESCE((SELECT t.source FROM pgtandem.transform t WHERE t.rel OPERATOR(pg_catalog.=) source_of.rel), source_of.rel) $$;

-- An image in the other side's shape. Made anew with the faces; there are none yet.
DO $make$
BEGIN
    IF pg_catalog.to_regprocedure('pgtandem.transformed(oid,text)') IS NULL THEN
        CREATE FUNCTION pgtandem.transformed(rel oid, image text) RETURNS text LANGUAGE plpgsql STABLE
        AS $$ BEGIN RETURN image; END $$;
        REVOKE ALL ON FUNCTION pgtandem.transformed(oid, text) FROM PUBLIC;
    END IF;
END
$make$;

-- DDL on a transformed table means something else on the other side, or nothing: it is refused.
CREATE OR REPLACE FUNCTION pgtandem.refuse_transformed(rels oid[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    found text;
BEGIN
    SELECT format('%s (%s.%s on the other side)', pgtandem.name_of(COALESCE((SELECT s FROM unnest(t.sources) AS s WHERE s = ANY (rels) LIMIT 1), t.source)), t.schema, t.name) INTO found
      FROM pgtandem.transform t
     WHERE t.sources && rels OR t.sources && ARRAY(SELECT i.indrelid FROM pg_index i WHERE i.indexrelid = ANY (rels))
     LIMIT 1;
    IF found IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
            MESSAGE = format('pgtandem cannot mirror DDL on the transformed table %s', found),
            HINT = 'Its shape on the other side is given by transform: in proxy.yaml. Take the table out of it, change both sides, describe the new shapes there, and copy its rows again.';
    END IF;
END
$$;

-- Run by the TRUNCATE trigger of every captured table. A part of a row that is put together from
-- several tables cannot be taken from all rows at once: what the parts were is no longer there to be
-- read. `state` is the state sequence's value; refused is it only where clients write.
CREATE OR REPLACE FUNCTION pgtandem.may_truncate(rel oid, state bigint) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    found text;
BEGIN
    SELECT format('%s.%s', t.schema, t.name) INTO found
      FROM pgtandem.transform t WHERE cardinality(t.sources) > 1 AND may_truncate.rel = ANY (t.sources);
    IF found IS NOT NULL AND (state >> 2) & 7 = 0 THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
            MESSAGE = format('pgtandem cannot mirror TRUNCATE of %s, which is a part of %s on the other side', pgtandem.name_of(rel), found),
            HINT = 'Use DELETE.';
    END IF;
END
$$;
REVOKE ALL ON FUNCTION pgtandem.may_truncate(oid, bigint) FROM PUBLIC;
