-- Orders of operators that reached a proxy which does not apply, and what came of them (apply::errands).
-- On the secondary, where the applier's lease is: whoever holds that takes them.

CREATE TABLE IF NOT EXISTS pgtandem.errand (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    epoch bigint NOT NULL,
    "order" jsonb NOT NULL,
    -- The proxy that was asked, and whoever asked it, where that is known.
    asked_of text NOT NULL,
    actor text,
    at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    -- Not to be begun after this.
    deadline timestamptz NOT NULL,
    -- Before anything of it is carried out, so that nothing is carried out twice.
    taken_by text,
    taken_at timestamptz,
    answer jsonb,
    answered_at timestamptz
);
