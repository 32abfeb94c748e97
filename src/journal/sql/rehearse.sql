-- Rehearsals (writes.rehearse_percent): clients' writes that are tried on the secondary, as their
-- user, in transactions that are never committed.
--
-- A rehearsal marks its transaction by a row of pgtandem.rehearsing. No such row is ever committed,
-- so whoever sees one is in the transaction that made it: that is how the capture triggers tell a
-- rehearsal (pgtandem.unusual). Two locks are on that door. Only who knows the key gets the mark;
-- and what has it cannot commit, whoever set it and whatever else the transaction does: rolling back
-- to a savepoint takes the mark only together with all that was written under it.

-- The proxies read it; nobody else may.
CREATE TABLE IF NOT EXISTS pgtandem.rehearsal_key (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    key text NOT NULL
);

CREATE UNLOGGED TABLE IF NOT EXISTS pgtandem.rehearsing (
    one boolean NOT NULL DEFAULT true
);

CREATE OR REPLACE FUNCTION pgtandem.never_commit() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction',
        MESSAGE = 'pgtandem: a rehearsed transaction is never committed';
END
$$;
REVOKE ALL ON FUNCTION pgtandem.never_commit() FROM PUBLIC;

-- Fires at COMMIT and at PREPARE TRANSACTION, also for those who run as replica.
DROP TRIGGER IF EXISTS never_commit ON pgtandem.rehearsing;
CREATE CONSTRAINT TRIGGER never_commit AFTER INSERT ON pgtandem.rehearsing
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pgtandem.never_commit();
ALTER TABLE pgtandem.rehearsing ENABLE ALWAYS TRIGGER never_commit;

-- Has what is due at COMMIT checked now: a rehearsal has none. Each constraint by its name, since SET
-- CONSTRAINTS ALL would fire the trigger above. As the caller and under his settings, as COMMIT does it:
-- the application's own deferred triggers run here.
CREATE OR REPLACE FUNCTION pgtandem.check_deferred() RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    due text;
BEGIN
    SELECT pg_catalog.string_agg(DISTINCT pg_catalog.format('%I.%I', n.nspname, c.conname), ', ') INTO due
      FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace
     WHERE c.condeferrable AND n.nspname <> 'pgtandem' AND n.nspname !~ '^pg_'
       AND pg_catalog.has_schema_privilege(n.oid, 'USAGE');
    IF due IS NOT NULL THEN
        EXECUTE 'SET CONSTRAINTS ' || due || ' IMMEDIATE';
    END IF;
END
$$;

-- Makes the transaction a rehearsal. Answers the last round of which the secondary has all, or null
-- where it is between two.
CREATE OR REPLACE FUNCTION pgtandem.rehearse(key text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pgtandem.rehearsal_key k WHERE k.key = rehearse.key) THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = 'pgtandem: only the proxy rehearses writes';
    END IF;
    IF (pg_sequence_last_value('pgtandem.state') >> 2) & 7 NOT IN (1, 2) THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'pgtandem: writes are rehearsed on the secondary only';
    END IF;
    INSERT INTO pgtandem.rehearsing DEFAULT VALUES;
    RETURN (SELECT w.round FROM pgtandem.watermark w WHERE w.target IS NULL AND w.piece IS NULL AND w.outside IS NULL);
END
$$;
