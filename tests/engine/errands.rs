//! Orders that reach a proxy which does not apply: carried to the one that does, never carried out
//! twice, and answered whatever becomes of it.

use std::sync::Arc;

use pgtandem::apply::{self, Applier, ApplierState, HealOrder, Order, Outcome};
use pgtandem::control::Side;
use pgtandem::upstream::control::Control;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::bed::{Bed, caught_up, until};
use crate::quarantine::{ADMIT, held, refusing, retry, values};

/// Of `journal::LOCK_CLASS` and `LOCK_APPLIER`, as another proxy would hold it.
const TAKE_LEASE: &str = "SELECT pg_advisory_lock(1885828196, 3)";
const GIVE_LEASE: &str = "SELECT pg_advisory_unlock(1885828196, 3)";

/// One transaction is held, and a proxy waits while the lease is somebody's who does nothing.
async fn with_nobody_applying(name: &str) -> (Bed, Control, Applier) {
    let (bed, applier) = refusing(name).await;
    let client = bed.app(Side::Legacy).await;
    client.batch_execute("INSERT INTO t VALUES (1, 200, 1)").await.unwrap();
    caught_up(&applier).await;
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    applier.stop().await;
    let lease = bed.admin(Side::New).await;
    lease.batch_execute(TAKE_LEASE).await.unwrap();
    let waiting = apply::spawn(bed.config());
    until(&waiting, |status| status.state == ApplierState::Waiting).await;
    (bed, lease, waiting)
}

fn retry_all(applier: &Arc<Applier>) -> JoinHandle<Result<Outcome, String>> {
    let applier = applier.clone();
    tokio::spawn(async move {
        let actor = "tester".to_owned();
        applier.order(Order::Retry { id: None, actor }).await
    })
}

/// Waits until so many errands have nobody who carries them out.
async fn left(client: &Client, count: usize) {
    while values(client, "SELECT id FROM pgtandem.errand WHERE taken_by IS NULL")
        .await
        .len()
        != count
    {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn whichever_proxy_is_asked_the_one_that_applies_carries_it_out() {
    let (bed, applier) = refusing("passed_on").await;
    let other = apply::spawn(bed.config());
    until(&other, |status| status.state == ApplierState::Waiting).await;
    let client = bed.app(Side::Legacy).await;
    for id in [1, 2] {
        let insert = format!("INSERT INTO t VALUES ({id}, 200, {id})");
        client.batch_execute(&insert).await.unwrap();
    }
    caught_up(&applier).await;
    let new = bed.admin(Side::New).await;
    let ids: Vec<i64> = apply::list_quarantine(&new)
        .await
        .unwrap()
        .iter()
        .map(|entry| entry.id)
        .collect();

    let refused = retry(&other, Some(ids[0])).await.refused;
    assert!(
        matches!(&refused[..], [(id, error)] if *id == ids[0] && error.contains("small")),
        "{refused:?}"
    );
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    assert_eq!(retry(&other, Some(ids[0])).await.done, ids[..1]);
    let discard = Order::Discard {
        id: ids[1],
        actor: "tester".into(),
        reason: "stale".into(),
    };
    assert_eq!(other.order(discard.clone()).await.unwrap().done, ids[1..]);
    assert_eq!(other.order(discard).await.unwrap(), Outcome::default());
    caught_up(&applier).await;
    assert_eq!(held(&applier), (0, 0));
    assert_eq!(values(&new, "SELECT * FROM t").await, ["(1,200,1)"]);

    new.batch_execute("ALTER TABLE u ALTER v SET DEFAULT 7").await.unwrap();
    let order = HealOrder {
        actor: Some("healer".into()),
        ..HealOrder::default()
    };
    let healed = other.heal(order.clone()).await.unwrap();
    assert_eq!(healed.statements.len(), 1, "{healed:?}");
    let nothing = HealOrder {
        only: vec!["nothing".into()],
        ..order
    };
    let refused = other.heal(nothing).await.unwrap_err();
    assert!(refused.contains("nothing"), "{refused}");

    let recorded = "SELECT count(*), count(answered_at), string_agg(DISTINCT actor, ' ') FROM pgtandem.errand";
    assert_eq!(values(&new, recorded).await, ["(6,6,\"healer tester\")"]);
}

#[tokio::test]
async fn an_order_that_nobody_waits_for_is_withdrawn() {
    let (_bed, lease, waiting) = with_nobody_applying("withdrawn").await;
    let waiting = Arc::new(waiting);
    let (first, second) = (retry_all(&waiting), retry_all(&waiting));
    left(&lease, 2).await;
    first.abort();
    second.abort();
    left(&lease, 0).await;
    lease.batch_execute(GIVE_LEASE).await.unwrap();
    caught_up(&waiting).await;
    assert_eq!(held(&waiting), (1, 1));
    let tried = "SELECT count(*) FROM pgtandem.errand";
    assert_eq!(values(&lease, tried).await, ["(0)"]);
}

#[tokio::test]
async fn an_order_is_for_whoever_applies_next() {
    let (bed, lease, waiting) = with_nobody_applying("next").await;
    let waiting = Arc::new(waiting);
    let retried = retry_all(&waiting);
    left(&lease, 1).await;
    lease.batch_execute(GIVE_LEASE).await.unwrap();
    assert_eq!(retried.await.unwrap().unwrap().done.len(), 1);
    bed.assert_same(&waiting).await;
}

#[tokio::test]
async fn an_order_whose_proxy_is_gone_is_answered_and_not_repeated() {
    let (bed, lease, waiting) = with_nobody_applying("lost").await;
    let waiting = Arc::new(waiting);
    let retried = retry_all(&waiting);
    left(&lease, 1).await;
    let taken = "UPDATE pgtandem.errand SET taken_by = 'pid 1 on elsewhere'";
    lease.batch_execute(taken).await.unwrap();
    lease.batch_execute(GIVE_LEASE).await.unwrap();
    let lost = retried.await.unwrap().unwrap_err();
    assert!(lost.contains("pid 1 on elsewhere"), "{lost}");
    caught_up(&waiting).await;
    assert_eq!(held(&waiting), (1, 1));
    retry(&waiting, None).await;
    bed.assert_same(&waiting).await;
}

/// A halt ends by an order that was given to another proxy.
#[tokio::test]
async fn a_retry_ends_a_halt_wherever_it_was_ordered() {
    let (bed, applier) = refusing("halt_elsewhere").await;
    let client = bed.app(Side::Legacy).await;
    for id in 0..30 {
        let insert = format!("INSERT INTO t VALUES ({id}, 200, {id})");
        client.batch_execute(&insert).await.unwrap();
    }
    until(&applier, |status| matches!(status.state, ApplierState::Halted { .. })).await;
    applier.stop().await;
    bed.proxy(Side::New).await.batch_execute(ADMIT).await.unwrap();
    let lease = bed.admin(Side::New).await;
    lease.batch_execute(TAKE_LEASE).await.unwrap();
    let waiting = Arc::new(apply::spawn(bed.config()));
    until(&waiting, |status| status.state == ApplierState::Waiting).await;
    let retried = retry_all(&waiting);
    left(&lease, 1).await;
    lease.batch_execute(GIVE_LEASE).await.unwrap();
    let outcome = retried.await.unwrap().unwrap();
    assert_eq!((outcome.refused.len(), outcome.left.len()), (0, 0), "{outcome:?}");
    bed.assert_same(&waiting).await;
    assert_eq!(held(&waiting), (0, 0));
}
