//! Schemas that differ: every transform, there and back.

use std::sync::Arc;
use std::time::Duration;

use pgtandem::apply::{self, Applier, ApplierConfig, ApplierState, ApplierStatus, Seeding, begin_direction};
use pgtandem::catalog::PINNED_SETTINGS;
use pgtandem::config::{Backfill, StrayWriters, Writes};
use pgtandem::control::{Epoch, Side};
use pgtandem::journal::{SideRole, SideState, fence};
use pgtandem::reconcile::backfill::{Desk, Order};
use pgtandem::reconcile::report::{DatabaseReport, TableResult};
use pgtandem::reconcile::{Chosen, Options, Sides, repair, verify};
use pgtandem::transform::check::examine;
use pgtandem::transform::{Name, Origin, Part, TableMap, Transform};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;

use crate::bed::{Bed, caught_up, until};
use crate::ddl::{ddl, try_ddl};

/// Of both sides: what legacy calls otherwise, and new's own.
const LEGACY: &str = "
    CREATE TABLE kunden (kdnr serial PRIMARY KEY, name varchar(40) NOT NULL, preis numeric(10,2), status text NOT NULL DEFAULT 'neu', fax text);
    CREATE TABLE same (id int PRIMARY KEY, v text);
    CREATE TABLE bag (a int, b text);
    CREATE SCHEMA sales;
    CREATE TABLE sales.orders (id bigint PRIMARY KEY, v text, at timestamptz DEFAULT '2024-01-02 03:04:05+00');
    CREATE SEQUENCE sales.counter;";
const NEW: &str = "
    CREATE TYPE state AS ENUM ('neu', 'alt', 'weg');
    CREATE TABLE customers (country char(2) NOT NULL, cents bigint, id bigserial PRIMARY KEY, full_name text NOT NULL, state state NOT NULL,
                            loud text);
    CREATE TABLE same (id int PRIMARY KEY, v text);
    CREATE TABLE tuples (b text, first int);
    CREATE SCHEMA crm;
    CREATE TABLE crm.orders (id bigint PRIMARY KEY, v text, at timestamptz DEFAULT '2024-01-02 03:04:05+00');
    CREATE SEQUENCE crm.counter;";

pub(crate) fn column(name: &str) -> Origin {
    Origin::Column(name.into())
}

pub(crate) fn sql(text: &str) -> Origin {
    Origin::Sql(text.into())
}

pub(crate) fn table(to: &str, columns: &[(&str, Origin)], drop: &[&str], inverse: &[(&str, &str)]) -> TableMap {
    TableMap {
        parts: vec![part(to, columns)],
        drop: drop.iter().map(|&name| name.to_owned()).collect(),
        inverse: inverse
            .iter()
            .map(|&(name, sql)| (name.to_owned(), sql.to_owned()))
            .collect(),
    }
}

pub(crate) fn part(to: &str, columns: &[(&str, Origin)]) -> Part {
    Part {
        to: to.parse().unwrap(),
        columns: columns
            .iter()
            .map(|(name, origin)| ((*name).to_owned(), origin.clone()))
            .collect(),
        missing: None,
    }
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// Renamed tables, columns and schema; a column dropped, one added as a constant and one as an
/// expression; types changed with and without an expression; a table without a key.
fn mapping() -> Transform {
    Transform {
        schemas: [("sales".to_owned(), "crm".to_owned())].into(),
        tables: [
            (
                name("public.kunden"),
                table(
                    "public.customers",
                    &[
                        ("id", column("kdnr")),
                        ("full_name", column("name")),
                        ("cents", sql("(preis * 100)::bigint")),
                        ("state", column("status")),
                        ("country", sql("'DE'")),
                        ("loud", sql("upper(kunden.name)")),
                    ],
                    &["fax"],
                    &[("preis", "cents / 100.0"), ("fax", "NULL")],
                ),
            ),
            (
                name("public.bag"),
                table("public.tuples", &[("first", column("a"))], &[], &[]),
            ),
        ]
        .into(),
    }
}

/// Different schemas on the two sides, mirrored by a mapping.
pub(crate) async fn bed(database: &str, legacy: &str, new: &str, transform: Transform) -> (Bed, Arc<Transform>) {
    let bed = Bed::new(database, "").await;
    bed.app(Side::Legacy).await.batch_execute(legacy).await.unwrap();
    bed.app(Side::New).await.batch_execute(new).await.unwrap();
    bed.install().await;
    (bed, Arc::new(transform))
}

pub(crate) fn config(bed: &Bed, transform: &Arc<Transform>) -> ApplierConfig {
    ApplierConfig {
        transform: transform.clone(),
        ..bed.config()
    }
}

/// Both sides' rows by the same queries, `None` for a column that only one has.
pub(crate) async fn rows(bed: &Bed, side: Side, query: &str) -> Vec<String> {
    let rows = bed.admin(side).await.query(query, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn assert_mapped(bed: &Bed) {
    for (legacy, new) in [
        (
            "SELECT (kdnr, name, (preis * 100)::bigint, status, 'DE', upper(name))::text FROM kunden ORDER BY kdnr",
            "SELECT (id, full_name, cents, state, country, loud)::text FROM customers ORDER BY id",
        ),
        (
            "SELECT (id, v)::text FROM same ORDER BY id",
            "SELECT (id, v)::text FROM same ORDER BY id",
        ),
        (
            "SELECT (a, b)::text FROM bag ORDER BY 1",
            "SELECT (first, b)::text FROM tuples ORDER BY 1",
        ),
        (
            "SELECT (id, v, at)::text FROM sales.orders ORDER BY id",
            "SELECT (id, v, at)::text FROM crm.orders ORDER BY id",
        ),
    ] {
        assert_eq!(
            rows(bed, Side::Legacy, legacy).await,
            rows(bed, Side::New, new).await,
            "{legacy}"
        );
    }
}

/// Inserts, updates, deletes, key changes, COPY and TRUNCATE on legacy, by a seed.
async fn storm_on_legacy(bed: &Bed, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let client = bed.app(Side::Legacy).await;
    for turn in 0..120 {
        let id = random.random_range(1..60);
        let statement = match random.random_range(0..11) {
            0 | 1 => format!("INSERT INTO kunden (name, preis, fax) VALUES ('n\"{turn},', {id}.25, '{turn}')"),
            2 => format!(
                "UPDATE kunden SET name = name || 'ß', preis = preis * 1.5 WHERE kdnr % 7 = {}",
                id % 7
            ),
            3 => format!("UPDATE kunden SET fax = '{turn}', status = 'alt' WHERE kdnr = {id}"),
            4 => format!("DELETE FROM kunden WHERE kdnr = {id}"),
            5 => format!("UPDATE kunden SET kdnr = kdnr + 100000 WHERE kdnr = {id}"),
            6 => format!(
                "INSERT INTO sales.orders VALUES ({turn}, 'o') ON CONFLICT (id) DO UPDATE SET v = orders.v || 'x'"
            ),
            7 => format!(
                "INSERT INTO bag SELECT {id} % 5, 'b' FROM generate_series(1, 3); DELETE FROM bag WHERE ctid = (SELECT min(ctid) FROM bag)"
            ),
            8 => format!(
                "BEGIN; SAVEPOINT a; DELETE FROM sales.orders; ROLLBACK TO a; UPDATE sales.orders SET id = -id WHERE id = {id}; COMMIT"
            ),
            9 if turn % 40 == 9 => "TRUNCATE kunden, bag".into(),
            9 => format!("INSERT INTO same VALUES ({turn}, NULL) ON CONFLICT DO NOTHING"),
            _ => format!(
                "COPY (SELECT 1) TO STDOUT; INSERT INTO kunden (name) SELECT 'many' || g FROM generate_series(1, {id}) g"
            ),
        };
        client
            .batch_execute(&statement.replace("COPY (SELECT 1) TO STDOUT; ", ""))
            .await
            .unwrap();
    }
    let copy = client
        .copy_in::<_, bytes::Bytes>("COPY kunden (name, preis) FROM STDIN")
        .await
        .unwrap();
    futures_util::pin_mut!(copy);
    futures_util::SinkExt::send(&mut copy, bytes::Bytes::from_static(b"copied\t1.10\nc\\\\d\t\\N\n"))
        .await
        .unwrap();
    copy.finish().await.unwrap();
}

pub(crate) async fn assert_clean(applier: &Applier) {
    caught_up(applier).await;
    let status = applier.status().borrow().clone();
    assert_eq!((status.diverged, status.quarantine.transactions), (0, 0), "{status:#?}");
    for table in &status.tables {
        assert_eq!((table.seeding, &table.paused), (Seeding::Synced, &None), "{table:?}");
    }
}

#[tokio::test]
async fn writes_arrive_in_the_other_shape() {
    let (bed, transform) = bed("transform_writes", LEGACY, NEW, mapping()).await;
    let applier = apply::spawn(config(&bed, &transform));
    caught_up(&applier).await;
    for seed in [1, 2] {
        storm_on_legacy(&bed, seed).await;
        assert_clean(&applier).await;
        assert_mapped(&bed).await;
    }
}

/// Verifies everything, and mends it where `mended`.
pub(crate) async fn verified(
    bed: &Bed,
    applier: &Arc<Applier>,
    primary: Side,
    epoch: Epoch,
    mended: bool,
) -> DatabaseReport {
    let sides = bed.sides(primary, epoch, applier);
    let options = Options {
        range_rows: 100,
        ..Options::of(Chosen::All)
    };
    let (sender, mut heard) = mpsc::channel(16);
    let run = async {
        let sender = sender;
        if mended {
            repair(&sides, &options, "test", &sender).await
        } else {
            verify(&sides, &options, &sender).await
        }
    };
    let (report, ()) = tokio::join!(run, async { while heard.recv().await.is_some() {} });
    report.unwrap()
}

pub(crate) fn unequal(report: &DatabaseReport) -> Vec<(String, u64)> {
    let tables = report.tables.iter().filter(|table| table.result != TableResult::Equal);
    tables
        .inspect(|table| tracing::info!(table = table.qualified(), note = table.note, "not equal"))
        .map(|table| (table.qualified(), table.differing.total()))
        .collect()
}

pub(crate) async fn backfilled(bed: &Bed, applier: &Arc<Applier>) {
    backfilled_between(&bed.sides(Side::Legacy, Epoch::FIRST, applier), &Order::default()).await;
}

pub(crate) async fn backfilled_between(sides: &Sides, order: &Order) {
    let desk = Desk::new(Backfill::default());
    desk.start(sides, order).await.unwrap();
    let mut status = desk.watch();
    let done = status
        .wait_for(|status| status.as_ref().is_some_and(|status| status.state != "running"))
        .await
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!(done.state, "done", "{done:#?}");
}

/// Turns the roles, as the switchover does, and mirrors the other way.
pub(crate) async fn flipped(
    bed: &Bed,
    transform: &Arc<Transform>,
    applier: &Applier,
    to: Side,
    epoch: Epoch,
) -> Arc<Applier> {
    let (mut old, mut new) = (bed.proxy(to.other()).await, bed.proxy(to).await);
    let raised = fence(&mut old, Duration::from_secs(5)).await.unwrap();
    applier.catch_up().await.unwrap();
    applier.stop().await;
    let mut writer = bed.proxy(to.other()).await;
    begin_direction(&new, &mut writer, to, epoch).await.unwrap();
    let turned = |role| SideState { epoch, role };
    raised.turn(turned(SideRole::from(StrayWriters::Refuse))).await.unwrap();
    let raised = fence(&mut new, Duration::from_secs(5)).await.unwrap();
    raised.turn(turned(SideRole::Primary)).await.unwrap();
    let applier = apply::spawn(ApplierConfig {
        transform: transform.clone(),
        ..bed.config_towards(to.other(), epoch)
    });
    caught_up(&applier).await;
    Arc::new(applier)
}

/// As if what legacy holds had been there before capture began.
pub(crate) async fn forget_capture(bed: &Bed) {
    bed.admin(Side::Legacy)
        .await
        .batch_execute("TRUNCATE pgtandem.change_0; UPDATE pgtandem.captured SET was_empty = false")
        .await
        .unwrap();
}

#[tokio::test]
async fn there_and_back() {
    let (bed, transform) = bed("transform_back", LEGACY, NEW, mapping()).await;
    storm_on_legacy(&bed, 3).await;
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO kunden (name, preis, fax) SELECT 'old ' || g, g / 4.0, 'f' FROM generate_series(1, 3000) g; INSERT INTO sales.orders SELECT g FROM generate_series(1000, 3000) g")
        .await
        .unwrap();
    forget_capture(&bed).await;
    let applier = Arc::new(apply::spawn(config(&bed, &transform)));
    caught_up(&applier).await;

    // Existing rows come over while others are written.
    let (_, ()) = tokio::join!(backfilled(&bed, &applier), storm_on_legacy(&bed, 4));
    assert_clean(&applier).await;
    assert_mapped(&bed).await;
    let report = verified(&bed, &applier, Side::Legacy, Epoch::FIRST, false).await;
    assert!(report.equal, "{:?} {:?}", unequal(&report), report.sequences);

    // A transaction that goes through the servers.
    bed.app(Side::Legacy)
        .await
        .batch_execute("UPDATE kunden SET name = name || '!'; INSERT INTO kunden (name, preis) SELECT 'large', g FROM generate_series(1, 11000) g; SELECT setval('sales.counter', 77)")
        .await
        .unwrap();
    assert_clean(&applier).await;
    assert_mapped(&bed).await;

    // What is planted on new is found and mended.
    let stray = bed.proxy(Side::New).await;
    stray
        .batch_execute(
            "SET session_replication_role = replica;
             DELETE FROM customers WHERE id = (SELECT min(id) FROM customers);
             UPDATE customers SET country = 'FR' WHERE id = (SELECT max(id) FROM customers);
             INSERT INTO customers (country, id, full_name, state) VALUES ('XX', -5, 'nobody', 'weg');
             INSERT INTO tuples VALUES ('planted', 1)",
        )
        .await
        .unwrap();
    let report = verified(&bed, &applier, Side::Legacy, Epoch::FIRST, false).await;
    assert_eq!(
        unequal(&report),
        [("public.customers".to_owned(), 3), ("public.tuples".to_owned(), 1)]
    );
    let report = verified(&bed, &applier, Side::Legacy, Epoch::FIRST, true).await;
    assert!(report.equal, "{:?}", unequal(&report));
    assert_mapped(&bed).await;
    caught_up(&applier).await;

    // New is primary; what is written there arrives in legacy's shape.
    let epoch = Epoch(2);
    let applier = flipped(&bed, &transform, &applier, Side::New, epoch).await;
    let report = verified(&bed, &applier, Side::New, epoch, false).await;
    // What was dropped is not on new: legacy's old values are not what the inverse gives.
    let (fax, kunden): (i64, i64) = {
        let row = bed
            .admin(Side::Legacy)
            .await
            .query_one("SELECT count(fax), count(*) FROM kunden", &[])
            .await
            .unwrap();
        (row.get(0), row.get(1))
    };
    assert!(fax > 0 && kunden > fax, "{fax} of {kunden}");
    assert_eq!(unequal(&report), [("public.kunden".to_owned(), fax as u64)]);
    let report = verified(&bed, &applier, Side::New, epoch, true).await;
    assert!(report.equal, "{:?} {:?}", unequal(&report), report.sequences);
    let client = bed.app(Side::New).await;
    client
        .batch_execute(
            "INSERT INTO customers (country, cents, full_name, state, loud) VALUES ('DE', 199, 'fresh', 'alt', 'FRESH'), ('DE', NULL, 'none', 'neu', 'NONE');
             UPDATE customers SET cents = cents + 1, full_name = full_name || '?', loud = upper(full_name || '?') WHERE id % 5 = 0;
             UPDATE customers SET id = -id WHERE id % 11 = 0; DELETE FROM customers WHERE id % 13 = 0;
             INSERT INTO tuples VALUES ('back', 3), ('back', 3); DELETE FROM tuples WHERE first = 2;
             INSERT INTO crm.orders VALUES (900000, 'new'); UPDATE crm.orders SET v = 'upd' WHERE id % 2 = 0; SELECT setval('crm.counter', 99);
             INSERT INTO same VALUES (70000, 'same')",
        )
        .await
        .unwrap();
    caught_up(&applier).await;
    assert_mapped(&bed).await;
    let report = verified(&bed, &applier, Side::New, epoch, false).await;
    assert!(report.equal, "{:?} {:?}", unequal(&report), report.sequences);
    assert_eq!(
        rows(
            &bed,
            Side::Legacy,
            "SELECT (name, preis, fax)::text FROM kunden WHERE name LIKE 'fresh%'"
        )
        .await,
        ["(fresh,1.99,)"]
    );
    assert_eq!(
        rows(&bed, Side::Legacy, "SELECT last_value::text FROM sales.counter").await,
        ["99"]
    );
    let status = applier.status().borrow().clone();
    assert_eq!((status.diverged, status.quarantine.transactions), (0, 0), "{status:#?}");

    // And back again.
    let epoch = Epoch(3);
    let applier = flipped(&bed, &transform, &applier, Side::Legacy, epoch).await;
    let report = verified(&bed, &applier, Side::Legacy, epoch, false).await;
    assert!(report.equal, "{:?}", unequal(&report));
    storm_on_legacy(&bed, 5).await;
    assert_clean(&applier).await;
    assert_mapped(&bed).await;
}

/// A table becomes two, each with the key.
#[tokio::test]
async fn a_table_is_split() {
    let transform = Transform {
        schemas: Default::default(),
        tables: [(
            name("public.orders"),
            TableMap {
                parts: vec![
                    part("public.orders", &[]),
                    part(
                        "public.order_notes",
                        &[("order_id", column("id")), ("text", column("note"))],
                    ),
                ],
                ..table("unused", &[], &["scratch"], &[])
            },
        )]
        .into(),
    };
    let (bed, transform) = bed(
        "transform_split",
        "CREATE TABLE orders (id bigint PRIMARY KEY, total numeric(10,2), note text, scratch text)",
        "CREATE TABLE orders (id bigint PRIMARY KEY, total numeric(10,2));
         CREATE TABLE order_notes (order_id bigint PRIMARY KEY REFERENCES orders, text text)",
        transform,
    )
    .await;
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute("INSERT INTO orders SELECT g, g, 'n' || g FROM generate_series(1, 500) g")
        .await
        .unwrap();
    forget_capture(&bed).await;
    let applier = Arc::new(apply::spawn(config(&bed, &transform)));
    caught_up(&applier).await;
    let writes = async {
        for turn in 1..40 {
            client
                .batch_execute(&format!(
                    "INSERT INTO orders VALUES (1000 + {turn}, 1, NULL); UPDATE orders SET note = 'x' || note, scratch = 'y' WHERE id % 9 = {turn} % 9;
                     DELETE FROM orders WHERE id = {turn}; UPDATE orders SET id = id + 5000 WHERE id = 100 + {turn}"
                ))
                .await
                .unwrap();
        }
    };
    let (_, ()) = tokio::join!(backfilled(&bed, &applier), writes);
    let same = async || {
        assert_clean(&applier).await;
        for (legacy, new) in [
            (
                "SELECT (id, total)::text FROM orders ORDER BY id",
                "SELECT (id, total)::text FROM orders ORDER BY id",
            ),
            (
                "SELECT (id, note)::text FROM orders ORDER BY id",
                "SELECT (order_id, text)::text FROM order_notes ORDER BY order_id",
            ),
        ] {
            assert_eq!(
                rows(&bed, Side::Legacy, legacy).await,
                rows(&bed, Side::New, new).await,
                "{legacy}"
            );
        }
    };
    same().await;
    bed.proxy(Side::New)
        .await
        .batch_execute(
            "SET session_replication_role = replica; UPDATE order_notes SET text = 'planted' WHERE order_id = 300",
        )
        .await
        .unwrap();
    let report = verified(&bed, &applier, Side::Legacy, Epoch::FIRST, false).await;
    assert_eq!(unequal(&report), [("public.order_notes".to_owned(), 1)]);
    let report = verified(&bed, &applier, Side::Legacy, Epoch::FIRST, true).await;
    assert!(report.equal, "{:?}", unequal(&report));
    same().await;
    client
        .batch_execute("TRUNCATE orders; INSERT INTO orders VALUES (1, 2, 'three')")
        .await
        .unwrap();
    same().await;
    // Nothing says what legacy has of an order without a note, nor what `scratch` is there.
    let status = applier.status().borrow().clone();
    assert_eq!(status.one_way.len(), 1, "{status:#?}");
    assert!(status.one_way[0].contains("that only one part has"), "{status:#?}");
}

/// What an expression cannot compute is not on new, and is told.
#[tokio::test]
async fn a_row_that_cannot_be_computed_is_held() {
    let transform = Transform {
        schemas: Default::default(),
        tables: [(
            name("public.t"),
            table("public.t", &[("share", sql("100 / n"))], &[], &[("n", "100 / share")]),
        )]
        .into(),
    };
    let legacy = "CREATE TABLE t (id int PRIMARY KEY, n int); CREATE TABLE other (id int PRIMARY KEY)";
    let new = "CREATE TABLE t (id int PRIMARY KEY, share int); CREATE TABLE other (id int PRIMARY KEY)";
    let (bed, transform) = bed("transform_held", legacy, new, transform).await;
    let applier = apply::spawn(ApplierConfig {
        writes: Writes {
            error_threshold: 100.0,
            ..Writes::default()
        },
        ..config(&bed, &transform)
    });
    caught_up(&applier).await;
    let client = bed.app(Side::Legacy).await;
    for statement in [
        "INSERT INTO t VALUES (1, 4)",
        "BEGIN; INSERT INTO t VALUES (2, 0); INSERT INTO other VALUES (1); COMMIT",
        "INSERT INTO t VALUES (3, 50); INSERT INTO other VALUES (2)",
    ] {
        client.batch_execute(statement).await.unwrap();
    }
    caught_up(&applier).await;
    let status = applier.status().borrow().clone();
    assert_eq!(status.quarantine.transactions, 1, "{status:#?}");
    let error = status.quarantine.error.clone().unwrap_or_default();
    assert!(error.contains("division by zero"), "{error}");
    assert_eq!(
        rows(&bed, Side::New, "SELECT (id, share)::text FROM t ORDER BY id").await,
        ["(1,25)", "(3,2)"]
    );
    assert_eq!(
        rows(&bed, Side::New, "SELECT id::text FROM other ORDER BY id").await,
        ["2"]
    );
}

/// A mapping that is wrong mirrors nothing; one that changed needs seeding again.
#[tokio::test]
async fn a_mapping_is_refused_or_makes_a_table_anew() {
    // Names that the mapping's own functions use as well.
    let legacy = "CREATE TABLE t (id int PRIMARY KEY, image text)";
    let new = "CREATE TABLE t (id int PRIMARY KEY, mapped text)";
    let mapped = |sql_text: &str| Transform {
        schemas: Default::default(),
        tables: [(
            name("public.t"),
            table("public.t", &[("mapped", sql(sql_text))], &[], &[("image", "mapped")]),
        )]
        .into(),
    };
    let (bed, wrong) = bed("transform_change", legacy, new, mapped("image || now()")).await;
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t VALUES (1, 'one')")
        .await
        .unwrap();
    let applier = apply::spawn(config(&bed, &wrong));
    let status = until(&applier, |status| matches!(status.state, ApplierState::Failing { .. })).await;
    let ApplierState::Failing { error } = status.state else {
        panic!()
    };
    assert!(
        error.contains("not immutable") && error.contains("public.t.mapped"),
        "{error}"
    );
    assert_eq!(rows(&bed, Side::New, "SELECT mapped FROM t").await, [] as [String; 0]);
    applier.stop().await;

    for (text, expected) in [("upper(image)", "ONE"), ("lower(image) || '!'", "one!")] {
        let transform = Arc::new(mapped(text));
        let applier = Arc::new(apply::spawn(config(&bed, &transform)));
        caught_up(&applier).await;
        let state = applier.status().borrow().tables[0].seeding;
        if expected == "ONE" {
            assert_eq!(state, Seeding::Synced);
        } else {
            assert_eq!(state, Seeding::Unseeded);
            backfilled(&bed, &applier).await;
        }
        assert_clean(&applier).await;
        assert_eq!(rows(&bed, Side::New, "SELECT mapped FROM t").await, [expected]);
        applier.stop().await;
    }
}

/// DDL on a transformed table would mean something else on the other side.
#[tokio::test]
async fn ddl_on_a_transformed_table_is_refused() {
    let (bed, transform) = bed("transform_ddl", LEGACY, NEW, mapping()).await;
    let applier = apply::spawn(config(&bed, &transform));
    caught_up(&applier).await;
    let client = bed.app(Side::Legacy).await;
    for statement in [
        "ALTER TABLE kunden ADD COLUMN more text",
        "ALTER TABLE kunden ALTER COLUMN name DROP NOT NULL",
        "CREATE INDEX ON kunden (name)",
        "DROP INDEX kunden_pkey",
        "CREATE TABLE sales.more (id int PRIMARY KEY)",
    ] {
        client.batch_execute("BEGIN").await.unwrap();
        let refused = try_ddl(&client, statement).await.unwrap_err();
        client.batch_execute("ROLLBACK").await.unwrap();
        let message = refused.as_db_error().unwrap().message().to_owned();
        assert!(
            message.contains("transformed table") || message.contains("another name on the other side"),
            "{statement}: {message}"
        );
    }
    // Of tables that are alike, DDL goes through.
    ddl(&client, "ALTER TABLE same ADD COLUMN w int").await;
    client
        .batch_execute("INSERT INTO same VALUES (1, 'v', 2); INSERT INTO kunden (name) VALUES ('after')")
        .await
        .unwrap();
    assert_clean(&applier).await;
    assert_eq!(rows(&bed, Side::New, "SELECT w::text FROM same").await, ["2"]);
    // What nobody saw pauses the table.
    client
        .batch_execute("ALTER TABLE kunden ADD COLUMN hidden int")
        .await
        .unwrap();
    client
        .batch_execute("INSERT INTO kunden (name) VALUES ('unseen')")
        .await
        .unwrap();
    let paused = |status: &ApplierStatus| {
        status
            .tables
            .iter()
            .any(|table| table.name == "customers" && table.paused.is_some())
    };
    until(&applier, paused).await;
}

/// Every error that only a server can tell.
#[tokio::test]
async fn wrong_expressions_are_found_beforehand() {
    let bed = Bed::new("transform_check", "").await;
    bed.app(Side::Legacy)
        .await
        .batch_execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text, at timestamptz);
             CREATE FUNCTION public.twice(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT $1 || $1'",
        )
        .await
        .unwrap();
    bed.app(Side::New)
        .await
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, v text, at timestamptz, w int NOT NULL)")
        .await
        .unwrap();
    let (legacy, new) = (bed.proxy(Side::Legacy).await, bed.proxy(Side::New).await);
    for client in [&legacy, &new] {
        client.batch_execute(PINNED_SETTINGS).await.unwrap();
    }
    let with = |columns: &[(&str, Origin)], inverse: &[(&str, &str)]| Transform {
        schemas: Default::default(),
        tables: [(name("public.t"), table("public.t", columns, &[], inverse))].into(),
    };
    for (w, expected) in [
        ("(random() * 10)::int", "not immutable"),
        ("extract(epoch FROM now())::int", "not immutable"),
        ("length(at::text)", "not immutable"),
        ("(SELECT count(*) FROM t)", "cannot be computed"),
        ("count(id)", "cannot be computed"),
        ("v", "cannot take"),
        ("length(v", "not SQL"),
        ("1) STORED, ADD COLUMN x int GENERATED ALWAYS AS (2", "not SQL"),
        ("length(missing)", "cannot be computed"),
        ("length(twice(v))", "cannot be computed"),
    ] {
        let plan = examine(&with(&[("w", sql(w))], &[]), &legacy, &new).await.unwrap();
        let [fault] = &plan.faults[..] else {
            panic!("{w}: {plan:#?}")
        };
        assert!(fault.fact.contains(expected), "{w}: {fault}");
        assert_eq!((fault.side, fault.subject.as_str()), (Side::Legacy, "public.t.w"));
        assert!(!fault.advice.is_empty());
    }
    let plan = examine(&with(&[("w", sql("1"))], &[("v", "v || random()")]), &legacy, &new)
        .await
        .unwrap();
    assert_eq!((plan.faults.len(), plan.faults[0].side), (1, Side::New), "{plan:#?}");
    let plan = examine(&with(&[("w", sql("length(public.twice(t.v))"))], &[]), &legacy, &new)
        .await
        .unwrap();
    assert_eq!(
        (plan.faults, plan.one_way, plan.forward.len(), plan.reverse.len()),
        (vec![], vec![], 1, 1)
    );
    // Nothing of the examination stays.
    let left = legacy
        .query("SELECT FROM pg_class WHERE relpersistence = 't'", &[])
        .await
        .unwrap();
    assert_eq!(left.len(), 0);
}

/// After a forced flip: what looks alike on both sides is not, and is not mirrored as if it were.
#[tokio::test]
async fn without_a_way_back_nothing_goes_back() {
    let tables = "CREATE TABLE t (id int PRIMARY KEY, n int); CREATE TABLE other (id int PRIMARY KEY)";
    let transform = Transform {
        schemas: Default::default(),
        tables: [(name("public.t"), table("public.t", &[("n", sql("n * 2"))], &[], &[]))].into(),
    };
    let (bed, transform) = bed("transform_one_way", tables, tables, transform).await;
    let applier = apply::spawn(config(&bed, &transform));
    caught_up(&applier).await;
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t VALUES (1, 4)")
        .await
        .unwrap();
    assert_clean(&applier).await;
    let status = applier.status().borrow().clone();
    assert!(
        status.one_way.iter().any(|why| why.contains("public.t.n")),
        "{status:#?}"
    );
    let applier = flipped(&bed, &transform, &applier, Side::New, Epoch(2)).await;
    bed.app(Side::New)
        .await
        .batch_execute("INSERT INTO t VALUES (2, 6); INSERT INTO other VALUES (1)")
        .await
        .unwrap();
    caught_up(&applier).await;
    assert_eq!(
        rows(&bed, Side::Legacy, "SELECT (id, n)::text FROM t ORDER BY id").await,
        ["(1,4)"]
    );
    assert_eq!(rows(&bed, Side::Legacy, "SELECT id::text FROM other").await, ["1"]);
    let status = applier.status().borrow().clone();
    let paused = status
        .tables
        .iter()
        .find(|table| table.name == "t")
        .and_then(|table| table.paused.clone());
    assert!(paused.is_some_and(|why| why.contains("no way back")), "{status:#?}");
}
