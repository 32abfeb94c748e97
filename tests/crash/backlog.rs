//! The proxy killed while it drains a backlog.

use std::time::Duration;

use pgtandem::control::{Phase, Side};
use rand::Rng;

use crate::rig::APP;
use crate::stage::{Stage, rounds};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_it_drains_a_backlog() {
    let mut stage = Stage::set(Phase::DualWrite).await;
    let primary = stage.rig.direct(Side::Legacy, APP).await;
    for turn in 0..2 * rounds() {
        stage.rig.kill_proxy();
        let url = stage.rig.server(Side::Legacy).url(APP, crate::rig::DATABASE);
        let storm = stage.storm(|weather| weather.urls = vec![url]).await;
        primary
            .batch_execute(
                "INSERT INTO notes (note) SELECT md5(i::text) FROM generate_series(1, 20000) i;
                 UPDATE notes SET note = note || 'x' WHERE note LIKE 'a%'; DELETE FROM notes WHERE note LIKE 'b%'",
            )
            .await
            .unwrap();
        storm.rage(300).await;
        for _ in 0..3 {
            stage.rig.spawn_proxy();
            tokio::time::sleep(Duration::from_millis(stage.random.random_range(150..900))).await;
            stage.rig.kill_proxy();
        }
        stage.rig.spawn_proxy();
        storm.rage(50).await;
        stage.end(storm).await;
        assert_eq!(stage.ledger.failures, Vec::<String>::new(), "turn {turn}");
        stage.assert_exact().await;
    }
}
