//! A backlog, or one transaction, too large to hold in memory.
//!
//! The target snapshot stays, and whole transactions are applied up to a position at a time:
//! `(target, position)` is stored with the rows, so a crash resumes there, and only the end is a
//! cut. The rows of a piece stream from one server into a table of the other, which computes
//! the difference itself: the proxy holds one chunk of a stream, whatever a transaction's size.

use std::collections::{BTreeSet, HashMap};

use futures_util::{SinkExt, StreamExt, pin_mut};

use super::plan::{DdlRecord, adds_label};
use super::round::{shapes_after, wait_flushed};
use super::rows::{Mode, NotWritten, is_conflict};
use super::session::{Session, Target};
use super::statements::{Source, Writer};
use super::status::Seeding;
use super::{ApplyError, doing};
use crate::catalog::Oid;
use crate::journal::read::{Change, Operation, Shape, Unsigned, lsn, window_sql};

/// A part of a piece between two barriers: positions above the first, up to the second.
type Span = (u64, u64);

/// What must be known of a backlog before its rows are read.
struct Backlog {
    window: String,
    /// Positions at which pieces end, ascending; the last is the backlog's end.
    ends: Vec<u64>,
    /// DDL, by position.
    ddl: Vec<(u64, Operation, DdlRecord)>,
    /// Transactions that contain a barrier: their changes are placed one by one.
    barrier_xids: Vec<u64>,
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
                .find(|(position, operation, _)| *position == end && *operation == Operation::DdlOutside)
                .map(|(_, _, record)| record.clone());
            let piece = Piece {
                span: (target.piece, end),
                // Where DDL outside transactions comes last, the watermark must say so first.
                ends_target: last && outside.is_none(),
                outside: outside.as_ref(),
            };
            match self.apply_piece(&backlog, &target, &piece, Mode::Short).await {
                Ok(count) => total += count,
                Err(NotWritten::Failed(error)) => return Err(error),
                Err(NotWritten::Surprise(what)) => {
                    self.roll_back().await?;
                    tracing::warn!(
                        what,
                        "the secondary is not as it should be, applying this piece carefully"
                    );
                    match self.apply_piece(&backlog, &target, &piece, Mode::Careful).await {
                        Ok(count) => total += count,
                        Err(NotWritten::Failed(error)) => return Err(error),
                        Err(NotWritten::Surprise(what)) => return Err(ApplyError::Refused(what)),
                    }
                }
            }
            target.piece = end;
            self.target = Some(target.clone());
            if let Some(record) = &outside {
                self.run_outside(record).await?;
            }
            if last && outside.is_some() {
                self.end_target(&target).await?;
            }
        }
        if ends.is_empty() {
            self.end_target(&target).await?;
        }
        self.target = None;
        self.since = target.snapshot.clone();
        self.durable = target.snapshot;
        self.position = target.position;
        self.progress.changes += total as u64;
        Ok(total)
    }

    /// The target is reached and nothing is left to write but that.
    async fn end_target(&mut self, target: &Target) -> Result<(), ApplyError> {
        wait_flushed(&self.aside, target.position, 0).await?;
        let mut writes = super::rows::Writes::default();
        writes.begin(self.watermark_sql(target, None));
        match self.write(&writes).await {
            Ok(()) => {}
            Err(NotWritten::Failed(error)) => return Err(error),
            Err(NotWritten::Surprise(what)) => return Err(ApplyError::Refused(what)),
        }
        match self.commit().await {
            Ok(()) => Ok(()),
            Err(NotWritten::Failed(error)) => Err(error),
            Err(NotWritten::Surprise(what)) => Err(ApplyError::Refused(what)),
        }
    }

    /// One scan of the backlog: where pieces end, and what must not be cut through.
    async fn survey(&mut self, target: &Target) -> Result<Backlog, ApplyError> {
        let window = window_sql(&self.since, Some(&target.snapshot));
        let up_to_now = window_sql(&self.since, None);
        let primary = &self.primary;
        primary
            .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL enable_seqscan = on; SET LOCAL work_mem = '64MB'")
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
                    "SELECT max(top) FROM (
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
            if change.operation != Operation::Truncate {
                let record = DdlRecord::from_change(&change)?;
                later_ddl.push(record.clone());
                if in_target {
                    ddl.push((change.position, change.operation, record));
                }
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
        let rels: Vec<Oid> = rels.iter().map(|row| row.get(0)).collect();
        let shapes: Vec<Shape> = self
            .reader
            .shapes_of(&self.primary, &rels)
            .await
            .map_err(doing("read the definitions of changed tables"))?;
        self.end_read().await?;
        self.adopt_unknown(&rels, later_ddl.iter()).await?;
        let expected: HashMap<Oid, Shape> = shapes_after(later_ddl.iter());
        self.pause_changed_tables(&rels, &shapes, &expected).await?;

        let mut ends: BTreeSet<u64> = tops.iter().map(|row| row.get::<_, Unsigned>(0).0).collect();
        let end = ends.last().copied();
        ends.extend(labelled.iter().map(|&(_, last)| last));
        ends.retain(|&at| Some(at) == end || !spans.iter().any(|&(first, last)| first <= at && at < last));
        ends.extend(
            ddl.iter()
                .filter(|(_, operation, _)| *operation == Operation::DdlOutside)
                .map(|(position, _, _)| *position),
        );
        Ok(Backlog {
            window,
            ends: ends.into_iter().collect(),
            ddl,
            barrier_xids,
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
    ) -> Result<usize, NotWritten> {
        self.cleared_in_round.clear();
        self.diverged_in_round.clear();
        let mut writes = super::rows::Writes::default();
        let watermark = if piece.ends_target {
            self.watermark_sql(target, None)
        } else {
            let outside = piece.outside.map_or_else(
                || "NULL".to_owned(),
                |record| crate::catalog::quote::literal(&super::ddl::record_text(record)),
            );
            self.guarded_watermark(&format!(
                "{}, outside = {outside}",
                super::round::target_assignments(target, piece.span.1)
            ))
        };
        writes.begin(watermark);
        writes.text("TRUNCATE pgtandem.staged");
        self.write(&writes).await?;
        let count = self.stage(backlog, piece.span).await?;
        self.secondary
            .batch_execute("ANALYZE pgtandem.staged")
            .await
            .map_err(doing("analyze a piece"))?;
        let mut has_ddl = false;
        let mut from = piece.span.0;
        for (position, operation, record) in &backlog.ddl {
            if *operation != Operation::Ddl || *position <= piece.span.0 || *position > piece.span.1 {
                continue;
            }
            self.write_span((from, *position), mode).await?;
            self.run_ddl(record).await?;
            has_ddl = true;
            from = *position;
        }
        self.write_span((from, piece.span.1), mode).await?;
        wait_flushed(&self.aside, target.position, 0).await?;
        self.commit().await?;
        if has_ddl {
            self.tables = super::tables::Tables::load(&self.secondary).await?;
        }
        Ok(count)
    }

    /// Streams a piece's rows from the primary's journal into `pgtandem.staged`.
    async fn stage(&self, backlog: &Backlog, span: Span) -> Result<usize, ApplyError> {
        self.primary
            .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL enable_seqscan = on; SET LOCAL work_mem = '64MB'")
            .await
            .map_err(doing("read a piece"))?;
        let place = if backlog.barrier_xids.is_empty() {
            "t.top".to_owned()
        } else {
            format!(
                "CASE WHEN w.xid = ANY ({}) THEN w.pos ELSE t.top END",
                xid_array(&backlog.barrier_xids)
            )
        };
        let sql = format!(
            "COPY (SELECT w.rel, w.op, {place}, w.old, w.new FROM {window} w
                     JOIN (SELECT xid, max(pos) AS top FROM {window} v GROUP BY xid) t ON t.xid = w.xid
                    WHERE {place} > '{}' AND {place} <= '{}') TO STDOUT",
            lsn(span.0),
            lsn(span.1),
            window = backlog.window,
        );
        let rows = self.primary.copy_out(&sql).await.map_err(doing("read a piece"))?;
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
        self.end_read().await?;
        Ok(count as usize)
    }

    /// Writes the staged rows of one span, table by table.
    async fn write_span(&mut self, span: Span, mode: Mode) -> Result<(), NotWritten> {
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
        let mut writes = super::rows::Writes::default();
        self.clear(&mut writes, &cleared_rels).await?;
        self.write(&writes).await?;
        let rels = self
            .secondary
            .query(
                &format!("SELECT DISTINCT rel FROM pgtandem.staged WHERE op IN ('I', 'U', 'D') AND {between}"),
                &[],
            )
            .await
            .map_err(doing("list the tables of a piece"))?;
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
                  WHERE s.rel = {rel} AND s.op IN ('I', 'U', 'D') AND {between} AND i.img IS NOT NULL
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
                    return Err(NotWritten::Surprise(format!("{expected} rows expected, {count} found")));
                }
            }
        } else {
            let mut diverged = 0;
            if synced {
                diverged += self.write_from_net(&writer.record_missing(Source::Net)).await?;
            }
            self.write_from_net(&writer.delete_carefully(Source::Net)).await?;
            for (record, delete) in writer.make_room(Source::Net) {
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
            Err(error) if is_conflict(&error) => {
                Err(NotWritten::Surprise(crate::upstream::control::error_chain(&error)))
            }
            Err(error) => Err(NotWritten::Failed(doing("apply a piece")(error))),
        }
    }
}

struct Piece<'a> {
    span: Span,
    ends_target: bool,
    outside: Option<&'a DdlRecord>,
}

fn xid_array(xids: &[u64]) -> String {
    let listed: Vec<String> = xids.iter().map(|xid| format!("'{xid}'")).collect();
    format!("ARRAY[{}]::xid8[]", listed.join(","))
}
