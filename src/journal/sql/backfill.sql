-- How far the copying of existing rows has come. Lives on the secondary: what is recorded of a
-- range is written in the transaction that copies its rows, so that a crash leaves both or none.

-- The last backfill. `running` with nobody running it means that it was interrupted.
CREATE TABLE IF NOT EXISTS pgtandem.backfill (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch bigint NOT NULL,
    state text NOT NULL CHECK (state IN ('running', 'done', 'stopped', 'cancelled')),
    note text,
    began timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    ended timestamptz
);

-- Its tables, by the primary's OID. `copied`: every row is in, and what follows the rows is not
-- done yet. `key`: the columns that the ranges' bounds are of.
CREATE TABLE IF NOT EXISTS pgtandem.backfill_table (
    rel oid PRIMARY KEY,
    schema text NOT NULL,
    name text NOT NULL,
    state text NOT NULL CHECK (state IN ('waiting', 'copying', 'copied', 'done', 'refused', 'failed')),
    note text,
    key text[],
    rows_expected bigint NOT NULL,
    bytes_expected bigint NOT NULL
);

-- Ranges that are in: keys above `low` (null: from the first) up to `high` (null: to the last).
-- The numbers of neighbours follow each other; where one is missing, so is that range.
CREATE TABLE IF NOT EXISTS pgtandem.backfill_range (
    rel oid NOT NULL,
    number bigint NOT NULL,
    low text[],
    high text[],
    read bigint NOT NULL,
    skipped bigint NOT NULL,
    failed bigint NOT NULL,
    bytes bigint NOT NULL,
    PRIMARY KEY (rel, number)
);

-- Rows that this side refused, as COPY's text format writes them.
CREATE TABLE IF NOT EXISTS pgtandem.backfill_refused (
    rel oid NOT NULL,
    number bigint NOT NULL,
    schema text NOT NULL,
    name text NOT NULL,
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    sqlstate text NOT NULL,
    error text NOT NULL,
    columns text[] NOT NULL,
    line bytea NOT NULL
);
CREATE INDEX IF NOT EXISTS backfill_refused_rel ON pgtandem.backfill_refused (rel, number);
