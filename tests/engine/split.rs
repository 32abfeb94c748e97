//! A table split by columns: there, and after the flip back, where the parts' rows become one again.

use std::sync::Arc;

use pgtandem::apply::{self, Applier, ApplierConfig, Order, Seeding};
use pgtandem::control::{Epoch, Side};
use pgtandem::journal::joined::{Joined, JoinedPart};
use pgtandem::transform::{Missing, Part, TableMap, Transform};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio_postgres::Client;

use crate::bed::{Bed, caught_up};
use crate::transform::{
    assert_clean, backfilled, backfilled_between, bed, column, config, flipped, forget_capture, name, part, rows, sql,
    table, unequal, verified,
};

/// An order may have no note; a person without an account is not on legacy; three parts with a key of
/// two columns, and a column computed there and back.
const LEGACY: &str = "
    CREATE TABLE orders (id bigserial PRIMARY KEY, total numeric(10,2), status text NOT NULL DEFAULT 'neu', note text, author varchar(20));
    CREATE TABLE people (id int PRIMARY KEY, name text, login text NOT NULL UNIQUE, rank int);
    CREATE TABLE cells (x int, y int, a text, b text, c numeric(8,2), PRIMARY KEY (x, y));
    CREATE TABLE plain (id int PRIMARY KEY, v text);";
const NEW: &str = "
    CREATE TABLE orders (status text NOT NULL, id bigserial PRIMARY KEY, total numeric(10,2));
    CREATE TABLE order_notes (text text, order_id bigint PRIMARY KEY, author text);
    CREATE TABLE people (id int PRIMARY KEY, name text);
    CREATE TABLE accounts (login text NOT NULL UNIQUE, person int PRIMARY KEY REFERENCES people, rank int);
    CREATE TABLE cells (x int, y int, a text, PRIMARY KEY (x, y));
    CREATE TABLE cell_b (y int, b text, x int, PRIMARY KEY (y, x));
    CREATE TABLE cell_c (x int, y int, cents bigint, UNIQUE (x, y));
    ALTER TABLE cell_c ALTER x SET NOT NULL, ALTER y SET NOT NULL;
    CREATE TABLE plain (id int PRIMARY KEY, v text);";

/// What legacy must have of what new has.
const COMPARED: [(&str, &str); 4] = [
    (
        "SELECT (id, total, status, note, author)::text FROM orders ORDER BY id",
        "SELECT (o.id, total, status, text, author)::text FROM orders o LEFT JOIN order_notes n ON n.order_id = o.id ORDER BY o.id",
    ),
    (
        "SELECT (id, name, login, rank)::text FROM people ORDER BY id",
        "SELECT (id, name, login, rank)::text FROM people JOIN accounts ON person = id ORDER BY id",
    ),
    (
        "SELECT (x, y, a, b, c)::text FROM cells ORDER BY x, y",
        "SELECT (x, y, a, b, round(cents / 100.0, 2))::text FROM cells LEFT JOIN cell_b USING (x, y) JOIN cell_c USING (x, y) ORDER BY x, y",
    ),
    (
        "SELECT (id, v)::text FROM plain ORDER BY id",
        "SELECT (id, v)::text FROM plain ORDER BY id",
    ),
];

fn missing(part: Part, missing: Missing) -> Part {
    Part {
        missing: Some(missing),
        ..part
    }
}

fn split(parts: Vec<Part>, inverse: &[(&str, &str)]) -> TableMap {
    TableMap {
        parts,
        ..table("unused", &[], &[], inverse)
    }
}

fn mapping() -> Transform {
    Transform {
        schemas: Default::default(),
        tables: [
            (
                name("public.orders"),
                split(
                    vec![
                        part("public.orders", &[]),
                        missing(
                            part(
                                "public.order_notes",
                                &[("order_id", column("id")), ("text", column("note"))],
                            ),
                            Missing::Nulls,
                        ),
                    ],
                    &[],
                ),
            ),
            (
                name("public.people"),
                split(
                    vec![
                        part("public.people", &[]),
                        missing(part("public.accounts", &[("person", column("id"))]), Missing::NoRow),
                    ],
                    &[],
                ),
            ),
            (
                name("public.cells"),
                split(
                    vec![
                        part("public.cells", &[]),
                        missing(part("public.cell_b", &[]), Missing::Nulls),
                        missing(
                            part("public.cell_c", &[("cents", sql("(c * 100)::bigint"))]),
                            Missing::NoRow,
                        ),
                    ],
                    &[("c", "cents / 100.0")],
                ),
            ),
        ]
        .into(),
    }
}

async fn assert_joined(bed: &Bed) {
    for (legacy, new) in COMPARED {
        assert_eq!(
            rows(bed, Side::Legacy, legacy).await,
            rows(bed, Side::New, new).await,
            "{legacy}"
        );
    }
}

/// One transaction on some of new's tables: part by part, in any order, some rolled back.
fn on_new(random: &mut StdRng) -> String {
    let mut statements = Vec::new();
    for _ in 0..random.random_range(1..5) {
        let (id, other) = (random.random_range(1..25), random.random_range(1..25));
        let word: u32 = random.random();
        statements.push(match random.random_range(0..20) {
            0 => format!("INSERT INTO orders (id, total, status) VALUES ({id}, {other}, 's') ON CONFLICT (id) DO UPDATE SET total = {word} % 1000"),
            1 => format!("INSERT INTO order_notes VALUES ('t{word}', {id}, 'a') ON CONFLICT (order_id) DO UPDATE SET text = order_notes.text || '!'"),
            2 => format!("UPDATE orders SET total = total + 1 WHERE id = {id}; UPDATE orders SET status = status || 'x' WHERE id = {id} AND length(status) < 9"),
            3 => format!("UPDATE order_notes SET author = 'w{}' WHERE order_id % 5 = {}", word % 1000, id % 5),
            4 => format!("DELETE FROM orders WHERE id = {id}"),
            5 => format!("DELETE FROM order_notes WHERE order_id = {id}"),
            6 => format!("UPDATE orders SET id = {other} WHERE id = {id} AND NOT EXISTS (SELECT FROM orders WHERE id = {other})"),
            7 => format!("UPDATE order_notes SET order_id = {other} WHERE order_id = {id} AND NOT EXISTS (SELECT FROM order_notes WHERE order_id = {other})"),
            8 => format!("DELETE FROM orders WHERE id = {id}; INSERT INTO orders (id, status) VALUES ({id}, 'again')"),
            9 => format!("INSERT INTO people VALUES ({id}, 'n') ON CONFLICT (id) DO UPDATE SET name = people.name || 'm'"),
            10 => format!("INSERT INTO people VALUES ({id}, 'p') ON CONFLICT (id) DO NOTHING; INSERT INTO accounts VALUES ('l{word}', {id}, {other}) ON CONFLICT DO NOTHING"),
            11 => format!("DELETE FROM accounts WHERE person = {id}"),
            12 => format!("UPDATE accounts SET login = 'c{word}', rank = rank + 1 WHERE person = {id}"),
            13 => format!("DELETE FROM accounts WHERE person = {id}; DELETE FROM people WHERE id = {id}"),
            14 => format!("INSERT INTO cells VALUES ({}, {}, 'a') ON CONFLICT (x, y) DO UPDATE SET a = 'b{word}'", id % 4, other % 4),
            15 => format!("INSERT INTO cell_b VALUES ({}, 'b', {}) ON CONFLICT (y, x) DO UPDATE SET b = 'c{word}'", id % 4, other % 4),
            16 => format!("INSERT INTO cell_c VALUES ({}, {}, {word} % 10000) ON CONFLICT (x, y) DO UPDATE SET cents = cell_c.cents + 1", id % 4, other % 4),
            17 => format!("DELETE FROM cell_{} WHERE x = {} AND y = {}", ["b", "c"][word as usize % 2], id % 4, other % 4),
            18 => format!("SAVEPOINT s; DELETE FROM order_notes; UPDATE cells SET a = 'never'; ROLLBACK TO s; UPDATE cells SET a = a || 'z' WHERE x = {}", id % 4),
            _ => format!("INSERT INTO plain VALUES ({id}, 'v') ON CONFLICT (id) DO UPDATE SET v = 'w{word}'"),
        });
    }
    let end = if random.random_range(0..6) == 0 {
        "ROLLBACK"
    } else {
        "COMMIT"
    };
    format!("BEGIN; {}; {end}", statements.join("; "))
}

/// Several clients at once; what deadlocks or collides is rolled back.
async fn storm(bed: &Bed, seed: u64, transactions: usize) {
    let clients = (0..5).map(|worker| async move {
        let mut random = StdRng::seed_from_u64(seed * 100 + worker);
        let client = bed.app(Side::New).await;
        let mut committed = 0;
        for _ in 0..transactions {
            match client.batch_execute(&on_new(&mut random)).await {
                Ok(()) => committed += 1,
                Err(_) => client.batch_execute("ROLLBACK").await.unwrap(),
            }
        }
        committed
    });
    let committed: usize = futures_util::future::join_all(clients).await.into_iter().sum();
    assert!(committed > transactions, "the storm is a breeze: {committed}");
}

/// Legacy is primary and has rows; new was filled by a backfill.
async fn seeded(database: &str) -> (Bed, Arc<Transform>, Arc<Applier>) {
    let (bed, transform) = bed(database, LEGACY, NEW, mapping()).await;
    bed.app(Side::Legacy)
        .await
        .batch_execute(
            "INSERT INTO orders (total, note, author) SELECT g, CASE WHEN g % 3 > 0 THEN 'n' || g END, CASE WHEN g % 4 > 0 THEN 'a' END FROM generate_series(1, 40) g;
             INSERT INTO people SELECT g, 'p' || g, 'l' || g, g FROM generate_series(1, 30) g;
             INSERT INTO cells SELECT g / 4, g % 4, 'a', CASE WHEN g % 2 = 0 THEN 'b' END, g / 4.0 FROM generate_series(0, 15) g;
             INSERT INTO plain SELECT g, 'v' FROM generate_series(1, 20) g",
        )
        .await
        .unwrap();
    forget_capture(&bed).await;
    let applier = Arc::new(apply::spawn(config(&bed, &transform)));
    caught_up(&applier).await;
    backfilled(&bed, &applier).await;
    assert_clean(&applier).await;
    assert_joined(&bed).await;
    assert_eq!(
        rows(&bed, Side::New, "SELECT count(*)::text FROM order_notes").await,
        rows(
            &bed,
            Side::Legacy,
            "SELECT count(*)::text FROM orders WHERE num_nonnulls(note, author) > 0"
        )
        .await,
    );
    (bed, transform, applier)
}

fn seeding(applier: &Applier) -> Vec<(String, Seeding)> {
    let status = applier.status().borrow().clone();
    let mut tables: Vec<_> = status
        .tables
        .into_iter()
        .map(|table| (table.name, table.seeding))
        .collect();
    tables.sort_by(|one, other| one.0.cmp(&other.0));
    tables
}

#[tokio::test]
async fn a_split_table_there_and_back() {
    let (bed, transform, applier) = seeded("split_back").await;
    assert_eq!(applier.status().borrow().one_way, [] as [String; 0]);
    let legacy = bed.app(Side::Legacy).await;
    legacy
        .batch_execute(
            "UPDATE orders SET note = NULL, author = NULL WHERE id % 5 = 0; UPDATE orders SET note = 'late' WHERE id % 5 = 1;
             UPDATE orders SET id = id + 100 WHERE id < 5; DELETE FROM people WHERE id % 7 = 0; UPDATE cells SET b = 'B', c = c + 1 WHERE x = 2",
        )
        .await
        .unwrap();
    assert_clean(&applier).await;
    assert_joined(&bed).await;

    let epoch = Epoch(2);
    let applier = flipped(&bed, &transform, &applier, Side::New, epoch).await;
    // What is carried over as it is needs no second look.
    assert_eq!(
        seeding(&applier),
        [
            ("cells".to_owned(), Seeding::Unseeded),
            ("orders".to_owned(), Seeding::Synced),
            ("people".to_owned(), Seeding::Synced),
            ("plain".to_owned(), Seeding::Synced)
        ]
    );
    let report = verified(&bed, &applier, Side::New, epoch, false).await;
    assert!(report.equal, "{:?} {:?}", unequal(&report), report.sequences);
    for seed in 1..4 {
        storm(&bed, seed, 60).await;
        assert_clean(&applier).await;
        assert_joined(&bed).await;
    }
    let client = bed.app(Side::New).await;
    for statement in ["TRUNCATE orders", "TRUNCATE order_notes", "TRUNCATE plain, accounts"] {
        let refused = client.batch_execute(statement).await.unwrap_err();
        assert_eq!(refused.code().unwrap().code(), "0A000", "{statement}");
        assert!(
            refused.as_db_error().unwrap().message().contains("a part of public."),
            "{refused:?}"
        );
    }
    // What goes through the servers, with parts in other pieces of the same backlog.
    client
        .batch_execute(
            "INSERT INTO orders (id, status, total) SELECT g, 'large', g FROM generate_series(1000, 12000) g;
             INSERT INTO order_notes SELECT 'large ' || g, g, 'x' FROM generate_series(1000, 12000) g WHERE g % 2 = 0;
             UPDATE order_notes SET text = text || '?' WHERE order_id > 6000; UPDATE orders SET total = 0 WHERE id % 3 = 0;
             DELETE FROM order_notes WHERE order_id % 10 = 0; UPDATE orders SET id = -id WHERE id > 11000",
        )
        .await
        .unwrap();
    assert_clean(&applier).await;
    assert_joined(&bed).await;

    // What is planted on legacy is found and mended.
    bed.proxy(Side::Legacy)
        .await
        .batch_execute(
            "SET session_replication_role = replica; UPDATE orders SET note = 'planted' WHERE id = 1002; DELETE FROM orders WHERE id = 1003;
             INSERT INTO people VALUES (-1, 'x', 'planted', 1)",
        )
        .await
        .unwrap();
    let report = verified(&bed, &applier, Side::New, epoch, false).await;
    assert_eq!(
        unequal(&report),
        [("public.orders".to_owned(), 2), ("public.people".to_owned(), 1)]
    );
    let report = verified(&bed, &applier, Side::New, epoch, true).await;
    assert!(report.equal, "{:?}", unequal(&report));
    assert_joined(&bed).await;

    // Rows come over anew as well.
    let order = pgtandem::reconcile::backfill::Order {
        tables: vec!["public.orders".into()],
        ..Default::default()
    };
    bed.proxy(Side::Legacy)
        .await
        .batch_execute("UPDATE pgtandem.seeding SET state = 'unseeded' WHERE name = 'orders'")
        .await
        .unwrap();
    applier.stop().await;
    let applier = Arc::new(apply::spawn(ApplierConfig {
        transform: transform.clone(),
        ..bed.config_towards(Side::Legacy, epoch)
    }));
    caught_up(&applier).await;
    bed.proxy(Side::Legacy)
        .await
        .batch_execute("SET session_replication_role = replica; UPDATE orders SET note = 'stale' WHERE id < 5; DELETE FROM orders WHERE id > 9000")
        .await
        .unwrap();
    backfilled_between(&bed.sides(Side::New, epoch, &applier), &order).await;
    assert_clean(&applier).await;
    assert_joined(&bed).await;

    // And back: what only new had is told, not taken.
    let alone: Vec<String> = rows(
        &bed,
        Side::New,
        "SELECT (SELECT count(*) FROM order_notes WHERE order_id NOT IN (SELECT id FROM orders))
              + (SELECT count(*) FROM order_notes WHERE num_nonnulls(text, author) = 0 AND order_id IN (SELECT id FROM orders)) || ' '
              || (SELECT count(*) FROM people WHERE id NOT IN (SELECT person FROM accounts))",
    )
    .await;
    let [notes, people] = alone[0]
        .split(' ')
        .map(|count| count.parse::<u64>().unwrap())
        .collect::<Vec<_>>()[..]
    else {
        panic!("{alone:?}")
    };
    assert!(notes > 0 && people > 0, "{alone:?}");
    let epoch = Epoch(3);
    let applier = flipped(&bed, &transform, &applier, Side::Legacy, epoch).await;
    let report = verified(&bed, &applier, Side::Legacy, epoch, false).await;
    let differing = unequal(&report);
    assert!(
        differing.contains(&("public.order_notes".to_owned(), notes)),
        "{differing:?} {alone:?}"
    );
    assert!(
        differing.contains(&("public.people".to_owned(), people)),
        "{differing:?} {alone:?}"
    );
    let report = verified(&bed, &applier, Side::Legacy, epoch, true).await;
    assert!(report.equal, "{:?}", unequal(&report));
    legacy
        .batch_execute("UPDATE orders SET note = NULL WHERE id % 2 = 0; UPDATE orders SET author = 'back' WHERE id % 3 = 0; TRUNCATE cells; INSERT INTO cells VALUES (1, 1, 'a', 'b', 3)")
        .await
        .unwrap();
    assert_clean(&applier).await;
    assert_joined(&bed).await;
}

#[tokio::test]
async fn what_legacy_refuses_of_a_part_is_held_with_what_follows() {
    let (bed, transform, applier) = seeded("split_held").await;
    let applier = flipped(&bed, &transform, &applier, Side::New, Epoch(2)).await;
    let client = bed.app(Side::New).await;
    bed.admin(Side::Legacy)
        .await
        .batch_execute("ALTER TABLE orders ADD CONSTRAINT brief CHECK (length(author) < 10)")
        .await
        .unwrap();
    for statement in [
        "UPDATE order_notes SET author = repeat('long', 4) WHERE order_id = 1",
        "UPDATE orders SET total = 777 WHERE id = 1",
        "UPDATE orders SET total = 888 WHERE id = 2",
    ] {
        client.batch_execute(statement).await.unwrap();
    }
    caught_up(&applier).await;
    let held = applier.status().borrow().quarantine.clone();
    assert_eq!((held.transactions, held.refused), (2, 1), "{held:?}");
    assert_eq!(
        rows(
            &bed,
            Side::Legacy,
            "SELECT (id, total, author)::text FROM orders WHERE id < 3 ORDER BY id"
        )
        .await,
        ["(1,1.00,a)", "(2,888.00,a)"]
    );
    for statement in [
        "UPDATE order_notes SET author = 'short' WHERE order_id = 1",
        "DELETE FROM order_notes WHERE order_id = 2",
    ] {
        client.batch_execute(statement).await.unwrap();
    }
    caught_up(&applier).await;
    let held = applier.status().borrow().quarantine.clone();
    assert_eq!((held.transactions, held.refused), (3, 1), "{held:?}");
    assert_eq!(
        rows(&bed, Side::Legacy, "SELECT (id, note)::text FROM orders WHERE id = 2").await,
        ["(2,)"]
    );
    bed.admin(Side::Legacy)
        .await
        .batch_execute("ALTER TABLE orders DROP CONSTRAINT brief")
        .await
        .unwrap();
    let order = Order::Retry {
        id: None,
        actor: "tester".into(),
    };
    let outcome = applier.order(order).await.unwrap();
    assert_eq!(outcome.done.len(), 3, "{outcome:?}");
    caught_up(&applier).await;
    assert_joined(&bed).await;
    assert_eq!(applier.status().borrow().quarantine.transactions, 0);
    // Others go on while something is held.
    bed.admin(Side::Legacy)
        .await
        .batch_execute("ALTER TABLE orders ADD CONSTRAINT brief CHECK (length(author) < 10)")
        .await
        .unwrap();
    client
        .batch_execute("UPDATE order_notes SET author = repeat('long', 4) WHERE order_id = 4")
        .await
        .unwrap();
    client
        .batch_execute(
            "INSERT INTO orders (id, status) SELECT g, 'large' FROM generate_series(1000, 1500) g; UPDATE orders SET total = 5 WHERE id = 5",
        )
        .await
        .unwrap();
    client
        .batch_execute("UPDATE orders SET total = 4 WHERE id = 4")
        .await
        .unwrap();
    caught_up(&applier).await;
    let held = applier.status().borrow().quarantine.clone();
    assert_eq!((held.transactions, held.refused), (2, 1), "{held:?}");
    assert_eq!(
        rows(&bed, Side::Legacy, "SELECT count(*) || ' ' || max(total) FILTER (WHERE id = 5) || ' ' || COALESCE(max(author) FILTER (WHERE id = 4), '') FROM orders").await,
        rows(&bed, Side::New, "SELECT count(*) || ' 5.00 ' FROM orders").await,
    );
    let report = verified(&bed, &applier, Side::New, Epoch(2), false).await;
    assert_eq!(unequal(&report), [("public.orders".to_owned(), 1)]);
}

/// The SQL that puts a window of changes together, against what the parts' rows are before and after
/// it; and that this would notice if the missing halves were taken as they are now.
#[tokio::test]
async fn changes_of_parts_are_a_chain_of_changes_of_the_whole() {
    let bed = Bed::new("split_chain", "").await;
    let client = bed.admin(Side::New).await;
    client
        .batch_execute(
            "CREATE TABLE a (k int PRIMARY KEY, v text); CREATE TABLE b (k int PRIMARY KEY, w text);
             CREATE FUNCTION whole(text, text) RETURNS text LANGUAGE sql AS $$ SELECT $1 || '+' || COALESCE($2, '-') $$;
             CREATE TABLE changes (pos pg_lsn, xid xid8, rel oid, op \"char\", old text, new text, place pg_lsn, inside bool, beyond bool DEFAULT false);
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 INSERT INTO changes SELECT pg_current_wal_insert_lsn(), pg_current_xact_id(), TG_RELID, 'R', OLD::text, NEW::text; RETURN NULL; END $$;
             CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON a FOR EACH ROW EXECUTE FUNCTION note();
             CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON b FOR EACH ROW EXECUTE FUNCTION note();
             CREATE TABLE states (after xid8, whole text);",
        )
        .await
        .unwrap();
    let oid = async |table: &str| -> u32 {
        let row = client
            .query_one(&format!("SELECT '{table}'::regclass::oid"), &[])
            .await
            .unwrap();
        row.get(0)
    };
    let part = async |table: &str| JoinedPart {
        rel: oid(table).await,
        relation: table.into(),
        key: vec!["k".into()],
    };
    let joined = Joined {
        rel: 7,
        function: "whole".into(),
        parts: vec![part("a").await, part("b").await],
    };
    let right = joined.sql("changes");
    let since = "UNION ALL SELECT i.part";
    let wrong = {
        // Without what came since: the halves as they are at the end.
        let (before, after) = right.split_once(since).unwrap();
        let (_, after) = after.split_once(") s").unwrap();
        format!("{before}) s{after}")
    };

    let mut random = StdRng::seed_from_u64(11);
    let state = "INSERT INTO states SELECT pg_current_xact_id(), whole(a::text, b::text) FROM a LEFT JOIN b USING (k)";
    for _ in 0..150 {
        let mut text = String::from("BEGIN; ");
        for _ in 0..random.random_range(1..4) {
            let (id, other, word) = (
                random.random_range(1..6),
                random.random_range(1..6),
                random.random_range(0..9),
            );
            let table = ["a", "b"][random.random_range(0..2)];
            let column = if table == "a" { "v" } else { "w" };
            text.push_str(&match random.random_range(0..4) {
                0 => format!("DELETE FROM {table} WHERE k = {id}; "),
                1 => format!("UPDATE {table} SET k = {other} WHERE k = {id} AND NOT EXISTS (SELECT FROM {table} WHERE k = {other}); "),
                _ => format!("INSERT INTO {table} VALUES ({id}, '{word}') ON CONFLICT (k) DO UPDATE SET {column} = {table}.{column} || '{word}'; "),
            });
        }
        client.batch_execute(&format!("{text}{state}; COMMIT")).await.unwrap();
    }
    client
        .batch_execute("UPDATE changes c SET place = t.top FROM (SELECT xid, max(pos) AS top FROM changes GROUP BY xid) t WHERE t.xid = c.xid")
        .await
        .unwrap();
    let xids: Vec<String> = rows_of(&client, "SELECT xid::text FROM changes GROUP BY xid ORDER BY xid").await;
    let (mut chained, mut halved) = (0, 0);
    for (from, to) in [(0, xids.len()), (10, 40), (100, xids.len() - 1), (60, 61)] {
        // The window is all after the first; applied is what lies up to the second.
        let (since, last) = (&xids[from], &xids[to - 1]);
        client
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS window_changes; CREATE TABLE window_changes AS SELECT * FROM changes WHERE xid > '{since}'::xid8;
                 UPDATE window_changes SET inside = xid <= '{last}'::xid8"
            ))
            .await
            .unwrap();
        for upto in &xids[from..to] {
            for (sql, broken) in [(&right, &mut chained), (&wrong, &mut halved)] {
                *broken += breaks(&client, &sql.replace("changes c", "window_changes c"), since, upto).await;
            }
        }
    }
    assert_eq!(chained, 0);
    assert!(halved > 100, "halves of now went unnoticed: {halved}");
}

/// How many rows the state after `upto` is off, made of the one after `since` and the changes.
async fn breaks(client: &Client, sql: &str, since: &str, upto: &str) -> i64 {
    let row = client
        .query_one(
            &format!(
                "SELECT COALESCE(sum(abs(n)), 0)::bigint FROM (
                   SELECT whole, sum(n) AS n FROM (
                     SELECT whole, 1 AS n FROM states WHERE after = '{since}'::xid8
                     UNION ALL SELECT old, -1 FROM {sql} j WHERE old IS NOT NULL AND xid <= '{upto}'::xid8
                     UNION ALL SELECT new, 1 FROM {sql} j WHERE new IS NOT NULL AND xid <= '{upto}'::xid8
                     UNION ALL SELECT whole, -1 FROM states WHERE after = '{upto}'::xid8) s
                    GROUP BY whole) s"
            ),
            &[],
        )
        .await
        .unwrap();
    row.get(0)
}

async fn rows_of(client: &Client, sql: &str) -> Vec<String> {
    let rows = client.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}
