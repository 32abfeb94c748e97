//! An operator's order that reached a proxy which does not apply: carried to the one that does, and
//! its answer carried back.
//!
//! Proxies have no network between them but the two databases. So an errand is a row of
//! `pgtandem.errand` on the secondary, where the lease is, and its holder is told by a notification.
//! It is *left* by the proxy that was asked, *taken* by the one that applies before that begins it,
//! and *answered*:
//!
//! * Nothing is carried out twice: one statement takes it, on the connection that has the lease.
//! * An errand that nobody has taken is for whoever applies next, also for the proxy that left it;
//!   until its deadline, or until whoever asked goes away and it is withdrawn.
//! * One that was taken by a proxy that is gone is answered by the next holder: after it has ended
//!   what the former left running, so what became of the order is decided by then.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::heal::HealOrder;
use super::lease::this_proxy;
use super::quarantine::Order;
use super::task::Stopped;
use super::{ApplierConfig, ApplyError, doing};
use crate::catalog::quote::literal;
use crate::control::Epoch;
use crate::upstream::control::{Control, connect, error_chain};

/// Whoever holds the lease listens to it.
pub(super) const CHANNEL: &str = "pgtandem_errand";

/// A round under way may take as long; less than whoever asks waits, so that they hear what became
/// of it.
const PATIENCE: Duration = Duration::from_secs(50);

/// Errands that wait at once, of all proxies.
const WAITING_MAX: i64 = 16;

/// How long the record of them is kept.
const KEPT: &str = "interval '30 days'";

/// How often its answer is looked for, at first and after a while.
const LOOK_MIN: Duration = Duration::from_millis(10);
const LOOK_MAX: Duration = Duration::from_millis(200);

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Errand {
    Quarantine(Order),
    Heal(HealOrder),
}

impl Errand {
    fn actor(&self) -> Option<&str> {
        match self {
            Self::Quarantine(Order::Retry { actor, .. } | Order::Discard { actor, .. }) => Some(actor),
            Self::Heal(order) => order.actor.as_deref(),
        }
    }
}

/// As it is written into the row.
type Answer = Result<Value, String>;

/// Sends an errand; what comes of it goes to `answer`. Withdrawn where nobody waits for that any more.
pub(super) fn send<T: DeserializeOwned + Send + 'static>(
    config: &ApplierConfig,
    stop: &CancellationToken,
    errand: Errand,
    mut answer: oneshot::Sender<Result<T, String>>,
) {
    let (config, stop) = (config.clone(), stop.clone());
    tokio::spawn(async move {
        let outcome = match Left::behind(&config, &errand).await {
            Ok(left) => tokio::select! {
                outcome = left.outcome() => outcome,
                () = answer.closed() => return left.withdraw_in_silence().await,
                () = stop.cancelled() => left.end(&Stopped.to_string()).await,
            },
            Err(error) => Err(error),
        };
        let read = outcome.and_then(|value| {
            serde_json::from_value(value).map_err(|error| format!("the answer cannot be read: {error}"))
        });
        answer.send(read).ok();
    });
}

/// An errand on the secondary, and the connection by which it was left there.
struct Left {
    secondary: Control,
    id: i64,
    deadline: Instant,
}

impl Left {
    async fn behind(config: &ApplierConfig, errand: &Errand) -> Result<Self, String> {
        let secondary = connect(&config.secondary, "errand")
            .await
            .map_err(|error| error.to_string())?;
        let id = leave(&secondary, config.epoch, errand).await.map_err(|error| {
            format!(
                "the order cannot be passed on to the proxy that applies: {}",
                error_chain(&error)
            )
        })?;
        let id = id.ok_or_else(|| format!("{WAITING_MAX} orders wait already for the proxy that applies"))?;
        Ok(Self {
            secondary,
            id,
            deadline: Instant::now() + PATIENCE,
        })
    }

    async fn outcome(&self) -> Answer {
        let mut pause = LOOK_MIN;
        while Instant::now() < self.deadline {
            let answer = self.answer().await.map_err(|error| {
                format!(
                    "what became of the order is not known, the secondary is away: {}",
                    error_chain(&error)
                )
            })?;
            if let Some(answer) = answer {
                return answer;
            }
            sleep(pause).await;
            pause = (pause * 3 / 2).min(LOOK_MAX);
        }
        self.end(&format!("no proxy took the order within {PATIENCE:?}")).await
    }

    /// Withdraws it, for this reason, or says why that was too late.
    async fn end(&self, why: &str) -> Answer {
        let withdrawn = self.withdraw().await;
        if withdrawn.is_ok_and(|gone| gone) {
            return Err(format!("{why}; it is withdrawn, nothing was done"));
        }
        match self.answer().await {
            Ok(Some(answer)) => answer,
            _ => Err("the proxy that applies has begun to carry it out and not ended yet: look again".into()),
        }
    }

    async fn withdraw_in_silence(&self) {
        if let Err(error) = self.withdraw().await {
            tracing::debug!(id = self.id, error = error_chain(&error), "an errand was not withdrawn");
        }
    }

    /// Whether nobody had taken it.
    async fn withdraw(&self) -> Result<bool, tokio_postgres::Error> {
        let sql = "DELETE FROM pgtandem.errand WHERE id = $1 AND taken_by IS NULL";
        Ok(self.secondary.execute(sql, &[&self.id]).await? > 0)
    }

    async fn answer(&self) -> Result<Option<Answer>, tokio_postgres::Error> {
        let sql = "SELECT e.answer::text FROM pgtandem.errand e WHERE e.id = $1";
        let row = self.secondary.query_one(sql, &[&self.id]).await?;
        Ok(row.get::<_, Option<&str>>(0).map(|text| {
            serde_json::from_str(text).unwrap_or_else(|error| Err(format!("the answer cannot be read: {error}")))
        }))
    }
}

/// `None`: too many wait.
async fn leave(secondary: &Client, epoch: Epoch, errand: &Errand) -> Result<Option<i64>, tokio_postgres::Error> {
    let order = serde_json::to_string(errand).unwrap_or_default();
    let sql = format!(
        "WITH old AS (DELETE FROM pgtandem.errand WHERE at < pg_catalog.clock_timestamp() - {KEPT})
         INSERT INTO pgtandem.errand (epoch, \"order\", asked_of, actor, deadline)
         SELECT $1, $2::text::jsonb, $3, $4, pg_catalog.clock_timestamp() + interval '{patience} seconds'
          WHERE (SELECT count(*) FROM pgtandem.errand e WHERE e.taken_by IS NULL AND e.deadline > pg_catalog.clock_timestamp())
                < {WAITING_MAX}
         RETURNING id",
        patience = PATIENCE.as_secs()
    );
    let row = secondary
        .query_opt(&sql, &[&(epoch.0 as i64), &order, &this_proxy(), &errand.actor()])
        .await?;
    secondary.batch_execute(&format!("NOTIFY {CHANNEL}")).await?;
    Ok(row.map(|row| row.get(0)))
}

/// The oldest that waits; by this nobody else takes it. `lease`: the connection that holds that.
pub(super) async fn take(lease: &Client, epoch: Epoch) -> Result<Option<(i64, Errand)>, ApplyError> {
    let row = lease
        .query_opt(
            "UPDATE pgtandem.errand AS e SET taken_by = $2, taken_at = pg_catalog.clock_timestamp()
              WHERE e.taken_by IS NULL
                AND e.id = (SELECT w.id FROM pgtandem.errand w
                             WHERE w.epoch = $1 AND w.taken_by IS NULL AND w.deadline > pg_catalog.clock_timestamp()
                             ORDER BY w.id LIMIT 1)
             RETURNING e.id, e.\"order\"::text, e.asked_of",
            &[&(epoch.0 as i64), &this_proxy()],
        )
        .await
        .map_err(doing("take an errand"))?;
    let Some(row) = row else { return Ok(None) };
    let (id, order, asked_of): (i64, &str, &str) = (row.get(0), row.get(1), row.get(2));
    match serde_json::from_str(order) {
        Ok(errand) => {
            tracing::info!(
                id,
                asked_of,
                ?errand,
                "carrying out an order that another proxy was asked"
            );
            Ok(Some((id, errand)))
        }
        Err(error) => {
            // Of a newer version.
            let unknown = Err(format!("the proxy that applies does not know this order: {error}"));
            answer(lease, id, &unknown).await?;
            Ok(None)
        }
    }
}

/// What to answer, and the error that ends the session where there is one.
pub(super) fn answer_of<T: Serialize>(outcome: Result<Result<T, String>, ApplyError>) -> (Answer, Option<ApplyError>) {
    match outcome {
        Ok(answer) => {
            let written = answer.and_then(|done| serde_json::to_value(done).map_err(|error| error.to_string()));
            (written, None)
        }
        Err(error) => (Err(error.to_string()), Some(error)),
    }
}

pub(super) async fn answer(lease: &Client, id: i64, answer: &Answer) -> Result<(), ApplyError> {
    let text = serde_json::to_string(answer).unwrap_or_default();
    lease
        .execute(
            "UPDATE pgtandem.errand SET answer = $2::text::jsonb, answered_at = pg_catalog.clock_timestamp()
              WHERE id = $1 AND answer IS NULL",
            &[&id, &text],
        )
        .await
        .map_err(doing("answer an errand"))?;
    Ok(())
}

/// What a former holder of the lease took and did not end, for those who wait for it.
pub(super) async fn answer_lost(lease: &Client, epoch: Epoch) -> Result<(), ApplyError> {
    let lost = "look at what is left, and order it again if need be";
    lease
        .batch_execute(&format!(
            "UPDATE pgtandem.errand
                SET answer = pg_catalog.jsonb_build_object('Err',
                        'the proxy that carried it out (' || taken_by || ') stopped applying before it answered; ' || {lost}),
                    answered_at = pg_catalog.clock_timestamp()
              WHERE epoch = {epoch} AND taken_by IS NOT NULL AND answer IS NULL",
            lost = literal(lost),
            epoch = epoch.0
        ))
        .await
        .map_err(doing("answer errands that were lost"))
}

/// Whether an operator has asked another proxy to try again what is held, which ends a halt.
pub(super) async fn retry_waits(secondary: &Client, epoch: Epoch) -> Result<bool, ApplyError> {
    let row = secondary
        .query_one(
            "SELECT EXISTS (SELECT FROM pgtandem.errand e
                             WHERE e.epoch = $1 AND e.taken_by IS NULL AND e.deadline > pg_catalog.clock_timestamp()
                               AND e.\"order\" -> 'quarantine' ? 'retry')",
            &[&(epoch.0 as i64)],
        )
        .await
        .map_err(doing("look for errands"))?;
    Ok(row.get(0))
}
