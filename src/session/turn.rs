//! What takes time about canary reads: the secondary's connection and its state, waiting for the
//! session's own writes, and the way back to the primary. While a turn is taken, nothing of the
//! client's is read; each step has its bound.

use tokio::time::{Duration, Instant, timeout};

use xxhash_rust::xxh3::xxh3_64;

use super::asking::{ANSWER_TIMEOUT, Trouble, in_time, within};
use super::canary::{Behind, Plan, Retrying, Running, Transaction, Turn};
use super::registry::BackendKey;
use super::relay::{End, Session};
use super::standby::Standby;
use crate::shadow::{CanaryEvent, Fallback};
use crate::wire::backend::Status;
use crate::wire::error::{Severity, SqlError, sqlstate};
use crate::wire::frontend;
use crate::wire::tracker::Tracker;

/// For the secondary's connection and its settings, while the client waits; a canary that takes
/// longer is none.
const OPEN_MAX: Duration = Duration::from_secs(2);
/// The secondary is left alone by a session for so long after it has failed.
const LEFT_ALONE: Duration = Duration::from_secs(1);
/// Of one session; when there are more it begins anew.
const UNFIT_MAX: usize = 256;

impl Session {
    pub(super) async fn take_turn(&mut self) -> Result<(), End> {
        let Some(turn) = self.canary.as_mut().and_then(|canary| canary.turn.take()) else {
            return Ok(());
        };
        // What lies there is looked at again.
        self.up.blocked = true;
        match turn {
            Turn::PayBack => self.pay_back().await,
            Turn::Divert(plan) => match self.reach_secondary(&plan).await? {
                Ok(()) => {
                    self.divert(plan);
                    Ok(())
                }
                Err(why) => {
                    self.fell_back(&plan.text, why);
                    self.pay_back().await
                }
            },
            Turn::Serve(plan) => match self.put_statements(&plan, true).await {
                Ok(true) => self.serve(plan, true).await,
                Ok(false) => self.leave(plan.len).await,
                Err(()) => self.serve(plan, false).await,
            },
            Turn::Leave(len) => self.leave(len).await,
            Turn::Retry => self.retry(Fallback::Broken, true).await,
            Turn::Tell(len) => {
                self.tell_failed(len, &lost(sqlstate::SERIALIZATION_FAILURE));
                Ok(())
            }
        }
    }

    /// Brings the secondary's lane to where the session stands. The inner error says why the
    /// primary is to answer.
    async fn reach_secondary(&mut self, plan: &Plan) -> Result<Result<(), Fallback>, End> {
        if self.open_lane().await.is_err() {
            return Ok(Err(Fallback::Connection));
        }
        match self.bring_state().await? {
            Ok(()) => {}
            Err(why) => return Ok(Err(why)),
        }
        if !self.wait_for_own_writes().await {
            return Ok(Err(Fallback::Wait));
        }
        Ok(match self.put_statements(plan, false).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.unfit(&plan.text)),
            Err(()) => Err(Fallback::Connection),
        })
    }

    async fn open_lane(&mut self) -> Result<(), ()> {
        let side = self.side.other();
        let limit = self.context.settings.load().limits.connect_timeout.min(OPEN_MAX);
        let Some(canary) = &mut self.canary else { return Err(()) };
        if let Some(lane) = &mut canary.lane
            && lane.side == side
            && lane.is_alive().await
        {
            return Ok(());
        }
        canary.lane = None;
        canary.forget_secondary();
        match crate::upstream::within(limit, self.pair.config.target(side), &self.login).await {
            Ok(backend) => {
                canary.lane = Some(Box::new(Standby::new(side, backend)));
                canary.not_before = None;
                Ok(())
            }
            Err(error) => {
                tracing::debug!(session = self.registered.shared.id.0, %error, "open a canary connection");
                canary.not_before = Some(Instant::now() + LEFT_ALONE);
                Err(())
            }
        }
    }

    /// Settings, role and user, as the primary has them now.
    async fn bring_state(&mut self) -> Result<Result<(), Fallback>, End> {
        if self
            .canary
            .as_ref()
            .is_some_and(|canary| canary.state.is_some() && !canary.dirty)
        {
            return Ok(Ok(()));
        }
        let Ok(mut state) = in_time(self.inspect()).await? else {
            return Ok(Err(Fallback::Session));
        };
        // Statements are brought as they are used; notifications stay with the primary.
        state.leave_statements();
        let Some(canary) = &mut self.canary else {
            return Ok(Err(Fallback::Session));
        };
        canary.dirty = false;
        if canary.state.as_ref() == Some(&state) {
            return Ok(Ok(()));
        }
        canary.forget_secondary();
        let Some(lane) = &mut canary.lane else {
            return Ok(Err(Fallback::Connection));
        };
        let replayed = within(OPEN_MAX, lane.replay(&state, None, &self.login.user)).await;
        match replayed {
            Ok(()) => {
                canary.state = Some(state);
                Ok(Ok(()))
            }
            Err(Trouble::Refused(reason)) => {
                tracing::debug!(
                    session = self.registered.shared.id.0,
                    reason,
                    "bring a session to the secondary"
                );
                canary.lane = None;
                canary.not_before = Some(Instant::now() + LEFT_ALONE);
                Ok(Err(Fallback::Session))
            }
            Err(Trouble::Gone(_)) => {
                canary.lane = None;
                canary.not_before = Some(Instant::now() + LEFT_ALONE);
                Ok(Err(Fallback::Connection))
            }
        }
    }

    /// False where they are not there within `reads.canary_wait` of waiting for them.
    async fn wait_for_own_writes(&mut self) -> bool {
        let Some(hook) = self.context.hooks.canary.clone() else {
            return false;
        };
        let Some(canary) = &mut self.canary else { return false };
        let Some(behind) = &mut canary.behind else { return true };
        let arrived = behind.arrived.get_or_insert_with(|| hook.arrived(&self.pair.name));
        let begun = Instant::now();
        let patience = hook.wait().saturating_sub(behind.waited);
        let outcome = timeout(patience, arrived).await;
        if !patience.is_zero() {
            behind.waited += begun.elapsed();
            hook.waited(&self.pair.name, begun.elapsed());
        }
        match outcome {
            Ok(Ok(())) => {
                canary.behind = None;
                true
            }
            // Another round may be had.
            Ok(Err(_)) => {
                canary.behind = Some(Behind::now());
                false
            }
            Err(_) => false,
        }
    }

    /// Parses on the secondary's lane what the batch uses of earlier batches. False: their rows are
    /// of types that the client knows otherwise.
    async fn put_statements(&mut self, plan: &Plan, inside: bool) -> Result<bool, ()> {
        let mut out = Vec::new();
        let mut syncs = 0;
        let mut put = |name: &[u8], text: &[u8], types: &[u8]| {
            frontend::put_close_statement(&mut out, name);
            frontend::put_parse(&mut out, name, text, types);
            frontend::put_describe_statement(&mut out, name);
            out.extend_from_slice(frontend::SYNC);
            syncs += 1;
        };
        let missing: Vec<_> = self
            .missing(plan)
            .map(|(name, known)| (Box::<[u8]>::from(name), known))
            .collect();
        for (name, known) in &missing {
            put(name, &known.text, &known.types);
        }
        if let Some(unnamed) = self.statements.unnamed().filter(|_| plan.unnamed) {
            put(b"", unnamed.text, unnamed.types);
        }
        if out.is_empty() {
            return Ok(true);
        }
        let asked = if inside {
            within(ANSWER_TIMEOUT, self.ask_server(&out, syncs)).await
        } else {
            let lane = self.canary.as_mut().and_then(|canary| canary.lane.as_mut());
            let Some(lane) = lane else { return Err(()) };
            within(OPEN_MAX, lane.ask(&out, syncs)).await
        };
        let Some(canary) = &mut self.canary else { return Err(()) };
        match asked {
            // A statement that cannot be parsed there: the answer to its use says so, and the
            // primary is asked.
            Ok(asked) => {
                if !asked.custom_types {
                    canary.named.extend(missing);
                }
                Ok(!asked.custom_types)
            }
            Err(_) => {
                if !inside {
                    canary.lane = None;
                    canary.not_before = Some(Instant::now() + LEFT_ALONE);
                }
                Err(())
            }
        }
    }

    /// The statement stays with the primary from now on.
    fn unfit(&mut self, text: &[u8]) -> Fallback {
        if let Some(canary) = &mut self.canary {
            if canary.unfit.len() >= UNFIT_MAX {
                canary.unfit.clear();
            }
            canary.unfit.insert(xxh3_64(text));
        }
        Fallback::Types
    }

    fn divert(&mut self, plan: Plan) {
        let cancels = self.registered.shared.cancels();
        self.swap_lanes();
        let begins = plan.begins;
        let text = plan.text.clone();
        let running = Running::new(plan, &self.up.pending, cancels);
        if let Some(canary) = &mut self.canary {
            canary.transaction = begins.then(|| Transaction {
                owed: canary.owed.len(),
                ..Transaction::default()
            });
            canary.run(running);
        }
        if begins {
            self.count_canary(&text, CanaryEvent::Transaction);
        }
    }

    async fn serve(&mut self, plan: Plan, there: bool) -> Result<(), End> {
        let cancels = self.registered.shared.cancels();
        let running = Running::new(plan, &self.up.pending, cancels);
        if let Some(canary) = &mut self.canary {
            canary.run(running);
        }
        if there {
            return Ok(());
        }
        // What was to be parsed was not understood, or the connection is gone.
        match self.secondary_broke().await? {
            true => Ok(()),
            false => Err(End::ServerGone("the secondary does not answer".into())),
        }
    }

    /// The lane that was used is laid aside, and the other one used. Only where nothing is
    /// outstanding.
    pub(super) fn swap_lanes(&mut self) {
        let Some(canary) = &mut self.canary else { return };
        let Some(lane) = &mut canary.lane else { return };
        let Some(old) = self.registered.shared.backend() else {
            return;
        };
        std::mem::swap(&mut self.server, &mut lane.stream);
        std::mem::swap(&mut self.down.pending, &mut lane.pending);
        let new = BackendKey {
            target: self.pair.config.target(lane.side).clone(),
            pid: lane.pid,
            key: std::mem::replace(&mut lane.key, old.key),
        };
        (lane.side, lane.pid) = (old.target.side, old.pid);
        self.registered.shared.set_backend(new);
        canary.on_secondary = !canary.on_secondary;
        self.down.blocked = !self.down.pending.is_empty();
        // Whoever has said that nothing more comes has said it to one of them.
        self.shut = false;
    }

    /// The primary hears of statements that the client parsed or closed on the secondary's lane.
    pub(super) async fn pay_back(&mut self) -> Result<(), End> {
        let Some(canary) = &mut self.canary else { return Ok(()) };
        let mut out = std::mem::take(&mut canary.owed);
        let mut syncs = usize::from(!out.is_empty());
        if syncs > 0 {
            out.extend_from_slice(frontend::SYNC);
        }
        if std::mem::take(&mut canary.owes_unnamed)
            && let Some(unnamed) = self.statements.unnamed()
        {
            frontend::put_parse(&mut out, b"", unnamed.text, unnamed.types);
            out.extend_from_slice(frontend::SYNC);
            syncs += 1;
        }
        self.ask_primary(&out, syncs).await
    }

    /// What the primary says to it is not for the client; an error will come up again where the
    /// statement is used.
    async fn ask_primary(&mut self, out: &[u8], syncs: usize) -> Result<(), End> {
        if syncs == 0 {
            return Ok(());
        }
        in_time(self.ask_server(out, syncs)).await?.ok();
        Ok(())
    }

    /// The primary is asked what the secondary failed at: the error has been heard to its end, or
    /// (not `there`) the connection is gone.
    async fn retry(&mut self, broken: Fallback, there: bool) -> Result<(), End> {
        let Some(canary) = &mut self.canary else { return Ok(()) };
        let batch = std::mem::take(&mut canary.batch);
        let transaction = canary.transaction.take();
        // What is sent again says it itself.
        let owed = transaction.as_ref().map_or(batch.owed, |open| open.owed);
        canary.owed.truncate(owed);
        if !batch.unfit {
            canary.forget_secondary();
            canary.dirty = true;
        }
        if batch.unfit {
            let why = self.unfit(&batch.text);
            self.fell_back(&batch.text, why);
        } else if there {
            canary.retrying = Some(Retrying {
                text: batch.text.clone(),
                failed: false,
            });
        } else {
            self.fell_back(&batch.text, broken);
        }
        if there && transaction.is_some() {
            self.roll_back_secondary().await;
        } else {
            self.swap_lanes();
        }
        self.drop_lane(there);
        // What did not go out lies there still.
        let mut again = batch.bytes;
        again.truncate(again.len() - batch.left.min(again.len()));
        again.append(&mut self.up.pending);
        self.up.pending = again;
        self.up.blocked = true;
        self.tracker = Tracker::default();
        self.attention = None;
        self.active = true;
        self.pay_back().await?;
        if let Some(transaction) = transaction {
            self.begin_again(&transaction.answered).await?;
        }
        Ok(())
    }

    /// The batches that the secondary has answered without giving anything away.
    async fn begin_again(&mut self, answered: &[u8]) -> Result<(), End> {
        if answered.is_empty() {
            return Ok(());
        }
        let ends = crate::upstream::frames(answered)
            .filter(|(kind, _)| matches!(kind, b'Q' | b'S'))
            .count();
        self.ask_primary(answered, ends).await?;
        self.tracker.received(b'Z', b"T");
        Ok(())
    }

    /// Rolls back on the secondary, whose connection need not survive it; then the lanes are
    /// swapped.
    async fn roll_back_secondary(&mut self) {
        let mut rollback = Vec::new();
        frontend::put_query(&mut rollback, b"rollback");
        let well = within(OPEN_MAX, self.ask_server(&rollback, 1)).await.is_ok();
        self.swap_lanes();
        if !well {
            self.drop_lane(false);
        }
    }

    fn drop_lane(&mut self, keep: bool) {
        if let Some(canary) = &mut self.canary
            && !keep
        {
            canary.lane = None;
            canary.forget_secondary();
            canary.not_before = Some(Instant::now() + LEFT_ALONE);
        }
    }

    /// A transaction that the secondary runs goes on with what only the primary can do.
    async fn leave(&mut self, len: usize) -> Result<(), End> {
        let Some(canary) = &mut self.canary else { return Ok(()) };
        let transaction = canary.transaction.take().unwrap_or_default();
        if !transaction.served {
            canary.owed.truncate(transaction.owed);
        }
        self.roll_back_secondary().await;
        self.pay_back().await?;
        if !transaction.served {
            return self.begin_again(&transaction.answered).await;
        }
        if let Some(hook) = &self.context.hooks.canary {
            hook.count(&self.pair.name, b"", CanaryEvent::Stranded);
        }
        let error = SqlError {
            severity: Severity::Error,
            sqlstate: sqlstate::SERIALIZATION_FAILURE,
            message: "this read-only transaction runs on the secondary, which cannot run this statement".into(),
            hint: Some("The transaction might succeed if retried: the next one runs on the primary.".into()),
        };
        if let Some(canary) = &mut self.canary {
            canary.not_before = Some(Instant::now() + LEFT_ALONE);
        }
        self.fail_primary().await?;
        self.tell_failed(len, &error);
        Ok(())
    }

    /// The client's transaction has failed: on the primary, which says all the rest.
    async fn fail_primary(&mut self) -> Result<(), End> {
        let mut out = Vec::new();
        frontend::put_query(&mut out, b"begin");
        frontend::put_query(
            &mut out,
            b"select pg_catalog.int4div(1, 0) -- pgtandem: the client's read-only transaction was lost on the secondary",
        );
        self.ask_primary(&out, 2).await?;
        self.tracker = Tracker::default();
        self.tracker.received(b'Z', b"E");
        self.attention = None;
        self.active = true;
        self.registered.shared.publish(super::registry::State::InTransaction);
        Ok(())
    }

    /// The client hears an error in place of the answer to its batch.
    fn tell_failed(&mut self, len: usize, error: &SqlError) {
        self.up.pending.drain(..len.min(self.up.pending.len()));
        self.up.blocked = !self.up.pending.is_empty();
        let client = self.down.outbox.bytes();
        client.extend_from_slice(&error.to_frame());
        client.extend_from_slice(b"Z\0\0\0\x05E");
    }

    /// The connection went where nothing was asked of it.
    async fn broke_at_rest(&mut self) -> Result<(), End> {
        let Some(canary) = &mut self.canary else { return Ok(()) };
        let batch = std::mem::take(&mut canary.batch);
        let transaction = canary.transaction.take();
        self.swap_lanes();
        self.drop_lane(false);
        self.up.blocked = !self.up.pending.is_empty();
        let Some(mut transaction) = transaction.filter(|_| self.active) else {
            return Ok(());
        };
        if transaction.served || batch.reads {
            self.count_canary(&batch.text, CanaryEvent::Broken);
            self.fail_primary().await?;
            if let Some(canary) = &mut self.canary {
                canary.lost = true;
            }
            return Ok(());
        }
        transaction.answered.extend_from_slice(&batch.bytes);
        if let Some(canary) = &mut self.canary {
            canary.owed.truncate(transaction.owed);
        }
        self.pay_back().await?;
        self.begin_again(&transaction.answered).await
    }

    /// The server is gone. True where it was the secondary, and the session goes on.
    pub(super) async fn survives(&mut self) -> Result<bool, End> {
        if !self.on_secondary() || self.client_done || self.terminated {
            return Ok(false);
        }
        self.secondary_broke().await
    }

    async fn secondary_broke(&mut self) -> Result<bool, End> {
        self.up.outbox.clear();
        (self.server_deaf, self.server_fatal) = (false, false);
        let Some(canary) = &mut self.canary else {
            return Ok(false);
        };
        let bound = canary.transaction.as_ref().is_some_and(|open| open.served);
        let untold = canary.batch.holding || canary.batch.failing;
        tracing::debug!(session = self.registered.shared.id.0, "a canary connection broke");
        if self.tracker.at_rest() && canary.batch.left == 0 && !canary.batch.failing {
            self.broke_at_rest().await?;
            return Ok(true);
        }
        if untold && !bound {
            self.retry(Fallback::Broken, false).await?;
            return Ok(true);
        }
        if !self.down.framer.at_boundary() {
            return Ok(false);
        }
        let batch = std::mem::take(&mut canary.batch);
        canary.owed.truncate(batch.owed);
        let in_transaction = canary.transaction.take().is_some();
        self.swap_lanes();
        self.drop_lane(false);
        self.count_canary(&batch.text, CanaryEvent::Broken);
        if in_transaction {
            self.fail_primary().await?;
            self.tell_failed(batch.left, &lost(sqlstate::SERIALIZATION_FAILURE));
            return Ok(true);
        }
        self.up.pending.drain(..batch.left.min(self.up.pending.len()));
        self.up.blocked = !self.up.pending.is_empty();
        let client = self.down.outbox.bytes();
        client.extend_from_slice(&lost(sqlstate::CONNECTION_FAILURE).to_frame());
        client.extend_from_slice(b"Z\0\0\0\x05I");
        self.tracker = Tracker::default();
        self.attention = None;
        debug_assert_eq!(self.tracker.status(), Status::Idle);
        self.settle();
        Ok(true)
    }
}

fn lost(sqlstate: &'static str) -> SqlError {
    SqlError {
        severity: Severity::Error,
        sqlstate,
        message: "the connection to the secondary, which answered this read, was lost".into(),
        hint: Some("It might succeed if retried.".into()),
    }
}
