//! A backlog, or one transaction, too large to hold in memory.
//!
//! The target snapshot stays, and whole transactions are applied up to a position at a time:
//! `(target, position)` is stored with the rows, so a crash resumes there, and only the end is a
//! cut. The rows of a piece stream from one server into a table of the other, which computes
//! the difference itself: the proxy holds one chunk of a stream, whatever a transaction's size.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::{SinkExt, StreamExt, pin_mut};

use super::held::Unit;
use super::isolate::failing;
use super::plan::{DdlRecord, adds_label};
use super::refusal::Refusal;
use super::round::{Ending, Stop, shapes_after, wait_flushed};
use super::rows::{Mode, NotWritten, is_conflict};
use super::session::{Session, Target};
use super::statements::{Source, Writer};
use super::status::Seeding;
use super::{ApplyError, doing};
use crate::catalog::Oid;
use crate::journal::read::{Change, Operation, Shape, Shapes, Unsigned, lsn, window_sql};

/// A part of a piece between two barriers: positions above the first, up to the second.
pub(super) type Span = (u64, u64);

/// What must be known of a backlog before its rows are read.
pub(super) struct Backlog {
    window: String,
    /// The same and what came since.
    up_to_now: String,
    /// Tables whose rows have another shape on the secondary.
    shapes: Shapes,
    /// Positions at which pieces end, ascending; the last is the backlog's end.
    ends: Vec<u64>,
    /// DDL, by position.
    ddl: Vec<Ddl>,
    /// Transactions that contain a barrier: their changes are placed one by one, and not cut
    /// through.
    barrier_xids: Vec<u64>,
    spans: Vec<Span>,
    /// Transactions by the end of the stretch that they are in.
    transactions: BTreeMap<u64, u64>,
}

struct Ddl {
    position: u64,
    xid: u64,
    operation: Operation,
    context: Option<Vec<u8>>,
    statement: Option<Vec<u8>>,
    /// Why it cannot be read, otherwise.
    record: Result<DdlRecord, String>,
}

impl Ddl {
    fn change(&self) -> Change<'_> {
        Change {
            position: self.position,
            xid: self.xid,
            rel: 0,
            operation: self.operation,
            old: self.context.as_deref(),
            new: self.statement.as_deref(),
        }
    }
}

impl Backlog {
    fn transactions_in(&self, span: Span) -> usize {
        self.transactions
            .range(span.0 + 1..=span.1)
            .map(|(_, count)| *count as usize)
            .sum()
    }

    /// Whether a DDL statement of this span cannot be read.
    fn is_bad(&self, span: Span) -> bool {
        self.ddl.iter().any(|ddl| {
            ddl.operation == Operation::Ddl && ddl.record.is_err() && span.0 < ddl.position && ddl.position <= span.1
        })
    }

    /// A change's place, of a journal row `w` whose transaction's highest position is `t.top`.
    fn place_sql(&self) -> String {
        if self.barrier_xids.is_empty() {
            "t.top".to_owned()
        } else {
            format!(
                "CASE WHEN w.xid = ANY ({}) THEN w.pos ELSE t.top END",
                xid_array(&self.barrier_xids)
            )
        }
    }

    /// The rows of a span, as a source for FROM: `p.place` and the journal's columns.
    pub(super) fn rows_sql(&self, span: Span) -> String {
        let within = format!("place > '{}' AND place <= '{}'", lsn(span.0), lsn(span.1));
        let rows = self
            .shapes
            .backlog_sql(&self.window, &self.up_to_now, &self.place_sql(), &within);
        format!("{rows} p")
    }

    pub(super) fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The DDL records of a span inside transactions, as one unit.
    pub(super) fn ddl_in(&self, span: Span) -> Unit<'_> {
        let inside = |ddl: &&Ddl| ddl.operation == Operation::Ddl && span.0 < ddl.position && ddl.position <= span.1;
        let changes: Vec<Change<'_>> = self.ddl.iter().filter(inside).map(Ddl::change).collect();
        Unit {
            xid: changes.first().map_or(0, |change| change.xid),
            order: 0,
            changes,
        }
    }
}

impl Session {
    /// Goes on where an earlier session was interrupted in the middle of a target.
    pub(super) async fn finish_interrupted(&mut self) -> Result<(), ApplyError> {
        if let Some(text) = self.outside.take() {
            let record: DdlRecord =
                serde_json::from_str(&text).map_err(|error| ApplyError::Inconsistent(error.to_string()))?;
            self.run_outside(&record).await?;
        }
        if let Some(target) = self.target.clone() {
            tracing::info!(
                target = %target.snapshot,
                position = lsn(target.piece),
                "going on in the middle of a backlog"
            );
            self.apply_in_pieces(target).await?;
        }
        Ok(())
    }

    /// Applies everything up to the target, from `target.piece` on. The number of changes.
    pub(super) async fn apply_in_pieces(&mut self, mut target: Target) -> Result<usize, ApplyError> {
        let backlog = self.survey(&target).await?;
        let mut total = 0;
        let ends: Vec<u64> = backlog.ends.iter().copied().filter(|&end| end > target.piece).collect();
        for (index, &end) in ends.iter().enumerate() {
            let last = index + 1 == ends.len();
            let outside = backlog
                .ddl
                .iter()
                .find(|ddl| ddl.position == end && ddl.operation == Operation::DdlOutside);
            let stop = match outside.map(|ddl| &ddl.record) {
                // Where DDL outside transactions comes last, the watermark must say so first.
                Some(Ok(record)) => Stop::Outside(end, record),
                Some(Err(_)) => Stop::Piece(end),
                None if last => Stop::Target,
                None => Stop::Piece(end),
            };
            let piece = Piece {
                span: (target.piece, end),
                stop,
            };
            total += self.apply_or_walk(&backlog, &target, &piece).await?;
            target.piece = end;
            if let Some(ddl) = outside {
                match &ddl.record {
                    Ok(record) => self.run_outside(record).await?,
                    Err(error) => self.hold_outside_change(&ddl.change(), error).await?,
                }
                if last {
                    self.end_target(&target).await?;
                }
            }
        }
        if ends.is_empty() {
            self.end_target(&target).await?;
        }
        self.target = None;
        self.held_of_read.clear();
        self.since = target.snapshot.clone();
        self.durable = target.snapshot;
        self.position = target.position;
        self.progress.changes += total as u64;
        Ok(total)
    }

    /// A piece as a whole; where something of it is refused, or held already, in parts that fit
    /// into memory (walk.rs).
    async fn apply_or_walk(
        &mut self,
        backlog: &Backlog,
        target: &Target,
        piece: &Piece<'_>,
    ) -> Result<usize, ApplyError> {
        if self.held.is_empty() && !backlog.is_bad(piece.span) {
            match self.apply_whole(backlog, target, piece, Reading::Rounds).await? {
                Ok(count) => return Ok(count),
                Err(refusal) => {
                    tracing::warn!(%refusal, "the secondary refuses something of this piece; looking for what");
                }
            }
        }
        self.walk(backlog, target, piece).await
    }

    /// The short way, then the careful one. A refusal leaves nothing done.
    pub(super) async fn apply_whole(
        &mut self,
        backlog: &Backlog,
        target: &Target,
        piece: &Piece<'_>,
        reading: Reading,
    ) -> Result<Result<usize, Refusal>, ApplyError> {
        let refusal = match self.apply_piece(backlog, target, piece, Mode::Short, reading).await {
            Ok(count) => return Ok(Ok(count)),
            Err(NotWritten::Failed(error)) => self.refusal_of(error)?,
            Err(NotWritten::Surprise(what)) => {
                self.roll_back().await?;
                tracing::warn!(
                    %what,
                    "the secondary is not as it should be, applying this piece carefully"
                );
                let rels = self.tables.rels();
                self.learn_uniques(&rels).await?;
                match self.apply_piece(backlog, target, piece, Mode::Careful, reading).await {
                    Ok(count) => return Ok(Ok(count)),
                    Err(NotWritten::Failed(error)) => self.refusal_of(error)?,
                    Err(NotWritten::Surprise(what)) => what,
                }
            }
        };
        self.roll_back().await?;
        Ok(Err(refusal))
    }

    /// The target is reached and nothing is left to write but that.
    async fn end_target(&mut self, target: &Target) -> Result<(), ApplyError> {
        wait_flushed(&self.aside, target.position, 0).await?;
        self.begin_counting(0);
        let mut writes = super::rows::Writes::default();
        writes.begin(self.watermark_sql(&Ending {
            end: target,
            stop: Stop::Target,
            flushed: 0,
        }));
        failing(self.write(&writes).await)?;
        failing(self.commit().await)
    }

    /// One scan of the backlog: where pieces end, and what must not be cut through.
    async fn survey(&mut self, target: &Target) -> Result<Backlog, ApplyError> {
        let window = window_sql(&self.since, Some(&target.snapshot));
        let up_to_now = window_sql(&self.since, None);
        let primary = &self.primary;
        primary
            .batch_execute(READ_BACKLOG)
            .await
            .map_err(doing("survey a backlog"))?;
        let barriers = primary
            .query(
                &format!(
                    "SELECT pos, xid, rel, op, old, new, pg_visible_in_snapshot(xid, '{}'::pg_snapshot)
                       FROM {up_to_now} w WHERE op IN ('T', 'S', 'O') ORDER BY pos",
                    target.snapshot
                ),
                &[],
            )
            .await
            .map_err(doing("look for DDL in a backlog"))?;
        let tops = primary
            .query(
                &format!(
                    "SELECT max(top), count(*) FROM (
                        SELECT top, floor((sum(bytes) OVER (ORDER BY top) - bytes) / {piece_bytes}) AS piece
                          FROM (SELECT xid, max(pos) AS top, sum(48 + COALESCE(octet_length(old), 0) + COALESCE(octet_length(new), 0)) AS bytes
                                  FROM {window} w GROUP BY xid) t) p
                      GROUP BY piece ORDER BY 1",
                    piece_bytes = self.config.piece_bytes
                ),
                &[],
            )
            .await
            .map_err(doing("measure a backlog"))?;
        let mut ddl = Vec::new();
        let mut later_ddl = Vec::new();
        let mut barrier_xids = BTreeSet::new();
        let mut label_xids = BTreeSet::new();
        for row in &barriers {
            let change = Change::from_row(row).map_err(|error| ApplyError::Inconsistent(error.to_string()))?;
            let in_target: bool = row.get(6);
            if in_target && adds_label(&change) {
                label_xids.insert(change.xid);
            }
            if in_target {
                barrier_xids.insert(change.xid);
            }
            if change.operation == Operation::Truncate {
                continue;
            }
            let record = DdlRecord::from_change(&change).map_err(|error| error.to_string());
            later_ddl.extend(record.clone());
            if in_target {
                ddl.push(Ddl {
                    position: change.position,
                    xid: change.xid,
                    operation: change.operation,
                    context: change.old.map(<[u8]>::to_vec),
                    statement: change.new.map(<[u8]>::to_vec),
                    record,
                });
            }
        }
        let barrier_xids: Vec<u64> = barrier_xids.into_iter().collect();
        let spans = self.spans_of(&window, &barrier_xids).await?;
        let label_xids: Vec<u64> = label_xids.into_iter().collect();
        let labelled = self.spans_of(&window, &label_xids).await?;
        // The definitions are compared as of now, so DDL up to now counts.
        let rels = self
            .primary
            .query(&format!("SELECT DISTINCT rel FROM {window} w WHERE rel <> 0"), &[])
            .await
            .map_err(doing("list the tables of a backlog"))?;
        let rels: BTreeSet<Oid> = rels.iter().flat_map(|row| self.faces.of(row.get(0))).collect();
        let rels: Vec<Oid> = rels.into_iter().collect();
        let shapes: Vec<Shape> = self
            .reader
            .shapes_of(&self.primary, &rels)
            .await
            .map_err(doing("read the definitions of changed tables"))?;
        self.end_read().await?;
        self.adopt_unknown(&rels, later_ddl.iter()).await?;
        let expected: HashMap<Oid, Shape> = shapes_after(later_ddl.iter());
        self.pause_changed_tables(&rels, &shapes, &expected).await?;

        let transactions: BTreeMap<u64, u64> = tops
            .iter()
            .map(|row| (row.get::<_, Unsigned>(0).0, row.get::<_, i64>(1) as u64))
            .collect();
        let mut ends: BTreeSet<u64> = transactions.keys().copied().collect();
        let end = ends.last().copied();
        ends.extend(labelled.iter().map(|&(_, last)| last));
        ends.retain(|&at| Some(at) == end || !spans.iter().any(|&(first, last)| first <= at && at < last));
        ends.extend(
            ddl.iter()
                .filter(|ddl| ddl.operation == Operation::DdlOutside)
                .map(|ddl| ddl.position),
        );
        Ok(Backlog {
            window,
            up_to_now,
            shapes: self.faces.shapes(),
            ends: ends.into_iter().collect(),
            ddl,
            barrier_xids,
            spans,
            transactions,
        })
    }

    async fn spans_of(&self, window: &str, xids: &[u64]) -> Result<Vec<Span>, ApplyError> {
        if xids.is_empty() {
            return Ok(Vec::new());
        }
        let rows = self
            .primary
            .query(
                &format!(
                    "SELECT min(pos), max(pos) FROM {window} w WHERE xid = ANY ({}) GROUP BY xid",
                    xid_array(xids)
                ),
                &[],
            )
            .await
            .map_err(doing("place transactions with DDL"))?;
        Ok(rows
            .iter()
            .map(|row| (row.get::<_, Unsigned>(0).0, row.get::<_, Unsigned>(1).0))
            .collect())
    }

    async fn apply_piece(
        &mut self,
        backlog: &Backlog,
        target: &Target,
        piece: &Piece<'_>,
        mode: Mode,
        reading: Reading,
    ) -> Result<usize, NotWritten> {
        self.begin_counting(backlog.transactions_in(piece.span));
        let ending = piece.ending(target);
        let mut writes = super::rows::Writes::default();
        writes.begin(self.watermark_sql(&ending));
        writes.text("TRUNCATE pgtandem.staged");
        self.write(&writes).await?;
        let count = self.stage(backlog, piece.span, reading).await?;
        self.secondary
            .batch_execute("ANALYZE pgtandem.staged")
            .await
            .map_err(doing("analyze a piece"))?;
        let mut has_ddl = false;
        let mut from = piece.span.0;
        for ddl in &backlog.ddl {
            if ddl.operation != Operation::Ddl || ddl.position <= piece.span.0 || ddl.position > piece.span.1 {
                continue;
            }
            let record = match &ddl.record {
                Ok(record) => record,
                Err(error) => return Err(ApplyError::Refused(error.clone()).into()),
            };
            self.write_span((from, ddl.position), mode).await?;
            self.run_ddl(record).await?;
            has_ddl = true;
            from = ddl.position;
        }
        self.write_span((from, piece.span.1), mode).await?;
        wait_flushed(&self.aside, target.position, 0).await?;
        self.commit().await?;
        self.reached(&ending);
        if has_ddl {
            self.reload_tables().await?;
        }
        Ok(count)
    }

    /// Streams a piece's rows from the primary's journal into `pgtandem.staged`.
    pub(super) async fn stage(&self, backlog: &Backlog, span: Span, reading: Reading) -> Result<usize, ApplyError> {
        let primary = match reading {
            Reading::Rounds => &self.primary,
            Reading::Aside => &self.aside,
        };
        primary
            .batch_execute(READ_BACKLOG)
            .await
            .map_err(doing("read a piece"))?;
        let sql = format!(
            "COPY (SELECT rel, op, place, old, new FROM {}) TO STDOUT",
            backlog.rows_sql(span)
        );
        let rows = primary.copy_out(&sql).await.map_err(doing("read a piece"))?;
        let sink = self
            .secondary
            .copy_in::<_, bytes::Bytes>("COPY pgtandem.staged (rel, op, pos, old, new) FROM STDIN")
            .await
            .map_err(doing("stage a piece"))?;
        pin_mut!(rows, sink);
        while let Some(chunk) = rows.next().await {
            let chunk = chunk.map_err(doing("read a piece"))?;
            // One chunk is in flight at a time: the two servers pace each other.
            sink.feed(chunk).await.map_err(doing("stage a piece"))?;
        }
        let count = sink.finish().await.map_err(doing("stage a piece"))?;
        primary.batch_execute("COMMIT").await.map_err(doing("read a piece"))?;
        Ok(count as usize)
    }

    /// Writes the staged rows of one span, table by table.
    pub(super) async fn write_span(&mut self, span: Span, mode: Mode) -> Result<(), NotWritten> {
        let between = format!("pos > '{}' AND pos <= '{}'", lsn(span.0), lsn(span.1));
        let cleared = self
            .secondary
            .query(
                &format!("SELECT rel, max(pos) FROM pgtandem.staged WHERE op = 'T' AND {between} GROUP BY rel"),
                &[],
            )
            .await
            .map_err(doing("look for truncated tables"))?;
        let mut cleared_rels = Vec::new();
        for row in &cleared {
            let (rel, position): (Oid, Unsigned) = (row.get(0), row.get(1));
            cleared_rels.push(rel);
            self.secondary
                .batch_execute(&format!(
                    "DELETE FROM pgtandem.staged WHERE rel = {rel} AND {between} AND pos <= '{}'",
                    lsn(position.0)
                ))
                .await
                .map_err(doing("void changes before a TRUNCATE"))?;
        }
        if !cleared_rels.is_empty() {
            self.refresh_tables().await?;
        }
        let mut writes = super::rows::Writes::default();
        self.clear(&mut writes, &cleared_rels).await?;
        self.write(&writes).await?;
        let rels = self
            .secondary
            .query(
                &format!("SELECT DISTINCT rel FROM pgtandem.staged WHERE op = 'R' AND {between}"),
                &[],
            )
            .await
            .map_err(doing("list the tables of a piece"))?;
        if !rels.is_empty() {
            self.refresh_tables().await?;
        }
        for row in &rels {
            let rel: Oid = row.get(0);
            let Some(mirrored) = self.tables.get(rel) else { continue };
            let Some(writer) = mirrored.writer.clone() else {
                continue;
            };
            let synced = mirrored.state == Seeding::Synced || cleared_rels.contains(&rel);
            self.write_net(rel, &writer, &between, mode, synced).await?;
        }
        Ok(())
    }

    async fn write_net(
        &mut self,
        rel: Oid,
        writer: &Writer,
        between: &str,
        mode: Mode,
        synced: bool,
    ) -> Result<(), NotWritten> {
        let secondary = &self.secondary;
        secondary
            .batch_execute(&format!(
                "SET LOCAL enable_hashjoin = on; SET LOCAL enable_seqscan = on;
                 TRUNCATE pgtandem.net;
                 INSERT INTO pgtandem.net
                 SELECT i.img, sum(i.n) FROM pgtandem.staged s
                  CROSS JOIN LATERAL (VALUES (s.old, -1), (s.new, 1)) AS i(img, n)
                  WHERE s.rel = {rel} AND s.op = 'R' AND {between} AND i.img IS NOT NULL
                  GROUP BY i.img HAVING sum(i.n) <> 0;
                 ANALYZE pgtandem.net"
            ))
            .await
            .map_err(doing("compute a table's difference"))?;
        let row = secondary
            .query_one(
                "SELECT COALESCE(sum(-n) FILTER (WHERE n < 0), 0)::bigint, COALESCE(sum(n) FILTER (WHERE n > 0), 0)::bigint FROM pgtandem.net",
                &[],
            )
            .await
            .map_err(doing("count a table's difference"))?;
        let (gone, come): (i64, i64) = (row.get(0), row.get(1));
        if writer.table().key.is_some() {
            secondary
                .batch_execute("SET LOCAL enable_hashjoin = off; SET LOCAL enable_seqscan = off")
                .await
                .map_err(doing("set the planner"))?;
        }
        let silence = writer.silence();
        if let Some((off, _)) = &silence {
            secondary.batch_execute(off).await.map_err(doing("silence triggers"))?;
        }
        if mode == Mode::Short && synced {
            for (sql, expected) in [(writer.delete(Source::Net), gone), (writer.insert(Source::Net), come)] {
                if expected == 0 {
                    continue;
                }
                let count = self.write_from_net(&sql).await?;
                if count != expected as u64 {
                    return Err(NotWritten::Surprise(Refusal::rows(expected as u64, count)));
                }
            }
        } else {
            let mut diverged = 0;
            if synced {
                diverged += self.write_from_net(&writer.record_missing(Source::Net)).await?;
            }
            self.write_from_net(&writer.delete_carefully(Source::Net)).await?;
            let theirs = self.room_for(rel);
            for (record, delete) in writer.make_room(Source::Net, &theirs) {
                if synced {
                    diverged += self.write_from_net(&record).await?;
                }
                self.write_from_net(&delete).await?;
            }
            self.write_from_net(&writer.insert(Source::Net)).await?;
            if diverged > 0 {
                *self.diverged_in_round.entry(rel).or_default() += diverged;
            }
        }
        if let Some((_, on)) = &silence {
            self.secondary
                .batch_execute(on)
                .await
                .map_err(doing("wake triggers again"))?;
        }
        self.secondary
            .batch_execute("SET LOCAL enable_hashjoin = off; SET LOCAL enable_seqscan = off")
            .await
            .map_err(doing("set the planner"))?;
        Ok(())
    }

    async fn write_from_net(&self, sql: &str) -> Result<u64, NotWritten> {
        match self.secondary.execute(sql, &[]).await {
            Ok(count) => Ok(count),
            Err(error) if is_conflict(&error) => Err(NotWritten::Surprise(Refusal::of(&error))),
            Err(error) => Err(NotWritten::Failed(doing("apply a piece")(error))),
        }
    }
}

/// A part of a backlog that is written in one transaction.
pub(super) struct Piece<'a> {
    pub span: Span,
    pub stop: Stop<'a>,
}

impl<'a> Piece<'a> {
    pub(super) const fn ending(&self, target: &'a Target) -> Ending<'a> {
        Ending {
            end: target,
            stop: self.stop,
            flushed: 0,
        }
    }
}

/// Which connection to the primary reads a piece: that of rounds may have a cursor open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    Rounds,
    Aside,
}

/// A backlog is scanned as a whole, and sorted on the primary's disk.
pub(super) const READ_BACKLOG: &str =
    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL enable_seqscan = on; SET LOCAL work_mem = '64MB'";

fn xid_array(xids: &[u64]) -> String {
    let listed: Vec<String> = xids.iter().map(|xid| format!("'{xid}'")).collect();
    format!("ARRAY[{}]::xid8[]", listed.join(","))
}
