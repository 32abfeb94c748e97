-- Who serves this pair, and the record of every flip, on both sides. What decides is the record on
-- the side that is primary when a flip begins; switchover::machine says how.

-- The proxies; a row each, kept fresh by a beat.
CREATE TABLE IF NOT EXISTS pgtandem.proxy (
    id text PRIMARY KEY,
    name text NOT NULL,
    address text NOT NULL,
    version text NOT NULL,
    phase text NOT NULL,
    epoch bigint NOT NULL,
    -- Of the proxy's clock from this server's.
    clock_offset_ms double precision NOT NULL,
    beat timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    -- What it has answered in which flip.
    flip text,
    answer text,
    detail jsonb
);
-- What it tells of its clients' sessions (switchover::sessions).
ALTER TABLE pgtandem.proxy ADD COLUMN IF NOT EXISTS sessions jsonb;

CREATE TABLE IF NOT EXISTS pgtandem.flip (
    id text PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('flip', 'rehearsal')),
    from_side text NOT NULL,
    to_side text NOT NULL,
    -- The one that it leads to.
    epoch bigint NOT NULL,
    phase text NOT NULL,
    coordinator text NOT NULL,
    forced text,
    step text NOT NULL,
    began timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    -- After this anybody may end it.
    deadline timestamptz NOT NULL,
    ended timestamptz,
    outcome text
);
CREATE INDEX IF NOT EXISTS flip_began ON pgtandem.flip (began);

-- Its transitions: each is here before it takes effect.
CREATE TABLE IF NOT EXISTS pgtandem.flip_step (
    flip text NOT NULL,
    number integer NOT NULL,
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    who text NOT NULL,
    step text NOT NULL,
    measured jsonb NOT NULL,
    PRIMARY KEY (flip, number)
);

-- Takes a flip from one of the expected steps to the next; false where somebody else has gone on.
CREATE OR REPLACE FUNCTION pgtandem.flip_go(flip text, expected text[], step text, who text, measured jsonb, patience interval) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
BEGIN
    UPDATE pgtandem.flip AS f
       SET step = flip_go.step,
           deadline = clock_timestamp() + patience,
           ended = CASE WHEN flip_go.step IN ('turned', 'done', 'aborted') THEN clock_timestamp() END,
           outcome = COALESCE(measured ->> 'outcome', f.outcome)
     WHERE f.id = flip_go.flip AND f.step = ANY (expected);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO pgtandem.flip_step AS s (flip, number, who, step, measured)
    SELECT flip_go.flip, 1 + count(*), flip_go.who, flip_go.step, flip_go.measured
      FROM pgtandem.flip_step t WHERE t.flip = flip_go.flip;
    PERFORM pg_notify('pgtandem_flip', flip_go.flip);
    RETURN true;
END
$$;
REVOKE ALL ON FUNCTION pgtandem.flip_go(text, text[], text, text, jsonb, interval) FROM PUBLIC;

-- What a flip sends from the one side's journal to the other side before it holds anybody.
CREATE TABLE IF NOT EXISTS pgtandem.probe (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    token text NOT NULL
);

-- The last flip that set out to turn this database, noted before its fence is raised here. The record
-- that decides is in one of the databases only: whoever takes back what a flip left here makes sure by
-- this that no later one has come meanwhile.
CREATE TABLE IF NOT EXISTS pgtandem.crossing (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    flip text NOT NULL
);
