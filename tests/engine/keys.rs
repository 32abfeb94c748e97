//! By which key tables are walked, on real catalogs.

use pgtandem::catalog::PINNED_SETTINGS;
use pgtandem::control::Side;
use pgtandem::reconcile::key::{KeyRange, boundaries, ranges, walk_key};

use crate::bed::Bed;

const SCHEMA: &str = "
    CREATE DOMAIN code AS varchar(8);
    CREATE TYPE mood AS ENUM ('low', 'high');
    CREATE TABLE plain (id bigint PRIMARY KEY, v text);
    CREATE TABLE composite (a int, b uuid, c date, PRIMARY KEY (b, a));
    CREATE TABLE worded (k text PRIMARY KEY);
    CREATE TABLE bytewise (k text COLLATE \"C\" PRIMARY KEY);
    CREATE TABLE domained (k code PRIMARY KEY);
    CREATE TABLE padded (k char(5) COLLATE \"C\" PRIMARY KEY);
    CREATE TABLE moody (k mood PRIMARY KEY);
    CREATE TABLE second (a int, b int NOT NULL UNIQUE);
    CREATE TABLE nullable (a int UNIQUE);
    CREATE TABLE deferred (a int NOT NULL UNIQUE DEFERRABLE);
    CREATE TABLE expressed (a int NOT NULL); CREATE UNIQUE INDEX ON expressed ((a + 1));
    CREATE TABLE partial (a int NOT NULL); CREATE UNIQUE INDEX ON partial (a) WHERE a > 0;
    CREATE TABLE mixed (a int NOT NULL, b int NOT NULL); CREATE UNIQUE INDEX ON mixed (a, b DESC);
    CREATE TABLE descending (a int NOT NULL, b int NOT NULL); CREATE UNIQUE INDEX ON descending (a DESC, b DESC);
    CREATE TABLE patterned (a text NOT NULL); CREATE UNIQUE INDEX ON patterned (a text_pattern_ops);
    CREATE TABLE odd (k int[] PRIMARY KEY);
    CREATE TABLE keyless (a int)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn which_key_a_table_is_walked_by() {
    let bed = Bed::new("walk_keys", SCHEMA).await;
    let (legacy, new) = (bed.proxy(Side::Legacy).await, bed.proxy(Side::New).await);
    for client in [&legacy, &new] {
        client.batch_execute(PINNED_SETTINGS).await.unwrap();
    }
    for (table, columns, agrees) in [
        ("plain", Some(vec![("id", "bigint")]), true),
        ("composite", Some(vec![("b", "uuid"), ("a", "integer")]), true),
        ("bytewise", Some(vec![("k", "text")]), true),
        ("padded", Some(vec![("k", "bpchar")]), true),
        ("moody", Some(vec![("k", "public.mood")]), true),
        ("second", Some(vec![("b", "integer")]), true),
        ("descending", Some(vec![("a", "integer"), ("b", "integer")]), true),
        ("odd", Some(vec![("k", "integer[]")]), false),
        ("nullable", None, false),
        ("deferred", None, false),
        ("expressed", None, false),
        ("partial", None, false),
        ("mixed", None, false),
        ("patterned", None, false),
        ("keyless", None, false),
    ] {
        let here = walk_key(&legacy, "public", table).await.unwrap();
        let there = walk_key(&new, "public", table).await.unwrap();
        let found = here.as_ref().map(|key| {
            let columns = key.columns.iter();
            columns
                .map(|column| (column.name.as_str(), column.type_name.as_str()))
                .collect::<Vec<_>>()
        });
        assert_eq!(found, columns, "{table}");
        let agree = here.zip(there).is_some_and(|(here, there)| here.agrees(&there));
        assert_eq!(agree, agrees, "{table}");
    }
    // What the servers' own collations are depends on the machine; that they have a key does not.
    for table in ["worded", "domained"] {
        assert!(walk_key(&legacy, "public", table).await.unwrap().is_some(), "{table}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_of_a_sample_hold_every_row_once_and_are_of_a_size() {
    let bed = Bed::new(
        "walk_ranges",
        "CREATE TABLE big (a text COLLATE \"C\", b int, filler text DEFAULT repeat('x', 100), PRIMARY KEY (a, b));
         INSERT INTO big SELECT md5((i % 7000)::text), i FROM generate_series(1, 60000) i;
         CREATE TABLE small (id int PRIMARY KEY); INSERT INTO small SELECT generate_series(1, 500)",
    )
    .await;
    for analyzed in [false, true] {
        if analyzed {
            bed.app(Side::Legacy).await.batch_execute("ANALYZE big").await.unwrap();
        }
        let client = bed.proxy(Side::Legacy).await;
        client
            .batch_execute(&format!("{PINNED_SETTINGS} SET ROLE app"))
            .await
            .unwrap();
        let key = walk_key(&client, "public", "small").await.unwrap().unwrap();
        assert_eq!(
            boundaries(&client, &key, "public", "small", 1000).await.unwrap().len(),
            0
        );
        let key = walk_key(&client, "public", "big").await.unwrap().unwrap();
        let ranges = ranges(boundaries(&client, &key, "public", "big", 1000).await.unwrap());
        assert!((20..200).contains(&ranges.len()), "{} ranges", ranges.len());
        let mut total = 0;
        for range in &ranges {
            let sql = format!("SELECT count(*) FROM ONLY big AS t WHERE {}", key.within(range));
            let sql = sql.replace("ONLY big", "ONLY public.big");
            let rows: i64 = client.query_one(&sql, &[]).await.unwrap().get(0);
            assert!(rows < 20_000, "{rows} rows in {range:?}");
            total += rows;
        }
        assert_eq!(total, 60_000);
        let everything = key.within(&KeyRange::default());
        assert_eq!(everything, "true");
        let step: Vec<String> = client
            .query_one(&key.step_sql("\"public\".\"big\"", None, 100), &[])
            .await
            .unwrap()
            .get(0);
        let before: i64 = client
            .query_one(
                &format!(
                    "SELECT count(*) FROM public.big AS t WHERE {}",
                    key.compare("<=", &step)
                ),
                &[],
            )
            .await
            .unwrap()
            .get(0);
        assert_eq!(before, 100);
    }
}
