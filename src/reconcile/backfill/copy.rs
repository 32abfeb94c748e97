//! One worker: copies ranges, each in one transaction on the secondary, out of the snapshot of
//! the round at whose end the secondary stands.
//!
//! The transaction locks the watermark for sharing and finds it at that round, so no applier,
//! this proxy's or another's, can write on until it has ended, however long it takes and whoever
//! believes to hold the cut. What is on the secondary of the range is what mirroring has brought,
//! equal to the primary at this cut; it is removed and the range's rows come instead, so nothing
//! can collide, and a row that is deleted on the primary is in neither.

use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt, pin_mut};
use tokio_postgres::error::SqlState;

use super::plan::{Format, Plan, Range, copying_settings};
use crate::apply::refusal::{Class, Refusal, classify};
use crate::apply::{Cut, applier_purpose};
use crate::catalog::Oid;
use crate::config::Target;
use crate::control::Epoch;
use crate::upstream::control::{ConnectError, Control, connect, error_chain};

/// Rows are passed on in pieces of this size.
const PIECE_BYTES: usize = 64 * 1024;

/// Rows that may be refused of any table, whatever their share.
const REFUSED_ALWAYS: u64 = 10;

/// What is copied in one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// Empties the table on the secondary; its ranges follow.
    Begin,
    Range(Range),
    /// Both at once: a small table, or one without a key.
    Whole,
}

impl Part {
    /// The number under which it is recorded.
    const fn number(&self) -> i64 {
        match self {
            Self::Begin => 0,
            Self::Range(range) => range.number,
            Self::Whole => 1,
        }
    }
}

/// What became of a part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Copied {
    pub read: u64,
    /// Of those, rows that mirroring had brought before.
    pub skipped: u64,
    /// Of those, rows that the secondary refused.
    pub failed: u64,
    pub bytes: u64,
}

/// How many rows of the table may be refused on the whole, and have been.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tolerance {
    pub expected: u64,
    pub per_cent: f64,
    pub failed: u64,
}

impl Tolerance {
    fn allows(&self, more: u64) -> bool {
        let failed = self.failed + more;
        failed <= REFUSED_ALWAYS || failed as f64 <= self.expected as f64 * self.per_cent / 100.0
    }
}

/// Why a part was not copied; nothing of it was.
#[derive(Debug)]
pub(super) enum NotCopied {
    /// The secondary has gone on from the cut.
    Moved,
    /// The table is not as it was when the plan was made.
    Reshaped,
    /// Its state on the secondary is another one: something happened to it as a whole.
    Turned { state: String, why: Option<String> },
    /// Somebody has a lock on the table, on either side. Waiting for it would keep mirroring from
    /// going on.
    Busy(String),
    /// May pass.
    Failing(String),
    /// Will not.
    Never(String),
    /// More rows were refused than may be.
    TooMany(String),
}

impl NotCopied {
    pub(super) fn of(doing: &str, error: &tokio_postgres::Error) -> Self {
        let text = format!("{doing}: {}", error_chain(error));
        if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Self::Busy(text);
        }
        match error.code().map(|code| classify(code.code())) {
            Some(Class::Permanent) => Self::Never(text),
            Some(Class::Transient | Class::Unclear) | None => Self::Failing(text),
        }
    }
}

impl From<ConnectError> for NotCopied {
    fn from(error: ConnectError) -> Self {
        Self::Failing(error.to_string())
    }
}

fn doing(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> NotCopied {
    move |error| NotCopied::of(doing, &error)
}

/// Columns and tables are looked up as they are now, not as of the snapshot that is read: what is
/// missing was changed by DDL that is on its way to the secondary, where the plan is found outdated
/// once it has come.
fn not_read(error: tokio_postgres::Error) -> NotCopied {
    const GONE: [SqlState; 4] = [
        SqlState::UNDEFINED_TABLE,
        SqlState::UNDEFINED_COLUMN,
        SqlState::UNDEFINED_FUNCTION,
        SqlState::UNDEFINED_OBJECT,
    ];
    const DOING: &str = "read rows on the primary";
    if error.code().is_some_and(|code| GONE.contains(code)) {
        return NotCopied::Failing(format!("{DOING}: {}", error_chain(&error)));
    }
    NotCopied::of(DOING, &error)
}

/// A stretch of rows that was refused.
struct Refused {
    refusal: Refusal,
    /// Which row, counted from 1, where the server said so.
    line: Option<u64>,
    rows: u64,
    first: Option<Bytes>,
}

enum Streamed {
    Done { rows: u64, bytes: u64 },
    Refused(Refused),
}

pub(super) struct Worker {
    source: Control,
    target: Control,
    epoch: Epoch,
    stages: HashSet<Oid>,
}

impl Worker {
    /// Whoever takes the applier's lease after us ends these connections with the applier's own.
    pub(super) async fn connect(primary: &Target, secondary: &Target, epoch: Epoch) -> Result<Self, NotCopied> {
        let purpose = applier_purpose(epoch);
        let (source, target) = tokio::try_join!(connect(primary, &purpose), connect(secondary, &purpose))?;
        let settings = copying_settings();
        source
            .batch_execute(&settings)
            .await
            .map_err(doing("prepare reading on the primary"))?;
        target
            .batch_execute(&format!("{settings} SET session_replication_role = replica"))
            .await
            .map_err(doing("prepare writing on the secondary"))?;
        Ok(Self {
            source,
            target,
            epoch,
            stages: HashSet::new(),
        })
    }

    /// Takes over a round's snapshot; while the cut is held.
    pub(super) async fn enter(&self, snapshot: &str) -> Result<(), NotCopied> {
        self.source
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{snapshot}'"
            ))
            .await
            // Whatever the reason (it may be gone, which is 22023): the next cut has another one.
            .map_err(|error| NotCopied::Failing(format!("take over a round's snapshot: {}", error_chain(&error))))
    }

    pub(super) async fn leave(&self) -> Result<(), NotCopied> {
        self.source
            .batch_execute("COMMIT")
            .await
            .map_err(doing("end the reading of a range"))
    }

    /// Copies one part, or nothing of it.
    pub(super) async fn copy(
        &mut self,
        plan: &Plan,
        part: &Part,
        cut: &Cut,
        tolerance: Tolerance,
    ) -> Result<Copied, NotCopied> {
        self.make_stage(plan, part).await?;
        self.target
            .batch_execute("BEGIN")
            .await
            .map_err(doing("begin a range on the secondary"))?;
        let copied = self.copy_inside(plan, part, cut, tolerance).await;
        match &copied {
            Ok(_) => self
                .target
                .batch_execute("COMMIT")
                .await
                .map_err(doing("commit a range"))?,
            // A connection that is gone has rolled back by itself.
            Err(_) => self.target.batch_execute("ROLLBACK").await.unwrap_or_default(),
        }
        copied
    }

    async fn copy_inside(
        &self,
        plan: &Plan,
        part: &Part,
        cut: &Cut,
        tolerance: Tolerance,
    ) -> Result<Copied, NotCopied> {
        self.stand_at(cut).await?;
        self.look_at_table(plan, part).await?;
        if let Some((off, _)) = &plan.silence {
            self.target
                .batch_execute(off)
                .await
                .map_err(doing("silence triggers"))?;
        }
        let copied = match part {
            Part::Begin => {
                self.begin_table(plan).await?;
                Copied::default()
            }
            Part::Whole => {
                self.begin_table(plan).await?;
                self.copy_rows(plan, part, None, tolerance).await?
            }
            Part::Range(range) => self.copy_rows(plan, part, Some(range), tolerance).await?,
        };
        if let Some((_, on)) = &plan.silence {
            self.target
                .batch_execute(on)
                .await
                .map_err(doing("wake triggers again"))?;
        }
        if *part != Part::Begin {
            self.record(plan, part, copied).await?;
        }
        Ok(copied)
    }

    /// Keeps every applier from writing until this transaction has ended.
    async fn stand_at(&self, cut: &Cut) -> Result<(), NotCopied> {
        let found = self
            .target
            .query_opt(
                "SELECT FROM pgtandem.watermark WHERE round = $1 AND epoch = $2 FOR SHARE",
                &[&(cut.round as i64), &(self.epoch.0 as i64)],
            )
            .await
            .map_err(doing("hold the cut"))?;
        found.map(|_row| ()).ok_or(NotCopied::Moved)
    }

    async fn look_at_table(&self, plan: &Plan, part: &Part) -> Result<(), NotCopied> {
        let row = self
            .target
            .query_opt(
                "SELECT state, paused, note, (schema, name, columns) = ($2, $3, $4) FROM pgtandem.seeding WHERE rel = $1",
                &[&plan.rel, &plan.schema, &plan.name, &plan.recorded_columns],
            )
            .await
            .map_err(doing("look at a table's state"))?;
        let Some(row) = row else {
            return Err(NotCopied::Turned {
                state: "gone".into(),
                why: Some("it was dropped".into()),
            });
        };
        let (state, paused, note): (String, Option<String>, Option<String>) = (row.get(0), row.get(1), row.get(2));
        if let Some(paused) = paused {
            return Err(NotCopied::Turned {
                state,
                why: Some(format!("its mirroring is paused: {paused}")),
            });
        }
        let begins = matches!(part, Part::Begin | Part::Whole);
        if state == "synced" || (state != "seeding" && !begins) {
            return Err(NotCopied::Turned { state, why: note });
        }
        if row.get(3) { Ok(()) } else { Err(NotCopied::Reshaped) }
    }

    /// From here on what the secondary has of the table is a part of what the primary has: what
    /// stands there, wherever it came from, goes; what is held of it in quarantine is void, since
    /// its rows come as they are on the primary now.
    async fn begin_table(&self, plan: &Plan) -> Result<(), NotCopied> {
        let target = &self.target;
        target
            .batch_execute(&format!("DELETE FROM ONLY {}", plan.target()))
            .await
            .map_err(doing("empty a table on the secondary"))?;
        target
            .execute(
                "SELECT pgtandem.void_held($1, 'its rows are copied anew by a backfill')",
                &[&plan.rel],
            )
            .await
            .map_err(doing("void what is held of a table"))?;
        let signature = plan.key.as_ref().map(super::plan::Key::signature);
        for (sql, parameters) in [
            (
                "UPDATE pgtandem.seeding SET state = 'seeding', note = NULL WHERE rel = $1",
                &[&plan.rel as _][..],
            ),
            ("DELETE FROM pgtandem.backfill_range WHERE rel = $1", &[&plan.rel as _]),
            (
                "DELETE FROM pgtandem.backfill_refused WHERE rel = $1",
                &[&plan.rel as _],
            ),
            (
                "UPDATE pgtandem.backfill_table SET state = 'copying', key = $2, note = NULL WHERE rel = $1",
                &[&plan.rel as _, &signature as _],
            ),
        ] {
            target
                .execute(sql, parameters)
                .await
                .map_err(doing("record the beginning of a table"))?;
        }
        Ok(())
    }

    async fn copy_rows(
        &self,
        plan: &Plan,
        part: &Part,
        range: Option<&Range>,
        tolerance: Tolerance,
    ) -> Result<Copied, NotCopied> {
        self.target
            .batch_execute("SAVEPOINT range")
            .await
            .map_err(doing("set a savepoint"))?;
        let staged = range.is_some() && plan.key.as_ref().is_some_and(|key| !key.sorts_alike);
        let mut copied = Copied::default();
        if range.is_some() && !staged {
            copied.skipped = self
                .target
                .execute(&plan.clear(range), &[])
                .await
                .map_err(doing("remove what mirroring has brought"))?;
        }
        match self.stream(plan, &plan.read(range), plan.format, staged).await? {
            (Streamed::Done { rows, bytes }, skipped) => {
                copied.read = rows;
                copied.bytes = bytes;
                copied.skipped += skipped;
            }
            (Streamed::Refused(_), _) => {
                copied = self.set_aside(plan, part, range, staged, tolerance).await?;
            }
        }
        Ok(copied)
    }

    /// Once per connection and table; outside of a range's transaction, which may be rolled back.
    async fn make_stage(&mut self, plan: &Plan, part: &Part) -> Result<(), NotCopied> {
        let sorts_alike = plan.key.as_ref().is_none_or(|key| key.sorts_alike);
        if sorts_alike || !matches!(part, Part::Range(_)) || self.stages.contains(&plan.rel) {
            return Ok(());
        }
        self.target
            .batch_execute(&plan.create_stage())
            .await
            .map_err(doing("create a stage on the secondary"))?;
        self.stages.insert(plan.rel);
        Ok(())
    }

    /// Finds the rows that the secondary refuses, stores them with the error, and writes the
    /// others. The range is taken apart where the server says that it failed, or in halves where
    /// it does not say.
    async fn set_aside(
        &self,
        plan: &Plan,
        part: &Part,
        range: Option<&Range>,
        staged: bool,
        tolerance: Tolerance,
    ) -> Result<Copied, NotCopied> {
        let target = &self.target;
        let mut copied = Copied::default();
        target
            .batch_execute("ROLLBACK TO SAVEPOINT range")
            .await
            .map_err(doing("go back to the beginning of a range"))?;
        if range.is_some() && !staged {
            copied.skipped = target
                .execute(&plan.clear(range), &[])
                .await
                .map_err(doing("remove what mirroring has brought"))?;
        }
        let mut stretches = vec![(0_u64, None::<u64>)];
        while let Some((from, to)) = stretches.pop() {
            if to == Some(from) {
                continue;
            }
            target
                .batch_execute("SAVEPOINT stretch")
                .await
                .map_err(doing("set a savepoint"))?;
            match self
                .stream(plan, &plan.read_part(range, from, to), Format::Text, staged)
                .await?
            {
                (Streamed::Done { rows, bytes }, skipped) => {
                    copied.read += rows;
                    copied.bytes += bytes;
                    copied.skipped += skipped;
                    let release = if staged {
                        format!("RELEASE stretch; DELETE FROM {}", plan.stage())
                    } else {
                        "RELEASE stretch".to_owned()
                    };
                    target.batch_execute(&release).await.map_err(doing("keep rows"))?;
                }
                (Streamed::Refused(refused), _) => {
                    target
                        .batch_execute("ROLLBACK TO SAVEPOINT stretch; RELEASE stretch")
                        .await
                        .map_err(doing("go back before refused rows"))?;
                    match (refused.rows, refused.first) {
                        (1, Some(line)) => {
                            copied.read += 1;
                            copied.failed += 1;
                            copied.bytes += line.len() as u64;
                            self.store_refused(plan, part, &line, &refused.refusal).await?;
                            if !tolerance.allows(copied.failed) {
                                return Err(NotCopied::TooMany(format!(
                                    "the secondary refuses more rows of {} than backfill.error_threshold allows ({} per cent, {} rows so far); the last error: {}",
                                    plan.target(),
                                    tolerance.per_cent,
                                    tolerance.failed + copied.failed,
                                    refused.refusal
                                )));
                            }
                        }
                        // All read and none there: the refusal is not about a row.
                        (0, _) => return Err(NotCopied::Never(refused.refusal.to_string())),
                        (rows, _) => {
                            let line = refused.line.filter(|line| (1..=rows).contains(line));
                            match line {
                                Some(line) => stretches.extend([
                                    (from + line, to),
                                    (from + line - 1, Some(from + line)),
                                    (from, Some(from + line - 1)),
                                ]),
                                None => stretches.extend([(from + rows / 2, to), (from, Some(from + rows / 2))]),
                            }
                        }
                    }
                }
            }
        }
        Ok(copied)
    }

    async fn store_refused(&self, plan: &Plan, part: &Part, line: &[u8], refusal: &Refusal) -> Result<(), NotCopied> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        self.target
            .execute(
                "INSERT INTO pgtandem.backfill_refused (rel, number, schema, name, sqlstate, error, columns, line)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
                &[
                    &plan.rel,
                    &part.number(),
                    &plan.schema,
                    &plan.name,
                    &refusal.sqlstate.as_deref().unwrap_or_default(),
                    &refusal.text,
                    &plan.columns,
                    &line,
                ],
            )
            .await
            .map_err(doing("set a refused row aside"))?;
        Ok(())
    }

    /// From the primary to the secondary; with a stage, from there into the table, and how many
    /// rows that replaced. The proxy holds one piece of it.
    async fn stream(
        &self,
        plan: &Plan,
        read: &str,
        format: Format,
        staged: bool,
    ) -> Result<(Streamed, u64), NotCopied> {
        let into = if staged { plan.stage() } else { plan.target() };
        let sink = self
            .target
            .copy_in::<_, Bytes>(&plan.write(&into, format))
            .await
            .map_err(doing("write rows on the secondary"))?;
        let rows = self.source.copy_out(read).await.map_err(not_read)?;
        pin_mut!(rows, sink);
        let (mut messages, mut bytes, mut first) = (0, 0, None);
        let mut piece = BytesMut::with_capacity(PIECE_BYTES * 2);
        while let Some(row) = rows.next().await {
            let row = row.map_err(not_read)?;
            messages += 1;
            bytes += row.len() as u64;
            piece.extend_from_slice(&row);
            if first.is_none() {
                first = Some(row);
            }
            if piece.len() >= PIECE_BYTES && sink.send(piece.split().freeze()).await.is_err() {
                // What the server said against it comes at the end.
                break;
            }
        }
        if !piece.is_empty() {
            sink.feed(piece.freeze()).await.ok();
        }
        let count = format.rows(messages);
        let written = match sink.finish().await {
            Ok(_) if staged => self.unstage(plan).await,
            Ok(_) => Ok(0),
            Err(error) => Err(error),
        };
        match written {
            Ok(skipped) => Ok((Streamed::Done { rows: count, bytes }, skipped)),
            Err(error) if is_about_a_row(&error) => Ok((
                Streamed::Refused(Refused {
                    refusal: Refusal::of(&error),
                    line: line_of(&error),
                    rows: count,
                    first,
                }),
                0,
            )),
            Err(error) => Err(NotCopied::of("write rows on the secondary", &error)),
        }
    }

    async fn unstage(&self, plan: &Plan) -> Result<u64, tokio_postgres::Error> {
        let Some(key) = &plan.key else { return Ok(0) };
        let replaced = self.target.execute(&plan.clear_staged(key), &[]).await?;
        self.target.execute(&plan.write_staged(), &[]).await?;
        Ok(replaced)
    }

    async fn record(&self, plan: &Plan, part: &Part, copied: Copied) -> Result<(), NotCopied> {
        let range = match part {
            Part::Range(range) => Some(range),
            Part::Begin | Part::Whole => None,
        };
        let low = range.and_then(|range| range.keys.after.as_ref());
        let high = range.and_then(|range| range.keys.upto.as_ref());
        self.target
            .execute(
                "INSERT INTO pgtandem.backfill_range (rel, number, low, high, read, skipped, failed, bytes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
                 ON CONFLICT (rel, number) DO UPDATE SET low = EXCLUDED.low, high = EXCLUDED.high, read = EXCLUDED.read,
                     skipped = EXCLUDED.skipped, failed = EXCLUDED.failed, bytes = EXCLUDED.bytes",
                &[
                    &plan.rel,
                    &part.number(),
                    &low,
                    &high,
                    &(copied.read as i64),
                    &(copied.skipped as i64),
                    &(copied.failed as i64),
                    &(copied.bytes as i64),
                ],
            )
            .await
            .map_err(doing("record a range"))?;
        Ok(())
    }

    /// A plan that changed has another stage.
    pub(super) fn forget_stage(&mut self, rel: Oid) {
        self.stages.remove(&rel);
    }

    pub(super) fn is_lost(&self) -> bool {
        self.source.is_closed() || self.target.is_closed()
    }
}

/// Whether the secondary said no to a value or a row (data exceptions, constraints, limits, or a
/// function of the application), rather than to the statement.
fn is_about_a_row(error: &tokio_postgres::Error) -> bool {
    let Some(code) = error.code() else { return false };
    matches!(
        code.code().get(..2),
        Some("22" | "23" | "44" | "54" | "P0" | "38" | "39")
    )
}

/// Out of `COPY t, line 5, column c: "…"`.
fn line_of(error: &tokio_postgres::Error) -> Option<u64> {
    let context = error.as_db_error()?.where_()?;
    line_in(context)
}

fn line_in(context: &str) -> Option<u64> {
    // The table's name may contain anything, so the last "line N" of COPY's own line counts.
    let line = context.lines().rev().find(|line| line.starts_with("COPY "))?;
    let (_, rest) = line.split_once(", line ")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_copy_failed() {
        assert_eq!(line_in("COPY t, line 5, column a: \"x\""), Some(5));
        assert_eq!(line_in("SQL function \"f\"\nCOPY t, line 17"), Some(17));
        assert_eq!(line_in("PL/pgSQL function f() line 3 at RAISE"), None);
        assert_eq!(line_in("COPY t"), None);
    }

    #[test]
    fn how_much_may_be_refused() {
        let tolerance = Tolerance {
            expected: 100_000,
            per_cent: 0.1,
            failed: 90,
        };
        assert!(tolerance.allows(10));
        assert!(!tolerance.allows(11));
        let small = Tolerance {
            expected: 5,
            per_cent: 0.1,
            failed: 0,
        };
        assert!(small.allows(10));
        assert!(!small.allows(11));
    }
}
