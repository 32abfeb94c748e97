//! Finds what the secondary refuses, and puts it into quarantine in the round's own transaction,
//! so that the rest of the round goes on and is exact.
//!
//! The transactions of a round, in the order of their places, are tried as one difference under a
//! savepoint. Where that is refused it is rolled back and halved, the earlier half first, until
//! single transactions are left: those are held. Before each try, whatever shares a key with what
//! is held already is held as well (held.rs says why that leaves an exact state). A transaction
//! with DDL or TRUNCATE stands alone, between what comes before and after it.
//!
//! The cost is bounded whatever is refused: on each level of halving every change is written at
//! most once, so a round of n transactions writes its changes at most 1 + log2(n) times, for one
//! refused transaction about twice.

use std::collections::{BTreeMap, HashSet};

use super::held::{KeyPlaces, Unit, units};
use super::plan::{DdlRecord, TableRecord, plan};
use super::refusal::{Class, Refusal, classify};
use super::round::{Ending, wait_flushed};
use super::rows::{Mode, NotWritten, Writes};
use super::session::Session;
use super::{ApplyError, doing};
use crate::catalog::{Oid, table};
use crate::journal::read::{Change, Operation};

/// Why a transaction is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cause {
    Refused(Refusal),
    /// It touches what this entry of the quarantine holds.
    Follows(i64),
    /// Another part of it is held already.
    Continues,
}

impl Session {
    /// Writes these changes, whole transactions of them left out where need be.
    pub(super) async fn isolate(
        &mut self,
        changes: &[Change<'_>],
        bad: &BTreeMap<u64, String>,
        ending: &Ending<'_>,
    ) -> Result<(), ApplyError> {
        let units = units(changes);
        self.begin_counting(units.len());
        let mut writes = Writes::default();
        writes.begin(self.watermark_sql(ending));
        failing(self.write(&writes).await)?;

        let mut work: Vec<Vec<&Unit<'_>>> = runs(&units);
        let mut tables_are_fresh = false;
        while let Some(range) = work.pop() {
            let rest = self.hold_what_must_be(&range, bad).await?;
            if rest.is_empty() {
                continue;
            }
            let Some(refusal) = self.try_range(&rest).await? else {
                self.free_what_it_voids(&rest).await?;
                continue;
            };
            if !tables_are_fresh {
                // A table may have been dropped or changed here past us: then that is paused, and
                // no transaction is to blame.
                self.reload_tables().await?;
                tables_are_fresh = true;
                work.push(rest);
            } else if let [single] = rest[..] {
                self.hold(single, &Cause::Refused(refusal)).await?;
            } else {
                let (earlier, later) = rest.split_at(rest.len() / 2);
                work.push(later.to_vec());
                work.push(earlier.to_vec());
            }
        }
        wait_flushed(&self.aside, ending.end.position, ending.flushed).await?;
        failing(self.commit().await)?;
        self.reached(ending);
        if self.held_in_round > 0 || tables_are_fresh || units.iter().any(Unit::has_barrier) {
            self.reload_tables().await?;
            self.summarize_quarantine().await?;
        }
        Ok(())
    }

    /// Holds what cannot be applied because of what is held already; the rest is returned.
    async fn hold_what_must_be<'u, 'a>(
        &mut self,
        range: &[&'u Unit<'a>],
        bad: &BTreeMap<u64, String>,
    ) -> Result<Vec<&'u Unit<'a>>, ApplyError> {
        let mut rest = Vec::with_capacity(range.len());
        for &unit in range {
            let cause = if let Some(error) = bad.get(&unit.xid) {
                Some(Cause::Refused(Refusal::said(error)))
            } else if self.held_of_read.contains(&unit.xid) {
                Some(Cause::Continues)
            } else {
                self.forget_paused(unit);
                let touched = unit.touches(|rel| self.key_places(rel));
                let before = self.entries.number(unit).unwrap_or(i64::MAX);
                self.held
                    .held_by(&touched, &self.freed_by(unit), before)
                    .map(Cause::Follows)
            };
            match cause {
                Some(cause) => self.hold(unit, &cause).await?,
                None => rest.push(unit),
            }
        }
        Ok(rest)
    }

    /// Writes a range under a savepoint; the refusal where there is one, with nothing done then.
    async fn try_range(&mut self, range: &[&Unit<'_>]) -> Result<Option<Refusal>, ApplyError> {
        let changes: Vec<Change<'_>> = range.iter().flat_map(|unit| unit.changes.iter().copied()).collect();
        let plan = plan(&changes);
        let has_ddl = plan.ddl().next().is_some();
        let counted = (self.cleared_in_round.clone(), self.diverged_in_round.clone());
        let mut refusal = None;
        for mode in [Mode::Short, Mode::Careful] {
            if mode == Mode::Careful {
                self.learn_uniques(&plan.rels).await?;
            }
            self.at_savepoint("SAVEPOINT part").await?;
            let mut writes = Writes::default();
            let written = match self.add_steps(&mut writes, &plan.steps, mode).await {
                Ok(()) => self.write(&writes).await,
                Err(not_written) => Err(not_written),
            };
            let again = match written {
                Ok(()) => {
                    self.at_savepoint("RELEASE SAVEPOINT part").await?;
                    self.refresh_tables().await?;
                    return Ok(None);
                }
                Err(NotWritten::Surprise(what)) => {
                    refusal = Some(what);
                    mode == Mode::Short
                }
                Err(NotWritten::Failed(error)) => {
                    refusal = Some(self.refusal_of(error)?);
                    false
                }
            };
            self.at_savepoint("ROLLBACK TO SAVEPOINT part; RELEASE SAVEPOINT part")
                .await?;
            (self.cleared_in_round, self.diverged_in_round) = counted.clone();
            if has_ddl {
                self.reload_tables().await?;
            }
            if !again {
                break;
            }
        }
        Ok(refusal)
    }

    async fn at_savepoint(&self, sql: &str) -> Result<(), ApplyError> {
        self.secondary
            .batch_execute(sql)
            .await
            .map_err(doing("try a part of a round"))
    }

    /// What was applied emptied tables or reshaped them: what is held of those is void. A reshaped
    /// table lacks what was held, so it needs seeding.
    async fn free_what_it_voids(&mut self, range: &[&Unit<'_>]) -> Result<(), ApplyError> {
        let [unit] = range else { return Ok(()) };
        if self.held.is_empty() || !unit.has_barrier() {
            return Ok(());
        }
        for rel in unit.clears() {
            self.void(rel, "the table was emptied by a later transaction").await?;
        }
        for table in unit.ddl().flat_map(|record| record.changed) {
            if self.held.holds(table.rel) && !unit.clears().contains(&table.rel) {
                self.void(table.rel, "the table was changed by DDL").await?;
                let note = "transactions were in quarantine when DDL changed the table; it needs seeding";
                self.unseed(&[table.rel], note).await?;
            }
        }
        for rel in self.held.rels() {
            if self.tables.get(rel).is_none() {
                self.void(rel, "the table was dropped").await?;
            }
        }
        Ok(())
    }

    async fn void(&mut self, rel: Oid, why: &str) -> Result<(), ApplyError> {
        if self.held.holds(rel) {
            self.secondary
                .execute("SELECT pgtandem.void_held($1, $2)", &[&rel, &why])
                .await
                .map_err(doing("void what is held of a table"))?;
            self.held.forget(rel);
        }
        Ok(())
    }

    /// Equal no longer, but applied from here on.
    pub(super) async fn unseed(&mut self, rels: &[Oid], note: &str) -> Result<(), ApplyError> {
        self.secondary
            .execute(
                "UPDATE pgtandem.seeding SET state = 'unseeded', note = $2 WHERE rel = ANY ($1)",
                &[&rels, &note],
            )
            .await
            .map_err(doing("mark tables for seeding"))?;
        self.reload_tables().await?;
        Ok(())
    }

    /// Tables whose held changes this transaction would void.
    fn freed_by(&self, unit: &Unit<'_>) -> HashSet<Oid> {
        let mut freed = unit.clears();
        if unit.has_barrier() {
            freed.extend(
                unit.ddl()
                    .flat_map(|record| record.changed)
                    .filter(|table| self.reshapes(table))
                    .map(|table| table.rel),
            );
        }
        freed
    }

    fn reshapes(&self, table: &TableRecord) -> bool {
        self.tables
            .get(table.rel)
            .is_none_or(|mirrored| mirrored.shape.shape != table.shape)
    }

    /// Pausing a table voided what was held of it.
    fn forget_paused(&mut self, unit: &Unit<'_>) {
        if self.held.is_empty() {
            return;
        }
        for rel in unit.rels() {
            if self.tables.get(rel).is_some_and(|mirrored| mirrored.paused.is_some()) {
                self.held.forget(rel);
            }
        }
    }

    /// Where the keys stand in a table's images; none while it is paused.
    pub(super) fn key_places(&self, rel: Oid) -> Option<KeyPlaces> {
        Some(self.tables.get(rel)?.writer.as_ref()?.key_places.clone())
    }

    /// The tables that refused DDL would have made or changed: what comes for them cannot be
    /// applied. They go on, needing seeding, when both sides have the same columns.
    pub(super) async fn pause_tables_of(&mut self, unit: &Unit<'_>, why: &str) -> Result<(), ApplyError> {
        let reason =
            format!("DDL was put into quarantine ({why}); mend it on the secondary, then `pgtandem quarantine retry`");
        for record in unit.ddl() {
            for table in &record.created {
                self.record_table(table, None, "unseeded", Some(&reason)).await?;
            }
            for table in &record.changed {
                if !self.reshapes(table) {
                    continue;
                }
                self.tables.pause(&self.secondary, table.rel, &reason).await?;
                self.held.forget(table.rel);
            }
            if !record.created.is_empty() {
                self.reload_tables().await?;
            }
        }
        Ok(())
    }

    /// Asks which unique indexes the primary has, for the careful way.
    pub(super) async fn learn_uniques(&mut self, rels: &[Oid]) -> Result<(), ApplyError> {
        let theirs = table::load(&self.aside, rels)
            .await
            .map_err(doing("read the primary's unique indexes"))?;
        for table in theirs {
            if let Some(mirrored) = self.tables.get_mut(table.oid) {
                mirrored.theirs = table.uniques.into_iter().map(|unique| unique.columns).collect();
            }
        }
        Ok(())
    }

    /// The unique indexes under which a row in the way of a new one may be removed. None while
    /// something of the table is held: the row may be a held one's, and whatever it is in the way
    /// of is refused and held as well.
    pub(super) fn room_for(&self, rel: Oid) -> Vec<Vec<String>> {
        if self.held.holds(rel) {
            return Vec::new();
        }
        self.tables
            .get(rel)
            .map_or_else(Vec::new, |mirrored| mirrored.theirs.clone())
    }

    /// Whether an error is the secondary's no to these rows; any other error is handed back.
    pub(super) fn refusal_of(&self, error: ApplyError) -> Result<Refusal, ApplyError> {
        match error {
            ApplyError::Postgres { doing, source } => {
                let class = source.code().map(|code| classify(code.code()));
                let permanent = match class {
                    Some(Class::Permanent) => true,
                    Some(Class::Unclear) => !self.memory.try_again(self.round, &self.config.writes),
                    Some(Class::Transient) | None => false,
                };
                if permanent {
                    let refusal = Refusal::of(&source);
                    let text = format!("{doing}: {}", refusal.text);
                    Ok(Refusal { text, ..refusal })
                } else {
                    Err(ApplyError::Postgres { doing, source })
                }
            }
            ApplyError::Refused(text) => Ok(Refusal::said(text)),
            other => Err(other),
        }
    }
}

impl Unit<'_> {
    /// Its DDL, as far as it can be read.
    pub(super) fn ddl(&self) -> impl Iterator<Item = DdlRecord> {
        self.changes
            .iter()
            .filter(|change| matches!(change.operation, Operation::Ddl | Operation::DdlOutside))
            .filter_map(|change| DdlRecord::from_change(change).ok())
    }
}

/// Ranges to be tried, the first one last: transactions with a barrier alone.
fn runs<'u, 'a>(units: &'u [Unit<'a>]) -> Vec<Vec<&'u Unit<'a>>> {
    let mut runs: Vec<Vec<&Unit<'_>>> = Vec::new();
    let mut open = false;
    for unit in units {
        if unit.has_barrier() {
            runs.push(vec![unit]);
            open = false;
        } else if let (true, Some(run)) = (open, runs.last_mut()) {
            run.push(unit);
        } else {
            runs.push(vec![unit]);
            open = true;
        }
    }
    runs.reverse();
    runs
}

/// Outside of a try nothing is a surprise.
pub(super) fn failing<T>(written: Result<T, NotWritten>) -> Result<T, ApplyError> {
    written.map_err(|error| match error {
        NotWritten::Failed(error) => error,
        NotWritten::Surprise(what) => ApplyError::Refused(what.to_string()),
    })
}
