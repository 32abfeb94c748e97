//! Every way to change rows.

use pgtandem::apply::Applier;
use pgtandem::control::Side;

use crate::bed::Bed;

/// Runs the statements on the primary as the application, and finds both sides equal.
async fn check(name: &str, schema: &str, statements: &[&str]) -> (Bed, Applier) {
    let (bed, applier) = Bed::mirrored(name, schema).await;
    let client = bed.app(Side::Legacy).await;
    for statement in statements {
        client
            .batch_execute(statement)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {}", pgtandem::upstream::control::error_chain(&error)));
        // One round for each, so that every statement's effect is looked for on the secondary.
        bed.assert_same(&applier).await;
    }
    (bed, applier)
}

#[tokio::test]
async fn plain_rows() {
    check(
        "plain_rows",
        "CREATE TABLE t (id int PRIMARY KEY, a text, b numeric, c timestamptz DEFAULT now(), d jsonb, e bytea)",
        &[
            "INSERT INTO t (id, a, b) SELECT g, 'row ' || g, g * 1.10 FROM generate_series(1, 300) g",
            "UPDATE t SET a = 'it''s \"quoted\", (odd) \\ back' || E'\\n\\t', d = '{\"k\": [1, null, \"x\"]}', e = '\\x00ff5c' WHERE id % 7 = 0",
            "UPDATE t SET a = '' WHERE id = 1; UPDATE t SET a = NULL WHERE id = 2",
            "UPDATE t SET b = 'NaN', c = '-infinity' WHERE id = 3; UPDATE t SET b = 1.1000 WHERE b = 1.1",
            "DELETE FROM t WHERE id % 3 = 0",
            "INSERT INTO t (id) VALUES (3) ON CONFLICT (id) DO UPDATE SET a = 'up'; INSERT INTO t (id) VALUES (3) ON CONFLICT (id) DO UPDATE SET a = 'upped'",
            "UPDATE t SET id = id + 1000",
            "UPDATE t SET id = id - 999",
            "WITH gone AS (DELETE FROM t WHERE id < 50 RETURNING *) INSERT INTO t SELECT id + 5000, a, b, c, d, e FROM gone",
            "WITH x AS (UPDATE t SET a = 'x' WHERE id > 5000 RETURNING id) UPDATE t SET a = 'y' WHERE id = 60",
            "MERGE INTO t USING (VALUES (60), (61), (99999)) s(id) ON t.id = s.id
             WHEN MATCHED AND s.id = 60 THEN DELETE WHEN MATCHED THEN UPDATE SET a = 'merged' WHEN NOT MATCHED THEN INSERT (id) VALUES (s.id)",
            "INSERT INTO t (id, a) VALUES (-1, repeat(md5('x'), 100000)), (-2, repeat('ab', 3000000))",
            "UPDATE t SET b = 2 WHERE id = -1",
        ],
    )
    .await;
}

#[tokio::test]
async fn keys_of_every_kind() {
    check(
        "keys",
        "CREATE TABLE composite (b text, a int, v int, PRIMARY KEY (a, b));
         CREATE TABLE swaps (id int PRIMARY KEY, u int UNIQUE, w text);
         CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, u int UNIQUE DEFERRABLE);
         CREATE TABLE only_unique (a int NOT NULL, b int, UNIQUE (a));
         CREATE TABLE nullable_unique (a int UNIQUE, b int);
         CREATE TABLE partial (a int, b int); CREATE UNIQUE INDEX ON partial (a) WHERE b > 0;
         CREATE TABLE expressions (a text, b int); CREATE UNIQUE INDEX ON expressions (lower(a));
         CREATE TABLE excluded (r int4range, EXCLUDE USING gist (r WITH &&));
         CREATE TABLE \"Odd \"\"Name\" (\"Primary Key\" int PRIMARY KEY, \"select\" text, \"Ünï\" text);
         CREATE TABLE no_columns ();
         CREATE TABLE only_key (a int PRIMARY KEY);
         CREATE TABLE included (a int, b text, PRIMARY KEY (a) INCLUDE (b));
         CREATE TABLE dates (d timestamptz PRIMARY KEY, f float8, n numeric UNIQUE)",
        &[
            "INSERT INTO composite SELECT 'k' || g % 5, g, g FROM generate_series(1, 20) g; UPDATE composite SET v = -v; UPDATE composite SET b = 'x', a = a + 1; DELETE FROM composite WHERE a > 15",
            "INSERT INTO swaps VALUES (1, 1, 'a'), (2, 2, 'b'), (3, 3, 'c')",
            "BEGIN; UPDATE swaps SET u = 0 WHERE id = 1; UPDATE swaps SET u = 1 WHERE id = 2; UPDATE swaps SET u = 2 WHERE id = 1; COMMIT",
            "BEGIN; UPDATE swaps SET id = 10 WHERE id = 1; UPDATE swaps SET id = 1 WHERE id = 2; UPDATE swaps SET id = 2 WHERE id = 10; COMMIT",
            "INSERT INTO deferred SELECT g, g FROM generate_series(1, 10) g; UPDATE deferred SET id = 11 - id, u = 20 - u; BEGIN; INSERT INTO deferred VALUES (1, 100); DELETE FROM deferred WHERE u <> 100 AND id = 1; COMMIT",
            "INSERT INTO only_unique VALUES (1, 1), (2, NULL); UPDATE only_unique SET a = 3 - a WHERE false; UPDATE only_unique SET b = 5",
            "INSERT INTO nullable_unique VALUES (NULL, 1), (NULL, 1), (NULL, 2), (1, 1); UPDATE nullable_unique SET a = 7 WHERE ctid = (SELECT ctid FROM nullable_unique WHERE a IS NULL AND b = 1 LIMIT 1); DELETE FROM nullable_unique WHERE a IS NULL AND b = 1",
            "INSERT INTO partial VALUES (1, 0), (1, 0), (1, 1); UPDATE partial SET b = -1 WHERE b = 1; UPDATE partial SET b = 1 WHERE ctid = (SELECT ctid FROM partial LIMIT 1)",
            "INSERT INTO expressions VALUES ('A', 1), ('b', 2); UPDATE expressions SET a = 'a' WHERE b = 1; DELETE FROM expressions WHERE b = 2",
            "INSERT INTO excluded VALUES ('[1,5)'), ('[5,9)'); BEGIN; DELETE FROM excluded WHERE r = '[5,9)'; UPDATE excluded SET r = '[4,8)'; INSERT INTO excluded VALUES ('[1,4)'); COMMIT",
            "INSERT INTO \"Odd \"\"Name\" VALUES (1, 'x', 'é'), (2, NULL, '日本'); UPDATE \"Odd \"\"Name\" SET \"select\" = '\"', \"Primary Key\" = 3 WHERE \"Primary Key\" = 1; DELETE FROM \"Odd \"\"Name\" WHERE \"Primary Key\" = 2",
            "INSERT INTO no_columns DEFAULT VALUES; INSERT INTO no_columns DEFAULT VALUES; INSERT INTO no_columns DEFAULT VALUES",
            "DELETE FROM no_columns WHERE ctid = (SELECT min(ctid) FROM no_columns)",
            "INSERT INTO only_key SELECT generate_series(1, 9); UPDATE only_key SET a = -a WHERE a > 5; DELETE FROM only_key WHERE a = 1",
            "INSERT INTO included VALUES (1, 'x'), (2, 'y'); UPDATE included SET b = 'z'",
            "SET TimeZone = 'Asia/Kolkata'; SET DateStyle = 'SQL, DMY'; SET extra_float_digits = -5; INSERT INTO dates VALUES ('2024-02-29 12:00', 1/3.0::float8, 1.0), ('infinity', 'NaN', 2), ('4000-01-01 BC', '-0', 3)",
            "UPDATE dates SET n = 1.000 WHERE n = 1.0; UPDATE dates SET d = d + interval '1 day', f = f * 2 WHERE isfinite(d)",
        ],
    )
    .await;
}

#[tokio::test]
async fn rows_without_a_key() {
    check(
        "keyless",
        "CREATE TABLE t (a int, b text); CREATE TABLE odd (j json, p point)",
        &[
            "INSERT INTO t SELECT g % 3, 'same' FROM generate_series(1, 30) g",
            "DELETE FROM t WHERE ctid IN (SELECT ctid FROM t WHERE a = 1 LIMIT 4)",
            "UPDATE t SET a = 9 WHERE ctid IN (SELECT ctid FROM t WHERE a = 2 LIMIT 3)",
            "INSERT INTO t VALUES (NULL, NULL), (NULL, NULL); DELETE FROM t WHERE ctid = (SELECT ctid FROM t WHERE a IS NULL LIMIT 1)",
            "INSERT INTO odd VALUES ('{\"a\": 1}', '(1,2)'), ('{\"a\":1}', '(1,2)'), ('{\"a\": 1}', '(1,2)')",
            "DELETE FROM odd WHERE ctid = (SELECT ctid FROM odd WHERE j::text = '{\"a\": 1}' LIMIT 1); UPDATE odd SET p = '(3,4)' WHERE j::text = '{\"a\":1}'",
            "DELETE FROM t",
        ],
    )
    .await;
}

#[tokio::test]
async fn computed_by_the_server() {
    check(
        "computed",
        "CREATE TABLE identity (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int GENERATED BY DEFAULT AS IDENTITY, v text);
         CREATE TABLE identity_outside (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, v text);
         CREATE TABLE generated (a int PRIMARY KEY, b int GENERATED ALWAYS AS (a * 2) STORED, c text);
         CREATE TABLE serials (id bigserial PRIMARY KEY, at timestamptz DEFAULT clock_timestamp(), r float8 DEFAULT random());
         CREATE DOMAIN positive AS int CHECK (VALUE > 0);
         CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
         CREATE TYPE pair AS (x int, y text);
         CREATE TABLE typed (d positive PRIMARY KEY, m mood, p pair, ps pair[], i interval, mo money, r tstzrange, rc regclass, ds date[])",
        &[
            "INSERT INTO identity (v) VALUES ('a'), ('b'); INSERT INTO identity (id, v) OVERRIDING SYSTEM VALUE VALUES (100, 'c'); UPDATE identity SET v = 'd', n = 50 WHERE id = 1",
            "UPDATE identity SET id = DEFAULT WHERE id = 100",
            "INSERT INTO identity_outside (id, v) VALUES (1, 'a'), (2, 'b'); UPDATE identity_outside SET v = 'c'; UPDATE identity_outside SET n = DEFAULT WHERE id = 2",
            "INSERT INTO generated (a, c) VALUES (1, 'x'), (2, 'y'); UPDATE generated SET a = a + 10; UPDATE generated SET c = 'z' WHERE a = 11; DELETE FROM generated WHERE a = 12",
            "INSERT INTO serials DEFAULT VALUES; INSERT INTO serials DEFAULT VALUES; UPDATE serials SET r = random()",
            "SET IntervalStyle = 'iso_8601'; SET bytea_output = 'escape'; SET search_path = pg_catalog; INSERT INTO public.typed VALUES (1, 'ok', '(1,\"a,b\")', ARRAY['(2,\"\\\"q\")'::public.pair, NULL], '1 year 2 days -3:04:05', '12.34', '[2024-01-01,)', 'public.serials', '[0:1]={2024-01-01,NULL}')",
            "UPDATE public.typed SET m = 'happy', mo = '-1234.5', i = '-1 mon +2 days'",
        ],
    )
    .await;
}

#[tokio::test]
async fn partitions_and_inheritance() {
    check(
        "partitions",
        "CREATE TABLE p (id int, k text, v int, PRIMARY KEY (id, k)) PARTITION BY LIST (k);
         CREATE TABLE p_a PARTITION OF p FOR VALUES IN ('a'); CREATE TABLE p_b PARTITION OF p FOR VALUES IN ('b') PARTITION BY RANGE (id);
         CREATE TABLE p_b1 PARTITION OF p_b FOR VALUES FROM (0) TO (100); CREATE TABLE p_rest PARTITION OF p_b DEFAULT;
         CREATE TABLE parent (id int PRIMARY KEY, a text); CREATE TABLE child (b text) INHERITS (parent);
         CREATE VIEW narrow AS SELECT id, a FROM parent WHERE id < 100;
         CREATE TABLE ruled (id int PRIMARY KEY); CREATE TABLE rule_log (id int);
         CREATE RULE r AS ON INSERT TO ruled DO ALSO INSERT INTO rule_log VALUES (NEW.id)",
        &[
            "INSERT INTO p SELECT g, CASE WHEN g % 2 = 0 THEN 'a' ELSE 'b' END, 0 FROM generate_series(1, 200) g",
            "UPDATE p SET k = 'b' WHERE k = 'a' AND id < 150",
            "UPDATE p SET id = id + 1000, k = 'a' WHERE k = 'b' AND id % 5 = 0; DELETE FROM p WHERE id = 1",
            "INSERT INTO parent VALUES (1, 'x'); INSERT INTO child VALUES (2, 'y', 'z'), (1, 'same id', 'w'); UPDATE parent SET a = a || '!'; DELETE FROM parent WHERE id = 2",
            "INSERT INTO narrow VALUES (5, 'through a view'); UPDATE narrow SET a = 'v' WHERE id = 5",
            "INSERT INTO ruled VALUES (1), (2)",
            "TRUNCATE p_a; INSERT INTO p VALUES (7777, 'a', 1)",
            "TRUNCATE p",
            "TRUNCATE parent",
        ],
    )
    .await;
}

#[tokio::test]
async fn cascades_functions_and_the_applications_triggers() {
    check(
        "cascades",
        "CREATE TABLE a (id int PRIMARY KEY, v int);
         CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a ON DELETE CASCADE ON UPDATE CASCADE, n int);
         CREATE TABLE c (id int PRIMARY KEY, b int REFERENCES b ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED);
         CREATE TABLE audit (id serial PRIMARY KEY, what text, at timestamptz DEFAULT clock_timestamp());
         CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audit (what) VALUES (TG_OP || ' ' || COALESCE(NEW.id, OLD.id)); RETURN COALESCE(NEW, OLD); END $$;
         CREATE TRIGGER aaa AFTER INSERT OR UPDATE OR DELETE ON b FOR EACH ROW EXECUTE FUNCTION audit();
         CREATE TRIGGER zzzz AFTER INSERT OR UPDATE OR DELETE ON a FOR EACH ROW EXECUTE FUNCTION audit();
         CREATE FUNCTION bump() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.n := COALESCE(NEW.n, 0) + 1; IF NEW.id = 666 THEN RETURN NULL; END IF; RETURN NEW; END $$;
         CREATE TRIGGER before BEFORE INSERT OR UPDATE ON b FOR EACH ROW EXECUTE FUNCTION bump();
         CREATE TABLE self (id int PRIMARY KEY, v int);
         CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.v < 5 THEN UPDATE self SET v = NEW.v + 1 WHERE id = NEW.id; END IF; UPDATE self SET v = v + 10 WHERE id = NEW.id + 1; RETURN NULL; END $$;
         CREATE TRIGGER aaa AFTER INSERT OR UPDATE ON self FOR EACH ROW WHEN (pg_trigger_depth() < 4) EXECUTE FUNCTION again();
         ALTER TABLE self ENABLE ALWAYS TRIGGER aaa;
         ALTER TABLE b ENABLE ALWAYS TRIGGER aaa;
         ALTER TABLE b ENABLE REPLICA TRIGGER before;
         ALTER TABLE b ENABLE ALWAYS TRIGGER before;
         CREATE FUNCTION work(n int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN INSERT INTO a VALUES (n, n); UPDATE a SET v = v + 1 WHERE id = n; RETURN nextval('audit_id_seq'); END $$;
         CREATE PROCEDURE commits(n int) LANGUAGE plpgsql AS $$ BEGIN INSERT INTO a VALUES (n, 0); COMMIT; INSERT INTO a VALUES (n + 1, 0); ROLLBACK; INSERT INTO a VALUES (n + 2, 0); END $$",
        &[
            "INSERT INTO a SELECT g, g FROM generate_series(1, 10) g; INSERT INTO b SELECT g, g % 10 + 1, 0 FROM generate_series(1, 30) g; INSERT INTO c SELECT g, g FROM generate_series(1, 30) g",
            "INSERT INTO b VALUES (666, 1)",
            "UPDATE a SET id = id + 100 WHERE id < 4",
            "DELETE FROM a WHERE id > 100",
            "SELECT work(50), work(51)",
            "CALL commits(200)",
            "DO $$ BEGIN FOR i IN 300..310 LOOP BEGIN INSERT INTO a VALUES (i, i / (i - 305)); EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$",
            "INSERT INTO self VALUES (2, 0), (1, 0), (3, 4)",
            "UPDATE self SET v = 0; DELETE FROM self WHERE id = 2",
            "TRUNCATE a CASCADE",
        ],
    )
    .await;
}

#[tokio::test]
async fn transactions_of_every_shape() {
    let (bed, applier) = check(
        "transactions",
        "CREATE TABLE t (id int PRIMARY KEY, v int)",
        &[
            "BEGIN; INSERT INTO t VALUES (1, 1); SAVEPOINT a; INSERT INTO t VALUES (2, 2); ROLLBACK TO a; INSERT INTO t VALUES (3, 3); SAVEPOINT b; UPDATE t SET v = 9; RELEASE b; COMMIT",
            "BEGIN; DELETE FROM t; ROLLBACK",
            "INSERT INTO t VALUES (10, 1); INSERT INTO t VALUES (11, 1)",
            "BEGIN; INSERT INTO t VALUES (20, 1); PREPARE TRANSACTION 'transactions one'",
            "COMMIT PREPARED 'transactions one'",
            "BEGIN; INSERT INTO t VALUES (21, 1); PREPARE TRANSACTION 'transactions two'",
            "ROLLBACK PREPARED 'transactions two'",
            "BEGIN ISOLATION LEVEL SERIALIZABLE; UPDATE t SET v = v + 1; COMMIT",
            "SET synchronous_commit = off; UPDATE t SET v = v + 1",
            "DECLARE c CURSOR WITH HOLD FOR SELECT 1; EXPLAIN (ANALYZE) UPDATE t SET v = 0",
        ],
    )
    .await;
    // A transaction that begins before many others and commits after them.
    let mut late = bed.app(Side::Legacy).await;
    let transaction = late.transaction().await.unwrap();
    transaction
        .batch_execute("INSERT INTO t VALUES (500, 1)")
        .await
        .unwrap();
    for id in 501..510 {
        bed.app(Side::Legacy)
            .await
            .batch_execute(&format!("INSERT INTO t VALUES ({id}, 1)"))
            .await
            .unwrap();
        applier.catch_up().await.unwrap();
    }
    transaction.commit().await.unwrap();
    bed.assert_same(&applier).await;
    // A client that runs as a replica is captured too.
    let admin = bed.admin(Side::Legacy).await;
    admin
        .batch_execute("SET session_replication_role = replica; UPDATE t SET v = 77 WHERE id = 500")
        .await
        .unwrap();
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn copy_in_every_form() {
    use futures_util::SinkExt;
    let (bed, applier) = Bed::mirrored("copies", "CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    let client = bed.app(Side::Legacy).await;
    for (options, data) in [
        ("", "1\tone\n2\t\\N\n"),
        ("WITH (FORMAT csv)", "3,\"a,b\"\n4,\n"),
        ("WITH (FORMAT csv, HEADER, NULL 'nil')", "id,v\n5,nil\n"),
    ] {
        let sink = client
            .copy_in::<_, bytes::Bytes>(&format!("COPY t FROM STDIN {options}"))
            .await
            .unwrap();
        futures_util::pin_mut!(sink);
        sink.send(bytes::Bytes::from(data)).await.unwrap();
        sink.finish().await.unwrap();
        bed.assert_same(&applier).await;
    }
    let sink = client.copy_in::<_, bytes::Bytes>("COPY t FROM STDIN").await.unwrap();
    futures_util::pin_mut!(sink);
    sink.send(bytes::Bytes::from("9\tnine\n1\tagain\n")).await.unwrap();
    assert!(sink.finish().await.is_err());
    bed.assert_same(&applier).await;
}

#[tokio::test]
async fn truncate_in_every_place() {
    check(
        "truncates",
        "CREATE TABLE a (id serial PRIMARY KEY, v int); CREATE TABLE b (id serial PRIMARY KEY, a int REFERENCES a)",
        &[
            "INSERT INTO a (v) SELECT generate_series(1, 50); INSERT INTO b (a) SELECT id FROM a",
            "TRUNCATE a, b",
            "INSERT INTO a (v) VALUES (1); INSERT INTO b (a) SELECT id FROM a",
            "BEGIN; INSERT INTO a (v) VALUES (2); TRUNCATE a RESTART IDENTITY CASCADE; INSERT INTO a (v) VALUES (3); UPDATE a SET v = 4; COMMIT",
            "BEGIN; TRUNCATE a CASCADE; ROLLBACK",
            "BEGIN; INSERT INTO a (v) VALUES (5); SAVEPOINT s; TRUNCATE a CASCADE; ROLLBACK TO s; INSERT INTO a (v) VALUES (6); COMMIT",
            "INSERT INTO a (v) SELECT generate_series(1, 300000); INSERT INTO b (a) SELECT max(id) FROM a",
            "TRUNCATE b",
            "TRUNCATE a CASCADE; INSERT INTO a (v) VALUES (9)",
        ],
    )
    .await;
}
