//! Alembic: forward and back, step by step and at once, in one transaction and in many.

use pgtandem::control::Phase;

use crate::application::Statements;
use crate::shop::Shop;

/// Every name is as one version or another of the schema has it.
const STATEMENTS: Statements = &[
    "INSERT INTO people (full_name, email) VALUES ('Old #', '#@example.org')",
    "INSERT INTO people (full_name) VALUES ('Old #')",
    "INSERT INTO people (display_name) VALUES ('New #')",
    "INSERT INTO people (display_name, region) VALUES ('New #', 'region #')",
    "UPDATE people SET full_name = full_name || '.' WHERE id = # AND length(full_name) < 70",
    "UPDATE people SET display_name = 'Renamed #' WHERE id = #",
    "UPDATE people SET region = 'moved' WHERE id = #",
    "UPDATE people SET email = '#@example.com' WHERE id = #",
    "UPDATE people SET profile = jsonb_build_object('n', #, 'r', random()) WHERE id = #",
    "DELETE FROM people WHERE id = #",
    "SELECT id, region FROM people WHERE id < # ORDER BY id",
    "SELECT name, orders, total FROM summary WHERE id < # ORDER BY id",
    "SELECT state, count(*), sum(total) FROM orders WHERE person_id > # GROUP BY state ORDER BY state",
    "INSERT INTO contacts (person_id, email) VALUES (#, '#@example.net') ON CONFLICT (person_id) DO UPDATE SET email = excluded.email",
    "INSERT INTO orders (person_id, total) VALUES (#, #)",
    "INSERT INTO orders (person_id, total, note) VALUES (#, #, repeat('n', #))",
    "INSERT INTO orders (person_id, total, remark, quantity) VALUES (#, #, 'r#', #)",
    "UPDATE orders SET total = total + 0.5 WHERE id = #",
    "UPDATE orders SET id = id + 100000 WHERE id = #",
    "UPDATE orders SET state = 'shipped' WHERE id = #",
    "SELECT pay(#)",
    "DELETE FROM orders WHERE id = #",
    "UPDATE settings SET value = '{\"n\": #}' WHERE key = 'setting 1#'",
    "INSERT INTO settings (key, value) VALUES ('key #', '[#]') ON CONFLICT (key) DO UPDATE SET value = excluded.value",
    "INSERT INTO audit_log (what) VALUES ('application #')",
    "BEGIN; INSERT INTO orders (person_id, total) VALUES (#, 1); SAVEPOINT s; DELETE FROM orders WHERE id = #;
     ROLLBACK TO s; UPDATE orders SET total = 2 WHERE id = #; COMMIT",
];

/// The migrations, oldest first.
fn revisions() -> usize {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/migrations/alembic/versions");
    let files = std::fs::read_dir(folder).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".py")).count()
}

/// All at once, in as few transactions as Alembic can and with one for each, and what Alembic says of
/// a database that it finds up to date.
async fn at_once(shop: &mut Shop) {
    shop.migrate("check").await;
    shop.migrate("-x schemas=all check").await;
    shop.migrate("downgrade base").await;
    shop.migrate("upgrade head").await;
    shop.migrate("downgrade -1").await;
    shop.migrate("upgrade head").await;
    shop.migrate("check").await;

    // A database that says of itself that it is older than it is, and one that knows again.
    shop.migrate("stamp 0005").await;
    let outdated = shop.tool.outcome("check");
    assert_ne!(outdated.code, 0, "{}", outdated.output);
    shop.migrate("stamp head").await;
    shop.migrate("check").await;

    shop.migrate("-x transaction=each downgrade base").await;
    shop.migrate("-x transaction=each upgrade head").await;
    shop.migrate("check").await;
}

/// Each migration for itself: forward, back, and forward again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alembic_in_dual_write() {
    let mut shop = Shop::open("alembic", Phase::DualWrite, STATEMENTS).await;
    for _ in 0..revisions() {
        shop.migrate("-x transaction=each upgrade +1").await;
        shop.migrate("-x transaction=each downgrade -1").await;
        shop.migrate("upgrade +1").await;
    }
    at_once(&mut shop).await;
    assert_eq!(shop.close().await.matched, 0, "nothing is shadowed in dual_write");
}

/// All the way forward, all the way back, step by step, with every read repeated on the secondary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alembic_in_dual_read() {
    let mut shop = Shop::open("alembic", Phase::DualRead, STATEMENTS).await;
    for _ in 0..revisions() {
        shop.migrate("upgrade +1").await;
    }
    for _ in 0..revisions() {
        shop.migrate("downgrade -1").await;
    }
    shop.migrate("upgrade head").await;
    at_once(&mut shop).await;
    let reads = shop.close().await;
    assert_eq!(reads.mismatched, 0, "{reads:?}");
    assert!(reads.matched > 0, "{reads:?}");
}
