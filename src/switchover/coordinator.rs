//! Leading a flip: the work of each step, and its record before the next one takes effect. Which
//! step that is, [`machine::next`] says. The coordinator does nothing but that: sessions are each
//! proxy's own, its own proxy's too ([`super::participant`]).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use metrics::histogram;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::crossing::{Crossing, Drained, Fenced, TurnError};
use super::machine::{self, Kind, Outcome, Step};
use super::records::{self, FlipRow, Member, ProxyRow, SILENCE_MAX};
use super::resolve::{record_turned, seat, take_over, turn_all};
use super::tandem::Tandem;
use crate::config::Switchover;
use crate::control::Control;
use crate::journal::{LOCK_CLASS, LOCK_FLIP};
use crate::upstream::control::{Control as Connection, connect, connect_hearing, error_chain};

/// How long all proxies may take to open their sessions' connections to the other side: they do it
/// gently, and nobody waits.
const PREPARE_MAX: Duration = Duration::from_secs(600);
/// A proxy that fell silent before this has no part in a switchover.
const LONG_GONE: Duration = Duration::from_secs(60);
/// How long the clients' release may take before the flip is told without it.
const RELEASE_MAX: Duration = Duration::from_secs(5);
/// Beyond what a step may take, before others may take it for left alone.
const GRACE: Duration = Duration::from_secs(5);
/// Between two tries at a side that is away.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Answers come as notifications; this is for one that got lost.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// What a coordinator is told.
pub struct Order<'a> {
    pub kind: Kind,
    pub tandems: &'a [Arc<Tandem>],
    pub from: Control,
    pub to: Control,
    /// Who wants it.
    pub by: String,
    pub forced: Option<String>,
    pub policy: Switchover,
    pub me: &'a Member,
}

/// Why a flip did not happen; everything goes on as before.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Abandoned(pub String);

/// Leads a flip or a rehearsal to its end. Whose record it is: the id of what was recorded.
///
/// # Errors
/// It was given up, and by its records so.
pub async fn lead(order: Order<'_>) -> Result<String, Abandoned> {
    let mut lead = Lead::begin(order).await.map_err(Abandoned)?;
    let outcome = lead.run().await;
    let id = lead.flip.id.clone();
    // It goes with the connection, too, a moment later; the next flip may come at once.
    let unlock = format!("SELECT pg_advisory_unlock({LOCK_CLASS}, {LOCK_FLIP})");
    lead.old.batch_execute(&unlock).await.ok();
    outcome.map(|()| id).map_err(Abandoned)
}

struct Lead<'a> {
    order: Order<'a>,
    flip: FlipRow,
    crossings: Vec<Crossing>,
    fenced: Vec<Fenced>,
    drained: Vec<Drained>,
    /// Where it is recorded: what decides, with the coordinator's lock; and the copy.
    old: Connection,
    new: Connection,
    heard: Arc<Notify>,
    /// Proxies that are not waited for.
    silent: BTreeSet<String>,
}

impl<'a> Lead<'a> {
    async fn begin(order: Order<'a>) -> Result<Self, String> {
        let seat = seat(order.tandems).ok_or("there is no database")?;
        let heard = Arc::new(Notify::new());
        let old_target = seat.targets().target(order.from.primary);
        let old = connect_hearing(old_target, "switchover lead", heard.clone())
            .await
            .map_err(|error| error.to_string())?;
        let new = connect(seat.targets().target(order.to.primary), "switchover lead")
            .await
            .map_err(|error| error.to_string())?;
        take_lead(&old).await?;
        new.batch_execute("SET synchronous_commit = off")
            .await
            .map_err(|error| error_chain(&error))?;
        let mut crossings = Vec::new();
        for tandem in order.tandems {
            let crossing = Crossing::open(tandem, order.from, order.to).await;
            crossings.push(crossing.map_err(|cause| format!("database {}: {cause}", tandem.name()))?);
        }
        // The database whose record decides is turned last.
        crossings.sort_by_key(|crossing| crossing.tandem.name() == seat.name());
        let flip = FlipRow {
            id: format!("{:016x}", rand::random::<u64>()),
            kind: order.kind,
            from: order.from.primary,
            to: order.to,
            coordinator: order.me.name.clone(),
            forced: order.forced.clone(),
            step: Step::Preparing,
            orphaned: false,
        };
        let measured = json!({ "proxies": names(&proxies(&old).await?), "by": order.by });
        let sql = records::begin_sql(&flip, &order.me.name, &measured, PREPARE_MAX + GRACE);
        let (on_old, on_new) = tokio::join!(old.batch_execute(&sql), new.batch_execute(&sql));
        on_old
            .and(on_new)
            .map_err(|error| format!("record the switchover: {}", error_chain(&error)))?;
        Ok(Self {
            order,
            flip,
            crossings,
            fenced: Vec::new(),
            drained: Vec::new(),
            old,
            new,
            heard,
            silent: BTreeSet::new(),
        })
    }

    async fn run(&mut self) -> Result<(), String> {
        loop {
            let step = self.flip.step;
            let began = Instant::now();
            let worked = self.work(step).await;
            let took = began.elapsed();
            histogram!("pgtandem_switchover_step_seconds", "step" => step.as_str(), "kind" => self.order.kind.as_str())
                .record(took.as_secs_f64());
            let ms = took.as_secs_f64() * 1000.0;
            let outcome = match &worked {
                Ok(measured) => {
                    tracing::info!(%step, ms, %measured, "switchover");
                    Outcome::Succeeded
                }
                Err(cause) => {
                    tracing::warn!(%step, ms, cause, "switchover");
                    Outcome::Failed
                }
            };
            match (machine::next(self.order.kind, step, outcome), worked) {
                (Step::Aborted, Ok(measured)) => {
                    // A rehearsal goes back from here.
                    self.give_up("rehearsed", measured).await?;
                    return Ok(());
                }
                (Step::Aborted, Err(cause)) => {
                    self.give_up(&cause, json!({})).await?;
                    return Err(cause);
                }
                (Step::Decided, Ok(measured)) => self.decide(measured).await?,
                (Step::Decided, Err(_)) => tokio::time::sleep(LOOK_AGAIN).await,
                (Step::Turned, Ok(measured)) => {
                    let measured = with_outcome(measured, "done");
                    if self.record(Step::Turned, &measured).await.is_ok() {
                        continue;
                    }
                    let seat = seat(self.order.tandems).ok_or("there is no database")?;
                    while let Err(cause) = record_turned(seat, &self.flip, &self.order.me.name, &measured).await {
                        tracing::error!(cause, "the switchover is decided and cannot be told; clients wait");
                        tokio::time::sleep(LOOK_AGAIN).await;
                    }
                    self.flip.step = Step::Turned;
                }
                (Step::Done, worked) => {
                    let measured = worked.unwrap_or_else(|cause| json!({ "not_told": cause }));
                    // It has happened, recorded or not.
                    self.record(Step::Done, &measured).await.ok();
                    return Ok(());
                }
                (follows, worked) => {
                    let recorded = self.record(follows, &worked.unwrap_or_default()).await;
                    if let Err(cause) = recorded {
                        self.give_up(&cause, json!({})).await?;
                        return Err(cause);
                    }
                }
            }
        }
    }

    /// What is done in a step, and what was measured by it.
    async fn work(&mut self, step: Step) -> Result<Value, String> {
        match step {
            Step::Preparing => self.answers("prepared", PREPARE_MAX).await,
            Step::Probing => {
                let flip = &self.flip.id;
                let probed = join_all(self.crossings.iter_mut().map(|crossing| crossing.probe(flip))).await;
                let (probed, failed) = by_database(&self.crossings, probed, "the reverse direction does not work");
                failed.map(|()| probed.into_iter().collect())
            }
            Step::Holding => self.answers("held", self.hold_max()).await,
            Step::Fencing => {
                let patience = self.order.policy.drain_timeout;
                let fenced = join_all(self.crossings.iter_mut().map(|crossing| crossing.fence(patience))).await;
                let (fenced, failed) = by_database(&self.crossings, fenced, "fence the old primary");
                self.fenced = fenced.into_iter().map(|(_, fenced)| fenced).collect();
                failed.map(|()| json!({ "fenced_out": self.silent }))
            }
            Step::Draining => {
                let (patience, forced) = (self.order.policy.drain_timeout, self.order.forced.is_some());
                let fenced = self.crossings.iter_mut().zip(std::mem::take(&mut self.fenced));
                let drained =
                    join_all(fenced.map(|(crossing, fenced)| crossing.last_round(fenced, patience, forced))).await;
                let (drained, failed) = by_database(&self.crossings, drained, "apply the last round");
                let mut measured = json!({});
                for (name, (drained, of_database)) in drained {
                    measured[name] = of_database;
                    self.drained.push(drained);
                }
                failed.map(|()| measured)
            }
            Step::Decided => {
                let began = Instant::now();
                // None of ours may be in the way; those of other proxies are ended.
                join_all(self.order.tandems.iter().map(|tandem| tandem.stop_applier())).await;
                let stopped = began.elapsed();
                let turned = join_all(self.crossings.iter_mut().map(Crossing::turn_new)).await;
                if let Some(cause) = turned.into_iter().find_map(Result::err) {
                    tracing::warn!(cause, "the new side is turned over another connection");
                    turn_all(self.order.tandems, &self.flip).await?;
                }
                Ok(
                    json!({ "stop_ms": stopped.as_secs_f64() * 1000.0, "turn_ms": (began.elapsed() - stopped).as_secs_f64() * 1000.0 }),
                )
            }
            Step::Turned => self.answers("released", RELEASE_MAX).await,
            Step::Done | Step::Aborted => Ok(json!({})),
        }
    }

    const fn hold_max(&self) -> Duration {
        // Stragglers may be ended at the end of it, which takes a moment.
        self.order.policy.drain_timeout.saturating_add(SILENCE_MAX)
    }

    /// How long a step may take before others may end the flip.
    const fn patience(&self, step: Step) -> Duration {
        match step {
            Step::Preparing => PREPARE_MAX.saturating_add(GRACE),
            Step::Holding => self.hold_max().saturating_add(GRACE),
            Step::Probing | Step::Fencing | Step::Draining => self.order.policy.drain_timeout.saturating_add(GRACE),
            // Whoever finds it may go on with it.
            Step::Decided | Step::Turned | Step::Done | Step::Aborted => Duration::from_secs(1),
        }
    }

    /// Waits for every proxy's word. One that has fallen silent is not waited for: it is fenced out.
    async fn answers(&mut self, word: &str, patience: Duration) -> Result<Value, String> {
        let deadline = Instant::now() + patience;
        loop {
            let found = proxies(&self.old).await?;
            let mine = |proxy: &&ProxyRow| proxy.flip.as_deref() == Some(&self.flip.id);
            if let Some(refused) = found
                .iter()
                .filter(mine)
                .find(|proxy| proxy.answer.as_deref() == Some("refused"))
            {
                return Err(format!("{}: {}", refused.name, why(refused)));
            }
            let (mut given, mut missing) = (json!({}), Vec::new());
            for proxy in &found {
                let answered = proxy.flip.as_deref() == Some(&self.flip.id) && proxy.answer.as_deref() == Some(word);
                if answered {
                    given[&proxy.name] = proxy.detail.clone().unwrap_or_default();
                } else if proxy.silent > SILENCE_MAX {
                    if proxy.silent < LONG_GONE && self.silent.insert(proxy.name.clone()) {
                        tracing::warn!(proxy = proxy.name, step = %self.flip.step, "does not answer and is fenced out");
                    }
                } else {
                    missing.push(proxy.name.clone());
                }
            }
            // The flip's own proxy always has to.
            if missing.is_empty() && !given.as_object().is_none_or(serde_json::Map::is_empty) {
                given["fenced_out"] = json!(self.silent);
                return Ok(given);
            }
            if Instant::now() >= deadline {
                return Err(format!("no word of {} within {patience:?}", missing.join(", ")));
            }
            tokio::time::timeout(ASK_AGAIN, self.heard.notified()).await.ok();
        }
    }

    /// Records the next step on both sides; it takes effect after that.
    async fn record(&mut self, step: Step, measured: &Value) -> Result<(), String> {
        let patience = self.patience(step);
        let from = [self.flip.step];
        let sql = records::go_sql(&self.flip.id, &from, step, &self.order.me.name, measured, patience);
        let (old, new) = tokio::join!(self.old.query_one(&sql, &[]), self.new.query_one(&sql, &[]));
        let recorded = |row: Result<tokio_postgres::Row, tokio_postgres::Error>| match row {
            Ok(row) if row.get::<_, bool>(0) => Ok(()),
            Ok(_) => Err("somebody else has ended this switchover".to_owned()),
            Err(error) => Err(format!("record the step: {}", error_chain(&error))),
        };
        recorded(old)?;
        recorded(new)?;
        self.flip.step = step;
        Ok(())
    }

    /// The point of no return: the old side is turned to secondary and that is recorded, by one
    /// transaction, the one that holds the fence.
    async fn decide(&mut self, measured: Value) -> Result<(), String> {
        let patience = self.patience(Step::Decided);
        let record = records::go_sql(
            &self.flip.id,
            &[self.flip.step],
            Step::Decided,
            &self.order.me.name,
            &measured,
            patience,
        );
        match self.turn_old(&record).await {
            Ok(()) => {
                self.flip.step = Step::Decided;
                // The copy on the other side is for those who read the history there.
                self.new.query_one(&record, &[]).await.ok();
                Ok(())
            }
            Err(TurnError::Refused(cause) | TurnError::Unknown(cause)) => {
                tracing::warn!(cause, "whether the switchover is decided must be looked up");
                match self.resolve(&cause).await {
                    Step::Aborted => Err(cause),
                    _ => {
                        self.flip.step = Step::Decided;
                        Ok(())
                    }
                }
            }
        }
    }

    /// Turns every old side; the one whose record decides only after all others.
    async fn turn_old(&mut self, record: &str) -> Result<(), TurnError> {
        let mut drained = std::mem::take(&mut self.drained);
        let (Some((seat, others)), Some(proof)) = (self.crossings.split_last(), drained.pop()) else {
            return Err(TurnError::Refused("there is no database".into()));
        };
        let others = others.iter().zip(drained);
        let turned = join_all(others.map(|(crossing, proof)| crossing.turn_old(proof, None))).await;
        turned.into_iter().collect::<Result<(), _>>()?;
        seat.turn_old(proof, Some(record.to_owned())).await
    }

    /// Goes back, whatever it takes.
    async fn give_up(&mut self, why: &str, measured: Value) -> Result<(), String> {
        // The fences first: their transactions exclude the one that records this.
        for fenced in std::mem::take(&mut self.fenced) {
            fenced.release().await;
        }
        for drained in std::mem::take(&mut self.drained) {
            drained.release().await;
        }
        if !measured.is_null() && self.order.kind == Kind::Rehearsal && why == "rehearsed" {
            let measured = with_outcome(measured, why);
            let recorded = self.record(Step::Aborted, &measured).await;
            if recorded.is_ok() {
                self.answers_of_release().await;
                return Ok(());
            }
        }
        match self.resolve(why).await {
            Step::Aborted => {
                self.answers_of_release().await;
                Ok(())
            }
            // Somebody has found it decided: then it has happened.
            _ => Ok(()),
        }
    }

    /// Everybody serves again when this returns, or has fallen silent.
    async fn answers_of_release(&mut self) {
        let held = self.answers("released", RELEASE_MAX).await;
        match held {
            Ok(measured) => {
                let note = json!({ "released": measured });
                let sql = format!(
                    "UPDATE pgtandem.flip_step SET measured = measured || {}::jsonb WHERE flip = {} AND step = 'aborted'",
                    crate::catalog::quote::literal(&note.to_string()),
                    crate::catalog::quote::literal(&self.flip.id)
                );
                // Only told by it.
                let (old, new) = tokio::join!(self.old.batch_execute(&sql), self.new.batch_execute(&sql));
                old.and(new).ok();
            }
            Err(cause) => tracing::warn!(cause, "after a switchover that was given up"),
        }
    }

    /// Looks until it is known how it ended.
    async fn resolve(&self, why: &str) -> Step {
        loop {
            match take_over(self.order.tandems, &self.flip, &self.order.me.name, why).await {
                Ok(step) => return step,
                Err(cause) => {
                    tracing::error!(cause, "how the switchover ends is not known yet; clients wait");
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        }
    }
}

/// One leads at a time.
async fn take_lead(old: &Connection) -> Result<(), String> {
    let row = old
        .query_one(
            &format!(
                "SELECT pg_try_advisory_lock({LOCK_CLASS}, {LOCK_FLIP}),
                        (SELECT f.coordinator FROM pgtandem.flip f ORDER BY f.began DESC LIMIT 1)"
            ),
            &[],
        )
        .await
        .map_err(|error| error_chain(&error))?;
    if !row.get::<_, bool>(0) {
        return Err(format!(
            "another switchover is under way, led by {}",
            row.get::<_, Option<&str>>(1).unwrap_or("another proxy")
        ));
    }
    // The records before the decision need not survive a crash of the server, which ends the flip
    // anyway; waiting for the disk at each of them would be the clients' time.
    old.batch_execute(&format!("SET synchronous_commit = off; LISTEN {}", records::CHANNEL))
        .await
        .map_err(|error| error_chain(&error))
}

async fn proxies(old: &Connection) -> Result<Vec<ProxyRow>, String> {
    records::proxies(old)
        .await
        .map_err(|error| format!("ask for the proxies: {}", error_chain(&error)))
}

fn names(proxies: &[ProxyRow]) -> Vec<&str> {
    proxies.iter().map(|proxy| proxy.name.as_str()).collect()
}

fn why(proxy: &ProxyRow) -> String {
    let detail = proxy.detail.as_ref().and_then(|detail| detail.get("why"));
    detail
        .and_then(Value::as_str)
        .unwrap_or("it did not say why")
        .to_owned()
}

fn with_outcome(mut measured: Value, outcome: &str) -> Value {
    measured["outcome"] = json!(outcome);
    measured
}

/// What a step came to in each database, by name, also where it failed in another one.
fn by_database<T>(
    crossings: &[Crossing],
    outcomes: Vec<Result<T, String>>,
    doing: &str,
) -> (Vec<(String, T)>, Result<(), String>) {
    let (mut done, mut failed) = (Vec::new(), Ok(()));
    for (crossing, outcome) in crossings.iter().zip(outcomes) {
        let name = crossing.tandem.name().to_owned();
        match outcome {
            Ok(outcome) => done.push((name, outcome)),
            Err(cause) => failed = Err(format!("database {name}: {doing}: {cause}")),
        }
    }
    (done, failed)
}
