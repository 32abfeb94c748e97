//! Django: `migrate` forward and back, and fixtures whose rows come before what they refer to.

use pgtandem::control::Phase;

use crate::application::Statements;
use crate::shop::Shop;

const STATEMENTS: Statements = &[
    "INSERT INTO shop_category (name) VALUES ('category #')",
    "INSERT INTO shop_product (name, category_id, price) VALUES ('product #', #, #)",
    "INSERT INTO shop_product (title, category_id, price, tags) VALUES ('product #', 1, #, '{a,b#}')",
    "INSERT INTO shop_product (title, category_id, price, tags, slug) VALUES ('product #', 1, #, '{}', 'by-hand-' || gen_random_uuid())",
    "UPDATE shop_product SET price = price + 1 WHERE id = #",
    "UPDATE shop_product SET tags = tags || '{more}' WHERE id = #",
    "DELETE FROM shop_product WHERE id = #",
    "SELECT count(*), sum(price) FROM shop_product WHERE category_id < #",
];

async fn there_and_back(phase: Phase) {
    let mut shop = Shop::open("django", phase, STATEMENTS).await;
    for target in ["0001", "0002", "0003", "0004", "0003", "0002", "0001"] {
        shop.migrate(&format!("migrate shop {target}")).await;
    }
    shop.migrate("migrate").await;
    shop.migrate("makemigrations --check").await;
    shop.migrate("loaddata more").await;
    shop.migrate("loaddata more").await;
    shop.migrate("flush --no-input").await;
    shop.migrate("migrate shop zero").await;
    shop.migrate("migrate").await;
    shop.migrate("migrate shop 0002 --fake").await;
    shop.migrate("migrate shop --fake").await;
    shop.migrate("migrate --check").await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn django_in_dual_write() {
    there_and_back(Phase::DualWrite).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn django_in_dual_read() {
    there_and_back(Phase::DualRead).await;
}
