//! Databases that are not in UTF-8.

use pgtandem::apply::{self, Applier};
use pgtandem::control::Side;

use crate::bed::{Bed, Pair, caught_up};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE keyless (v text)";

async fn mirrored(name: &str, encoding: &str) -> (Bed, Applier) {
    let options = format!("ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0");
    let bed = Bed::created(Pair::shared(), name, &options, SCHEMA).await;
    bed.install().await;
    let applier = apply::spawn(bed.config());
    caught_up(&applier).await;
    (bed, applier)
}

#[tokio::test]
async fn latin1() {
    let (bed, applier) = mirrored("latin1", "LATIN1").await;
    bed.app(Side::Legacy)
        .await
        .batch_execute("INSERT INTO t VALUES (1, 'grün'), (2, 'é'); UPDATE t SET v = v || 'ß' WHERE id = 1; INSERT INTO keyless SELECT v FROM t")
        .await
        .unwrap();
    bed.assert_same(&applier).await;
}

/// Bytes that are no UTF-8, in a round and in a piece of a backlog.
#[tokio::test]
async fn sql_ascii() {
    let (bed, applier) = mirrored("sql_ascii", "SQL_ASCII").await;
    let client = bed.app(Side::Legacy).await;
    client
        .batch_execute(
            "INSERT INTO t VALUES (1, E'gr\\xfcn'), (2, E'\\xff\\xfe'), (3, 'plain'); UPDATE t SET v = v || E'\\xe9' WHERE id <> 2;
             INSERT INTO keyless SELECT v FROM t; DELETE FROM keyless WHERE v = E'\\xff\\xfe'",
        )
        .await
        .unwrap();
    caught_up(&applier).await;
    client
        .batch_execute("INSERT INTO t SELECT g, E'\\xfc' || g FROM generate_series(10, 12000) g; UPDATE t SET v = v || E'\\xe4' WHERE id % 3 = 0")
        .await
        .unwrap();
    caught_up(&applier).await;
    for table in ["t", "keyless"] {
        let sql = format!("SELECT count(*), md5(string_agg(md5(x::text), ' ' ORDER BY x::text)) FROM {table} x");
        let mut found = Vec::new();
        for side in [Side::Legacy, Side::New] {
            let row = bed.admin(side).await.query_one(&sql, &[]).await.unwrap();
            found.push((row.get::<_, i64>(0), row.get::<_, String>(1)));
        }
        assert_eq!(found[0], found[1], "{table}");
    }
    let status = applier.status().borrow().clone();
    assert_eq!((status.diverged, status.quarantine.transactions), (0, 0), "{status:#?}");
}
