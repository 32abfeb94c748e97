//! Two-phase transactions that are prepared when the primary is switched over: their manager ends
//! them while everybody else is held.

use pgtandem::control::Side;
use tokio_postgres::Client;

use crate::flips::{Fleet, switchover};
use crate::rig::connect;

async fn prepare(client: &Client, name: &str) {
    let sql = format!("BEGIN; INSERT INTO notes (note) VALUES ('{name}'); PREPARE TRANSACTION '{name}'");
    client.batch_execute(&sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_prepared_transaction_is_not_held() {
    let fleet = Fleet::set().await;
    let [simple, extended, named] = [
        connect(&fleet.stage.rig.url()).await.unwrap(),
        connect(&fleet.other.url()).await.unwrap(),
        connect(&fleet.other.url()).await.unwrap(),
    ];
    for to in [Side::New, Side::Legacy] {
        for (client, name) in [(&simple, "simple"), (&extended, "extended"), (&named, "named")] {
            prepare(client, name).await;
        }
        let commit = named.prepare("COMMIT PREPARED 'named'").await.unwrap();
        let flip = tokio::spawn(switchover(fleet.stage.rig.admin_port, to, false));
        // From here on, whatever begins a transaction is held.
        let fencing = "SELECT count(*) FROM pgtandem.flip WHERE step = 'fencing'";
        while fleet.stage.rig.value(to.other(), fencing).await != "1" {
            assert!(!flip.is_finished(), "{}", fleet.logs());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        simple.batch_execute("COMMIT PREPARED 'simple'").await.unwrap();
        extended.execute("ROLLBACK PREPARED 'extended'", &[]).await.unwrap();
        named.execute(&commit, &[]).await.unwrap();
        let flip = flip
            .await
            .unwrap()
            .unwrap_or_else(|error| panic!("{error}\n{}", fleet.logs()));
        assert_eq!(flip.outcome, "done", "{flip:?}");
        for client in [&simple, &extended, &named] {
            client
                .batch_execute("INSERT INTO notes (note) VALUES ('after')")
                .await
                .unwrap();
        }
    }
    fleet.agree().await;
    fleet.assert_exact().await;
    let notes = "SELECT string_agg(note, ' ' ORDER BY note) FROM notes";
    assert_eq!(
        fleet.stage.rig.value(Side::New, notes).await,
        "after after after after after after named named simple simple"
    );
}
