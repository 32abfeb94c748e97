//! Writing differences on the secondary, inside a transaction that the caller opened.
//!
//! First the short way, which counts on the invariant and notices by row counts when it does
//! not hold; then, for the same round once more, the careful way, which records what was
//! different and ends at the primary's image all the same.

use std::collections::BTreeMap;

use tokio_postgres::error::SqlState;

use super::difference::{Difference, pair};
use super::pipeline::{ImageArray, Item, run};
use super::refusal::Refusal;
use super::session::Session;
use super::statements::{Source, Writer};
use super::status::Seeding;
use super::{ApplyError, doing, image};
use crate::catalog::{Oid, quote};

/// How a round's rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Short,
    Careful,
}

/// Above this size a cleared table is truncated; below, its rows are deleted, which readers
/// with an older snapshot survive.
const TRUNCATE_BYTES: i64 = 4 * 1024 * 1024;

/// A row stands where a new one goes.
pub(super) fn is_conflict(error: &tokio_postgres::Error) -> bool {
    error
        .code()
        .is_some_and(|code| [SqlState::UNIQUE_VIOLATION, SqlState::EXCLUSION_VIOLATION].contains(code))
}

/// What the row count of a statement must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Anything,
    Exactly(u64),
    /// Each row is a divergence of this table.
    Divergences(Oid),
    /// One row: the watermark that this applier left. None: another one has gone on from it.
    Watermark,
}

/// Statements to send, with what is expected of each.
#[derive(Default)]
pub(super) struct Writes<'a> {
    items: Vec<Item<'a>>,
    expected: Vec<Expect>,
}

impl<'a> Writes<'a> {
    pub(super) fn text(&mut self, text: impl Into<String>) {
        self.items.push(Item::Text(text.into()));
        self.expected.push(Expect::Anything);
    }

    /// Begins the round's transaction and moves the watermark.
    pub(super) fn begin(&mut self, watermark: String) {
        self.text("BEGIN");
        self.push(Item::Text(watermark), Expect::Watermark);
    }

    pub(super) fn items(&self) -> &[Item<'a>] {
        &self.items
    }

    fn push(&mut self, item: Item<'a>, expect: Expect) {
        self.items.push(item);
        self.expected.push(expect);
    }
}

/// Why rows were not written.
pub(super) enum NotWritten {
    /// The secondary is not as it should be: once more, carefully.
    Surprise(Refusal),
    Failed(ApplyError),
}

impl From<ApplyError> for NotWritten {
    fn from(error: ApplyError) -> Self {
        Self::Failed(error)
    }
}

impl Session {
    /// Adds the statements that write these differences.
    pub(super) async fn add_rows<'a>(
        &mut self,
        writes: &mut Writes<'a>,
        differences: &BTreeMap<Oid, Difference<'a>>,
        mode: Mode,
    ) -> Result<(), ApplyError> {
        let cleared: Vec<Oid> = differences
            .iter()
            .filter(|(_, difference)| difference.cleared)
            .map(|(rel, _)| *rel)
            .collect();
        self.clear(writes, &cleared).await?;
        for (&rel, difference) in differences {
            self.add_table(writes, rel, difference, mode).await?;
        }
        Ok(())
    }

    async fn add_table<'a>(
        &mut self,
        writes: &mut Writes<'a>,
        rel: Oid,
        difference: &Difference<'a>,
        mode: Mode,
    ) -> Result<(), ApplyError> {
        let theirs = self.room_for(rel);
        let Some((writer, state)) = self
            .tables
            .get(rel)
            .and_then(|mirrored| Some((mirrored.writer.clone()?, mirrored.state)))
        else {
            // Paused: its changes are left out, and it needs seeding afterwards (round.rs made
            // sure that it is marked so).
            return Ok(());
        };
        let silence = writer.silence();
        if let Some((off, _)) = &silence {
            writes.text(off);
        }
        // Searching by the whole row needs a plan that the keyed statements must never get.
        let keyless = writer.table().key.is_none();
        if keyless {
            writes.text("SET LOCAL enable_hashjoin = on");
        }
        let synced = state == Seeding::Synced || difference.cleared;
        if mode == Mode::Short && synced {
            let (deletes, updates, inserts) = if writer.updates {
                let paired = pair(difference, |image| image::key(image, &writer.key_positions));
                (paired.deletes, paired.updates, paired.inserts)
            } else {
                (difference.gone.clone(), Vec::new(), difference.come.clone())
            };
            let count = deletes.len() as u64;
            if count > 0 {
                let sql = writer.delete(Source::Parameter);
                let item = self.item(rel, sql, vec![ImageArray(deletes)]).await?;
                writes.push(item, Expect::Exactly(count));
            }
            let count = updates.len() as u64;
            if let (true, Some(sql)) = (count > 0, writer.update()) {
                let (olds, news) = updates.into_iter().unzip();
                let item = self.item(rel, sql, vec![ImageArray(olds), ImageArray(news)]).await?;
                writes.push(item, Expect::Exactly(count));
            }
            let count = inserts.len() as u64;
            if count > 0 {
                let sql = writer.insert(Source::Parameter);
                let item = self.item(rel, sql, vec![ImageArray(inserts)]).await?;
                writes.push(item, Expect::Exactly(count));
            }
        } else {
            let record = if synced {
                Expect::Divergences(rel)
            } else {
                Expect::Anything
            };
            if !difference.gone.is_empty() {
                let images = || vec![ImageArray(difference.gone.clone())];
                if synced {
                    let item = self
                        .item(rel, writer.record_missing(Source::Parameter), images())
                        .await?;
                    writes.push(item, record);
                }
                let item = self
                    .item(rel, writer.delete_carefully(Source::Parameter), images())
                    .await?;
                writes.push(item, Expect::Anything);
            }
            if !difference.come.is_empty() {
                let images = || vec![ImageArray(difference.come.clone())];
                for (recording, removing) in writer.make_room(Source::Parameter, &theirs) {
                    if synced {
                        let item = self.item(rel, recording, images()).await?;
                        writes.push(item, record);
                    }
                    let item = self.item(rel, removing, images()).await?;
                    writes.push(item, Expect::Anything);
                }
                let item = self.item(rel, writer.insert(Source::Parameter), images()).await?;
                writes.push(item, Expect::Anything);
            }
        }
        if keyless {
            writes.text("SET LOCAL enable_hashjoin = off");
        }
        if let Some((_, on)) = &silence {
            writes.text(on);
        }
        Ok(())
    }

    async fn item<'a>(&mut self, rel: Oid, sql: String, images: Vec<ImageArray<'a>>) -> Result<Item<'a>, ApplyError> {
        let prepared = self
            .tables
            .prepare(&self.secondary, rel, |_| Some(sql))
            .await
            .map_err(doing("prepare a statement for the secondary"))?;
        prepared
            .map(|statement| Item::Prepared(statement, images))
            .ok_or_else(|| ApplyError::Inconsistent(format!("table {rel} lost its definition inside a round")))
    }

    /// A TRUNCATE on the primary: nothing of what was there before is left. That makes an
    /// unseeded table equal as well.
    pub(super) async fn clear(&mut self, writes: &mut Writes<'_>, rels: &[Oid]) -> Result<(), ApplyError> {
        let locals: Vec<Oid> = rels
            .iter()
            .filter_map(|&rel| self.tables.get(rel).filter(|table| table.writer.is_some())?.local)
            .collect();
        if locals.is_empty() {
            return Ok(());
        }
        let rows = self
            .secondary
            .query(
                "SELECT c.oid, n.nspname::text, c.relname::text, pg_relation_size(c.oid),
                        EXISTS (SELECT FROM pg_constraint k WHERE k.contype = 'f' AND k.confrelid = c.oid AND k.conrelid <> ALL ($1))
                   FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY ($1)",
                &[&locals],
            )
            .await
            .map_err(doing("look at truncated tables"))?;
        // One TRUNCATE of the whole set, as they may refer to each other; not while others, which
        // keep their rows, refer to one of them.
        let large = rows.iter().any(|row| row.get::<_, i64>(3) > TRUNCATE_BYTES);
        let referenced = rows.iter().any(|row| row.get::<_, bool>(4));
        let mut targets = Vec::new();
        let mut waking = Vec::new();
        for row in &rows {
            let target = quote::qualified(row.get(1), row.get(2));
            let writer = self
                .tables
                .iter()
                .find(|table| table.local == Some(row.get::<_, Oid>(0)))
                .and_then(|table| table.writer.as_ref());
            if let Some((off, on)) = writer.and_then(Writer::silence) {
                writes.text(off);
                waking.push(on);
            }
            targets.push(format!("ONLY {target}"));
        }
        if large && !referenced {
            writes.text(format!("TRUNCATE {}", targets.join(", ")));
        } else {
            for target in targets {
                writes.text(format!("DELETE FROM {target}"));
            }
        }
        for on in waking {
            writes.text(on);
        }
        let listed: Vec<String> = rels.iter().map(u32::to_string).collect();
        writes.text(format!(
            "UPDATE pgtandem.seeding SET state = 'synced', note = NULL WHERE rel IN ({}) AND state <> 'synced' AND paused IS NULL",
            listed.join(", ")
        ));
        self.cleared_in_round.extend(rels);
        Ok(())
    }

    /// Sends everything, and looks at the counts.
    pub(super) async fn write(&mut self, writes: &Writes<'_>) -> Result<(), NotWritten> {
        let counts = run(&self.secondary, &writes.items).await;
        self.examine(writes, counts)
    }

    /// Whether what was sent found the secondary as it must be.
    pub(super) fn examine(
        &mut self,
        writes: &Writes<'_>,
        counts: Result<Vec<u64>, tokio_postgres::Error>,
    ) -> Result<(), NotWritten> {
        let counts = match counts {
            Ok(counts) => counts,
            Err(error) if is_conflict(&error) => {
                return Err(NotWritten::Surprise(Refusal::of(&error)));
            }
            Err(error) => return Err(NotWritten::Failed(doing("apply a round")(error))),
        };
        for (count, expect) in counts.iter().zip(&writes.expected) {
            match *expect {
                Expect::Anything => {}
                Expect::Exactly(expected) if *count == expected => {}
                Expect::Exactly(expected) => {
                    return Err(NotWritten::Surprise(Refusal::rows(expected, *count)));
                }
                Expect::Divergences(rel) => {
                    if *count > 0 {
                        *self.diverged_in_round.entry(rel).or_default() += count;
                    }
                }
                Expect::Watermark if *count == 1 => {}
                Expect::Watermark => return Err(NotWritten::Failed(ApplyError::overtaken())),
            }
        }
        Ok(())
    }
}
