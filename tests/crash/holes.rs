//! The holes that switchovers of other tools are known for, one test each. Two of them stand beside
//! their kind in `flips`: an open transaction at the fence, and a reverse direction that cannot be
//! armed.

use std::time::Duration;

use pgtandem::control::Side;
use pgtandem::servers::SUPERUSER;
use pgtandem::switchover::Step;
use tokio::time::sleep;

use crate::another::mirroring;
use crate::flips::{Fleet, Stop, history, remove_stop, switchover};
use crate::rig::{APP, connect};

/// Nothing arrives at the secondary, and nothing says so: what was last heard is not taken for how
/// things are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_stream_is_not_taken_for_caught_up() {
    let fleet = Fleet::with("switchover: { drain_timeout: 1s }").await;
    let rig = &fleet.stage.rig;
    let caught_up = |status: &_| mirroring(status).lag.seconds == 0.0;
    rig.until(caught_up).await;
    // The round hangs on the secondary, and the applier waits for it in good faith.
    let locking = rig.direct(Side::New, SUPERUSER).await;
    locking.batch_execute("BEGIN; LOCK TABLE notes").await.unwrap();
    let client = connect(&fleet.other.url()).await.unwrap();
    client
        .batch_execute("INSERT INTO notes (note) VALUES ('late')")
        .await
        .unwrap();
    rig.until(|status| mirroring(status).lag.seconds > 2.0).await;
    rig.check(&["switchover", "--to", "new"], 1, "lag");
    // Who passes the gate by force does not pass the last round.
    let forced = ["switchover", "--to", "new", "--force", "--reason", "it says so"];
    rig.check(&forced, 1, "apply the last round");
    assert_eq!(fleet.agree().await, (Side::Legacy, 1));
    // The connections to it are dead, and nobody was told.
    locking.batch_execute("ROLLBACK").await.unwrap();
    rig.until(caught_up).await;
    fleet.stage.relay.swallow();
    client
        .batch_execute("INSERT INTO notes (note) VALUES ('later')")
        .await
        .unwrap();
    rig.check(&["switchover", "--to", "new"], 1, "a gate is closed");
    assert_eq!(rig.value(Side::New, "SELECT count(*) FROM notes").await, "1");
    fleet.stage.relay.calm();
    fleet.gates_open().await;
    switchover(rig.admin_port, Side::New, false)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", fleet.logs()));
    fleet.agree().await;
    assert_eq!(rig.value(Side::New, "SELECT count(*) FROM notes").await, "2");
    fleet.assert_exact().await;
}

/// The lag is zero, since nothing that has committed is missing; what commits between that and the
/// fence has been sent to nobody yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_not_yet_sent_at_lag_zero_is_not_lost() {
    let fleet = Fleet::set().await;
    let rig = &fleet.stage.rig;
    let direct = rig.direct(Side::Legacy, APP).await;
    direct
        .batch_execute("BEGIN; INSERT INTO notes (note) SELECT 'unsent ' || n FROM generate_series(1, 1000) n")
        .await
        .unwrap();
    rig.wait_caught_up().await;
    let status = rig.status().await.unwrap();
    let lag = &mirroring(&status).lag;
    assert_eq!((lag.transactions, lag.seconds), (0, 0.0));
    let port = rig.admin_port;
    let flip = tokio::spawn(async move { switchover(port, Side::New, false).await });
    fleet.waits_for_the_fence(&flip).await;
    direct.batch_execute("COMMIT").await.unwrap();
    flip.await
        .unwrap()
        .unwrap_or_else(|error| panic!("{error}\n{}", fleet.logs()));
    assert_eq!(fleet.agree().await, (Side::New, 2));
    assert_eq!(rig.value(Side::New, "SELECT count(*) FROM notes").await, "1000");
    fleet.assert_exact().await;
}

/// Whoever asked for the flip goes away in the middle of it: it ends one way or the other, and
/// everybody serves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flip_that_is_cancelled_in_the_middle_is_given_up_or_finished() {
    let mut fleet = Fleet::set().await;
    for step in [Step::Probing, Step::Holding, Step::Fencing, Step::Decided, Step::Turned] {
        let storm = fleet.storm(true).await;
        storm.everybody_commits(2).await;
        let (from, epoch) = fleet.agree().await;
        fleet.gates_open().await;
        let stop = Stop::before(&fleet, step, from).await;
        let flip = stop.reached_by_flip(&fleet).await;
        // The command's connection is closed, as by Ctrl-C.
        flip.abort();
        assert!(flip.await.unwrap_err().is_cancelled());
        sleep(Duration::from_millis(200)).await;
        stop.lift().await;
        storm.everybody_commits(5).await;
        let (primary, now) = fleet.agree().await;
        assert_eq!(now, if primary == from { epoch } else { epoch + 1 }, "{step}");
        if step == Step::Turned {
            assert_eq!(primary, from.other(), "{step}: it was decided\n{}", fleet.logs());
        }
        fleet.stage.end(storm).await;
        remove_stop(&fleet, from).await;
        fleet.assert_exact().await;
        let told = history(fleet.other.admin_port()).await;
        assert_ne!(told[0].outcome, "under way", "{step}: {:?}", told[0]);
    }
}

/// A server that is restarted in an orderly way while clients are held, either one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_restarted_during_the_flip_ends_it_one_way() {
    let mut fleet = Fleet::set().await;
    for (victim, step) in [
        (Side::Legacy, Step::Fencing),
        (Side::New, Step::Draining),
        (Side::New, Step::Decided),
    ] {
        let storm = fleet.storm(true).await;
        storm.everybody_commits(2).await;
        let (from, epoch) = fleet.agree().await;
        fleet.gates_open().await;
        let stop = Stop::before(&fleet, step, from).await;
        let flip = stop.reached_by_flip(&fleet).await;
        fleet.stage.rig.server_mut(victim).stop("fast").unwrap();
        fleet.stage.rig.server_mut(victim).start_again().unwrap();
        stop.lift().await;
        let outcome = flip.await.unwrap();
        let (primary, now) = fleet.agree().await;
        assert_eq!(
            now,
            if primary == from { epoch } else { epoch + 1 },
            "{victim} at {step}"
        );
        if outcome.is_ok() {
            assert_eq!(primary, from.other(), "{victim} at {step}");
        }
        storm.everybody_commits(2).await;
        fleet.stage.end(storm).await;
        remove_stop(&fleet, from).await;
        fleet.assert_exact().await;
    }
}
