//! One round: what came on the primary since the last one, written on the secondary as one
//! difference together with the snapshot it was read in.

use std::collections::HashMap;
use std::time::Duration;

use super::pipeline::{Item, run};
use super::plan::{DdlRecord, Plan, Segment, Step, plan, segments};
use super::quarantine::EntryNumbers;
use super::refusal::Refusal;
use super::rows::{Mode, NotWritten, Writes, is_conflict};
use super::session::{Session, Target};
use super::status::Seeding;
use super::{ApplyError, doing};
use crate::catalog::Oid;
use crate::catalog::quote::literal;
use crate::catalog::snapshot::Snapshot;
use crate::control::Epoch;
use crate::journal::read::{Change, Most, ReadBy, RoundRead, Shape, Unsigned, lsn};
use crate::journal::{SideRole, SlotState};

/// A round with more changes, or larger ones, goes through the secondary's own tables (bulk.rs):
/// the proxy holds no more than this, and a small multiple of it while it writes.
const IN_MEMORY: Most = Most {
    rows: 10_000,
    bytes: 16 * 1024 * 1024,
};
/// Without a bound, for the test that reads by position.
const ANY: Most = Most {
    rows: i64::MAX,
    bytes: i64::MAX,
};

/// Definitions of at most this many tables are asked for with every round, before it is known
/// which ones it concerns; a larger set is asked for afterwards.
const SHAPES_ASKED_AHEAD: usize = 64;

/// Where a transaction of the applier ends on the way to its target.
#[derive(Clone, Copy)]
pub(super) enum Stop<'a> {
    /// A cut.
    Target,
    /// Whole transactions up to this position.
    Piece(u64),
    /// The same, and this statement is begun outside of transactions.
    Outside(u64, &'a DdlRecord),
}

pub(super) struct Ending<'a> {
    pub end: &'a Target,
    pub stop: Stop<'a>,
    /// How far the primary's log is known to be on disk.
    pub flushed: u64,
}

/// What a round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct RoundOutcome {
    pub changes: usize,
}

impl Session {
    /// Reads and applies one round. With `hold`, the primary's transaction stays open and its
    /// exported snapshot's name is returned: the caller ends it by [`Self::end_read`].
    pub(super) async fn round(&mut self, hold: bool) -> Result<(RoundOutcome, Option<String>), ApplyError> {
        self.finish_interrupted().await?;
        loop {
            let asked: Vec<Oid> = if self.tables.iter().count() <= SHAPES_ASKED_AHEAD {
                self.tables.rels()
            } else {
                Vec::new()
            };
            let most = match self.config.read_by {
                ReadBy::Snapshot => IN_MEMORY,
                ReadBy::Position => ANY,
            };
            let read = self
                .reader
                .read(&self.primary, &self.since, self.position, most, &asked)
                .await?;
            self.check_epoch(&read)?;
            let adds_label = |row| Change::from_row(row).is_ok_and(|change| super::plan::adds_label(&change));
            let in_pieces = read.too_large || read.rows.iter().any(adds_label);
            if in_pieces && self.config.read_by == ReadBy::Snapshot {
                self.end_read().await?;
                let count = self
                    .apply_in_pieces(Target {
                        snapshot: read.snapshot,
                        position: read.position,
                        piece: 0,
                    })
                    .await?;
                if hold {
                    continue;
                }
                return Ok((RoundOutcome { changes: count }, None));
            }
            let changes = read
                .rows
                .iter()
                .map(Change::from_row)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| ApplyError::Inconsistent(error.to_string()))?;
            let exported = if hold {
                Some(self.export_snapshot().await?)
            } else {
                None
            };
            let outcome = self.apply_read(&read, &changes, &asked, hold).await?;
            return Ok((outcome, exported));
        }
    }

    /// Ends the transaction in which a round was read.
    pub(super) async fn end_read(&self) -> Result<(), ApplyError> {
        self.primary
            .batch_execute("COMMIT")
            .await
            .map_err(doing("end the reading of a round"))
    }

    async fn export_snapshot(&self) -> Result<String, ApplyError> {
        let row = self
            .primary
            .query_one("SELECT pg_export_snapshot()", &[])
            .await
            .map_err(doing("export the round's snapshot"))?;
        Ok(row.get(0))
    }

    /// A flip makes the old direction's applier stop, wherever it is.
    fn check_epoch(&self, read: &RoundRead) -> Result<(), ApplyError> {
        let state = read.state.and_then(SlotState::unpack);
        let Some(state) = state else {
            return Err(ApplyError::NotInstalled(self.config.primary.describe()));
        };
        let follows = matches!(state.side.role, SideRole::Primary | SideRole::Off);
        if state.side.epoch == self.config.epoch && follows {
            Ok(())
        } else {
            let why = deposed(state.side.epoch, state.side.role, self.config.epoch);
            Err(match state.side.epoch > self.config.epoch {
                true => ApplyError::Flipped(why),
                false => ApplyError::Deposed(why),
            })
        }
    }

    async fn apply_read(
        &mut self,
        read: &RoundRead,
        changes: &[Change<'_>],
        asked: &[Oid],
        hold: bool,
    ) -> Result<RoundOutcome, ApplyError> {
        let whole = plan(changes);
        let expected = shapes_after(whole.ddl());
        let missing: Vec<Oid> = whole.rels.iter().copied().filter(|rel| !asked.contains(rel)).collect();
        let mut shapes = read.shapes.clone();
        shapes.extend(
            self.reader
                .shapes_of(&self.primary, &missing)
                .await
                .map_err(doing("read the definitions of changed tables"))?,
        );
        if !hold {
            self.end_read().await?;
        }
        self.adopt_unknown(&whole.rels, whole.ddl()).await?;
        self.pause_changed_tables(&whole.rels, &shapes, &expected).await?;

        let end = Target {
            snapshot: read.snapshot.clone(),
            position: read.position,
            piece: 0,
        };
        let segments = segments(changes);
        let nothing = whole.steps.is_empty() && whole.bad.is_empty() && segments.len() == 1 && self.held.is_empty();
        if changes.is_empty() || nothing {
            self.advance(&end.snapshot, end.position);
        } else if let [only] = &segments[..] {
            self.apply_segment(only, &whole, &end, read.flushed).await?;
        } else {
            for segment in &segments {
                self.apply_segment(segment, &plan(&segment.changes), &end, read.flushed)
                    .await?;
            }
        }
        self.held_of_read.clear();
        self.progress.changes += whole.changes as u64;
        self.progress.transactions += whole.transactions as u64;
        if self.config.read_by == ReadBy::Position
            && let Some(last) = changes.iter().map(|change| change.position).max()
        {
            self.position = last;
        }
        Ok(RoundOutcome { changes: whole.changes })
    }

    /// In memory only: nothing came, so the stored watermark is as good.
    fn advance(&mut self, snapshot: &Snapshot, position: u64) {
        self.since = snapshot.clone();
        if self.config.read_by == ReadBy::Snapshot {
            self.position = position;
        }
    }

    /// Writes a segment in one transaction, then runs the DDL after it. While nothing is held and
    /// nothing is refused that is one difference; otherwise transaction by transaction as far as
    /// need be (isolate.rs).
    async fn apply_segment(
        &mut self,
        segment: &Segment<'_>,
        plan: &Plan<'_>,
        end: &Target,
        flushed: u64,
    ) -> Result<(), ApplyError> {
        let outside = segment
            .outside
            .as_ref()
            .map(|change| (change, DdlRecord::from_change(change)));
        let stop = match &outside {
            Some((change, Ok(record))) => Stop::Outside(change.position, record),
            Some((change, Err(_))) => Stop::Piece(change.position),
            None => Stop::Target,
        };
        let ending = Ending { end, stop, flushed };
        let clean = self.held.is_empty() && self.held_of_read.is_empty() && plan.bad.is_empty();
        let refusal = if clean {
            self.apply_or_repeat(plan, &ending).await?
        } else {
            None
        };
        if let Some(refusal) = &refusal {
            tracing::warn!(%refusal, "the secondary refuses something of this round; looking for what");
        }
        if !clean || refusal.is_some() {
            self.isolate(&segment.changes, &plan.bad, &ending).await?;
        }
        match outside {
            Some((_, Ok(record))) => self.run_outside(&record).await,
            Some((change, Err(error))) => self.hold_outside_change(change, &error.to_string()).await,
            None => Ok(()),
        }
    }

    /// The short way, then the careful one. A refusal leaves nothing done.
    async fn apply_or_repeat(&mut self, plan: &Plan<'_>, ending: &Ending<'_>) -> Result<Option<Refusal>, ApplyError> {
        let refusal = match self.apply_chunk(plan, Mode::Short, ending).await {
            Ok(()) => return Ok(None),
            Err(NotWritten::Failed(error)) => self.refusal_of(error)?,
            Err(NotWritten::Surprise(what)) => {
                self.roll_back().await?;
                tracing::warn!(
                    %what,
                    round = self.round + 1,
                    "the secondary is not as the last round left it, applying this round carefully"
                );
                self.learn_uniques(&plan.rels).await?;
                match self.apply_chunk(plan, Mode::Careful, ending).await {
                    Ok(()) => return Ok(None),
                    Err(NotWritten::Failed(error)) => self.refusal_of(error)?,
                    Err(NotWritten::Surprise(what)) => what,
                }
            }
        };
        self.roll_back().await?;
        Ok(Some(refusal))
    }

    async fn apply_chunk(&mut self, plan: &Plan<'_>, mode: Mode, ending: &Ending<'_>) -> Result<(), NotWritten> {
        self.begin_counting(plan.transactions);
        let mut writes = Writes::default();
        writes.begin(self.watermark_sql(ending));
        self.add_steps(&mut writes, &plan.steps, mode).await?;
        // Nothing may be committed here that a crash of the primary could still undo there.
        let (counts, on_disk) = tokio::join!(
            run(&self.secondary, writes.items()),
            wait_flushed(&self.aside, ending.end.position, ending.flushed)
        );
        self.examine(&writes, counts)?;
        on_disk?;
        self.commit().await?;
        self.reached(ending);
        if plan.ddl().next().is_some() {
            self.reload_tables().await?;
        }
        Ok(())
    }

    /// Adds the statements of these steps; DDL, and what stands before it, is sent at once.
    pub(super) async fn add_steps<'a>(
        &mut self,
        writes: &mut Writes<'a>,
        steps: &[Step<'a>],
        mode: Mode,
    ) -> Result<(), NotWritten> {
        for step in steps {
            match step {
                Step::Rows(differences) => {
                    self.refresh_tables().await?;
                    self.add_rows(writes, differences, mode).await?;
                }
                Step::Ddl(record) => {
                    self.write(&std::mem::take(writes)).await?;
                    self.run_ddl(record).await?;
                }
            }
        }
        Ok(())
    }

    /// Where the secondary stands: what is written between two rounds goes no further.
    pub(super) fn standing(&self) -> Target {
        Target {
            snapshot: self.since.clone(),
            position: self.position,
            piece: 0,
        }
    }

    /// A new transaction of the round has no effect yet.
    pub(super) fn begin_counting(&mut self, transactions: usize) {
        self.cleared_in_round.clear();
        self.diverged_in_round.clear();
        self.held_in_round = 0;
        self.entries = EntryNumbers::default();
        self.transactions_in_round = transactions as u64;
    }

    /// What was committed is where this session stands.
    pub(super) fn reached(&mut self, ending: &Ending<'_>) {
        let piece = match ending.stop {
            Stop::Outside(position, _) | Stop::Piece(position) => Some(position),
            Stop::Target => None,
        };
        self.target = piece.map(|piece| Target {
            piece,
            ..ending.end.clone()
        });
        if self.target.is_none() {
            self.since = ending.end.snapshot.clone();
            self.durable = ending.end.snapshot.clone();
            if self.config.read_by == ReadBy::Snapshot {
                self.position = ending.end.position;
            }
        }
    }

    /// Commits, and takes over what the transaction did.
    pub(super) async fn commit(&mut self) -> Result<(), NotWritten> {
        self.judge().await?;
        match self.secondary.batch_execute("COMMIT").await {
            Ok(()) => {}
            // A deferrable key is checked only here.
            Err(error) if is_conflict(&error) => return Err(NotWritten::Surprise(Refusal::of(&error))),
            Err(error) => return Err(NotWritten::Failed(doing("commit a round")(error))),
        }
        self.round += 1;
        for rel in std::mem::take(&mut self.cleared_in_round) {
            if let Some(mirrored) = self.tables.get_mut(rel) {
                mirrored.state = Seeding::Synced;
                mirrored.note = None;
            }
        }
        for (rel, count) in std::mem::take(&mut self.diverged_in_round) {
            if let Some(mirrored) = self.tables.get_mut(rel) {
                mirrored.diverged += count;
                tracing::warn!(
                    schema = mirrored.schema,
                    table = mirrored.name,
                    rows = count,
                    round = self.round,
                    "rows of a synced table were not as they should have been; they are now as on the primary"
                );
            }
        }
        Ok(())
    }

    pub(super) async fn roll_back(&mut self) -> Result<(), ApplyError> {
        self.secondary
            .batch_execute("ROLLBACK")
            .await
            .map_err(doing("roll back a round"))?;
        // DDL of the round is gone again, and so are the definitions read after it.
        self.reload_tables().await?;
        Ok(())
    }

    /// The watermark's part of a round's transaction.
    pub(super) fn watermark_sql(&self, ending: &Ending<'_>) -> String {
        let (assignments, outside) = match ending.stop {
            Stop::Target => (
                format!(
                    "snapshot = {}, position = '{}', target = NULL, target_position = NULL, piece = NULL",
                    literal(&ending.end.snapshot.to_string()),
                    lsn(ending.end.position)
                ),
                "NULL".to_owned(),
            ),
            Stop::Piece(piece) => (target_assignments(ending.end, piece), "NULL".to_owned()),
            Stop::Outside(piece, record) => (
                target_assignments(ending.end, piece),
                literal(&super::ddl::record_text(record)),
            ),
        };
        self.guarded_watermark(&format!("{assignments}, outside = {outside}"))
    }

    /// Finds no row where another applier has gone on from the same round: the row is locked
    /// and its round compared, in the transaction that writes the rows.
    pub(super) fn guarded_watermark(&self, assignments: &str) -> String {
        format!(
            "UPDATE pgtandem.watermark SET round = round + 1, {assignments}, applied_at = clock_timestamp()
              WHERE round = {} AND epoch = {}",
            self.round, self.config.epoch
        )
    }

    /// Stores the snapshot when nothing came but something depends on it being durable.
    pub(super) async fn store_watermark(&mut self) -> Result<(), ApplyError> {
        if self.durable == self.since || self.target.is_some() {
            return Ok(());
        }
        wait_flushed(&self.aside, self.position, 0).await?;
        let sql = self.guarded_watermark(&format!(
            "snapshot = {}, position = '{}'",
            literal(&self.since.to_string()),
            lsn(self.position)
        ));
        let counts = run(&self.secondary, &[Item::Text(sql)])
            .await
            .map_err(doing("store the watermark"))?;
        if counts != [1] {
            return Err(ApplyError::overtaken());
        }
        self.round += 1;
        self.durable = self.since.clone();
        Ok(())
    }

    /// Every table's definition at the end of the round must be what its last applied or
    /// planned DDL left. Where it is not, somebody changed it in a way that the proxy did not
    /// see: which images were written before and which after cannot be told, so the table is
    /// paused before any of them is applied.
    pub(super) async fn pause_changed_tables(
        &mut self,
        rels: &[Oid],
        found: &[Shape],
        planned: &HashMap<Oid, Shape>,
    ) -> Result<(), ApplyError> {
        for &rel in rels {
            let Some(mirrored) = self.tables.get(rel).filter(|mirrored| mirrored.paused.is_none()) else {
                continue;
            };
            let expected = planned.get(&rel).unwrap_or(&mirrored.shape);
            let reason = match found.iter().find(|shape| shape.rel == rel) {
                // Dropped since, by DDL of a later round or unseen; its rows are moot either way.
                None => continue,
                Some(shape) if shape == expected => continue,
                Some(shape) if shape.shape != expected.shape => {
                    "its definition changed by DDL that the proxy did not see"
                }
                Some(shape) if shape.filenode != expected.filenode && shape.attributes != expected.attributes => {
                    "it was rewritten by DDL that the proxy did not see"
                }
                Some(shape) => {
                    // VACUUM FULL, TRUNCATE, GRANT on a column: no row is written differently.
                    self.remember_shape(shape).await?;
                    continue;
                }
            };
            self.tables.pause(&self.secondary, rel, reason).await?;
        }
        Ok(())
    }
}

/// Where the primary's tables must stand after these DDL statements.
pub(super) fn shapes_after<'a>(records: impl Iterator<Item = &'a DdlRecord>) -> HashMap<Oid, Shape> {
    let mut shapes = HashMap::new();
    for table in records.flat_map(|record| record.created.iter().chain(&record.changed)) {
        shapes.insert(
            table.rel,
            Shape {
                rel: table.rel,
                shape: table.shape.clone(),
                filenode: table.filenode,
                attributes: table.attributes.clone(),
            },
        );
    }
    shapes
}

pub(super) fn target_assignments(end: &Target, piece: u64) -> String {
    format!(
        "target = {}, target_position = '{}', piece = '{}'",
        literal(&end.snapshot.to_string()),
        lsn(end.position),
        lsn(piece)
    )
}

fn deposed(epoch: Epoch, role: SideRole, ours: Epoch) -> String {
    format!("the primary is now in epoch {epoch} as {role:?}, this applier follows it in epoch {ours}")
}

/// Waits until the primary has its log on disk up to `position`; makes it so where nobody else
/// does (clients with synchronous_commit = off, log written in the background).
pub(super) async fn wait_flushed(
    primary: &tokio_postgres::Client,
    position: u64,
    known: u64,
) -> Result<(), ApplyError> {
    if known >= position {
        return Ok(());
    }
    for attempt in 0..u32::MAX {
        let flushed = primary
            .query_one("SELECT pg_current_wal_flush_lsn()", &[])
            .await
            .map_err(doing("ask how far the primary's log is on disk"))?
            .get::<_, Unsigned>(0);
        if flushed.0 >= position {
            break;
        }
        if attempt >= 2 {
            // A commit with synchronous_commit = on flushes everything before it.
            primary
                .batch_execute("SELECT pg_logical_emit_message(true, 'pgtandem', '')")
                .await
                .map_err(doing("flush the primary's log"))?;
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
