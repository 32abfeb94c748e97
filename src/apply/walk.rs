//! A piece of a backlog of which something is refused, or touches what is held: read once, in the
//! order of its transactions, in groups that fit into memory, each written as isolate.rs does and
//! committed with its place.
//!
//! A transaction that does not fit is told from others by its tables only, not by its keys: it is
//! held where one of its tables has something held, and where it is held it holds its tables as a
//! whole. It passes through the secondary's own tables, never through memory.

use futures_util::{TryStreamExt, pin_mut};

use super::bulk::{Backlog, Piece, READ_BACKLOG, Reading, Span};
use super::isolate::failing;
use super::plan::plan;
use super::refusal::Refusal;
use super::round::{Stop, wait_flushed};
use super::rows::Writes;
use super::session::{Session, Target};
use super::{ApplyError, doing};
use crate::catalog::Oid;
use crate::journal::read::{Change, Unsigned};

/// What is read into memory at once.
const GROUP_ROWS: i64 = 5_000;
const GROUP_BYTES: i64 = 16 * 1024 * 1024;

/// Transactions in a row, in the order of their places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Group {
    /// The last one's place.
    end: u64,
    rows: i64,
    bytes: i64,
}

impl Group {
    const fn fits(self) -> bool {
        self.rows <= GROUP_ROWS && self.bytes <= GROUP_BYTES
    }
}

impl Session {
    /// Writes a piece group by group. The number of changes.
    pub(super) async fn walk(
        &mut self,
        backlog: &Backlog,
        target: &Target,
        piece: &Piece<'_>,
    ) -> Result<usize, ApplyError> {
        self.primary
            .batch_execute(READ_BACKLOG)
            .await
            .map_err(doing("read a piece"))?;
        let groups = self.groups(backlog, piece.span).await?;
        self.open_cursor(backlog, piece.span).await?;
        let mut from = piece.span.0;
        let mut total = 0;
        for (index, group) in groups.iter().enumerate() {
            let last = index + 1 == groups.len();
            let part = Piece {
                span: (from, if last { piece.span.1 } else { group.end }),
                stop: if last { piece.stop } else { Stop::Piece(group.end) },
            };
            if group.fits() {
                self.apply_group(group.rows, target, &part).await?;
            } else {
                self.pass_cursor(group.rows).await?;
                self.apply_large(backlog, target, &part).await?;
            }
            total += group.rows as usize;
            from = group.end;
        }
        self.end_read().await?;
        if groups.is_empty() {
            // Nothing but the statement at its end.
            self.isolate(&[], &Default::default(), &piece.ending(target)).await?;
        }
        Ok(total)
    }

    async fn groups(&self, backlog: &Backlog, span: Span) -> Result<Vec<Group>, ApplyError> {
        let sql = format!(
            "SELECT max(p.place) AS top, count(*), sum(48 + COALESCE(octet_length(p.old), 0) + COALESCE(octet_length(p.new), 0))::bigint
               FROM {} GROUP BY p.xid ORDER BY top",
            backlog.rows_sql(span)
        );
        let rows = self
            .primary
            .query_raw(&sql, std::iter::empty::<&str>())
            .await
            .map_err(doing("measure a piece"))?;
        pin_mut!(rows);
        let mut transactions = Vec::new();
        let mut groups: Vec<Group> = Vec::new();
        while let Some(row) = rows.try_next().await.map_err(doing("measure a piece"))? {
            transactions.push(Group {
                end: row.get::<_, Unsigned>(0).0,
                rows: row.get(1),
                bytes: row.get(2),
            });
            // Not one by one until the end: a piece may have millions.
            if transactions.len() == 1024 {
                join(&mut groups, &transactions, backlog.spans());
                transactions.clear();
            }
        }
        join(&mut groups, &transactions, backlog.spans());
        Ok(groups)
    }

    async fn open_cursor(&self, backlog: &Backlog, span: Span) -> Result<(), ApplyError> {
        let sql = format!(
            "DECLARE walk NO SCROLL CURSOR FOR
             SELECT pos, xid, rel, op, old, new FROM (SELECT p.*, max(p.place) OVER (PARTITION BY p.xid) AS top FROM {}) q
              ORDER BY top, xid, pos",
            backlog.rows_sql(span)
        );
        self.primary.batch_execute(&sql).await.map_err(doing("read a piece"))
    }

    async fn pass_cursor(&self, rows: i64) -> Result<(), ApplyError> {
        self.primary
            .batch_execute(&format!("MOVE {rows} FROM walk"))
            .await
            .map_err(doing("read a piece"))
    }

    async fn apply_group(&mut self, rows: i64, target: &Target, part: &Piece<'_>) -> Result<(), ApplyError> {
        let rows = self
            .primary
            .query(&format!("FETCH {rows} FROM walk"), &[])
            .await
            .map_err(doing("read a piece"))?;
        let changes = rows
            .iter()
            .map(Change::from_row)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| ApplyError::Inconsistent(error.to_string()))?;
        // DDL outside of transactions is the piece's own end.
        let changes: Vec<Change<'_>> = changes
            .into_iter()
            .filter(|change| change.operation != crate::journal::read::Operation::DdlOutside)
            .collect();
        let bad = plan(&changes).bad;
        self.isolate(&changes, &bad, &part.ending(target)).await
    }

    /// What does not fit into memory is one transaction, or those around one with DDL: written as
    /// a whole, or held as a whole.
    async fn apply_large(&mut self, backlog: &Backlog, target: &Target, part: &Piece<'_>) -> Result<(), ApplyError> {
        let rels = self.rels_of(backlog, part.span).await?;
        let refusal = if let Some(rel) = rels.iter().find(|&&rel| self.held.holds(rel)) {
            let name = self
                .tables
                .get(*rel)
                .map_or_else(String::new, |table| table.name.clone());
            Refusal::said(format!("too large to be told from what is held of table {name}"))
        } else {
            match self.apply_whole(backlog, target, part, Reading::Aside).await? {
                Ok(_count) => return Ok(()),
                Err(refusal) => refusal,
            }
        };
        self.hold_large(backlog, target, part, &rels, &refusal).await
    }

    async fn rels_of(&self, backlog: &Backlog, span: Span) -> Result<Vec<Oid>, ApplyError> {
        let sql = format!(
            "SELECT DISTINCT p.rel FROM {} WHERE p.rel <> 0 ORDER BY 1",
            backlog.rows_sql(span)
        );
        let rows = self
            .aside
            .query(&sql, &[])
            .await
            .map_err(doing("list the tables of a piece"))?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn hold_large(
        &mut self,
        backlog: &Backlog,
        target: &Target,
        part: &Piece<'_>,
        rels: &[Oid],
        refusal: &Refusal,
    ) -> Result<(), ApplyError> {
        let ending = part.ending(target);
        self.begin_counting(1);
        let mut writes = Writes::default();
        writes.begin(self.watermark_sql(&ending));
        writes.text("TRUNCATE pgtandem.staged");
        failing(self.write(&writes).await)?;
        let ddl = backlog.ddl_in(part.span);
        self.pause_tables_of(&ddl, &refusal.text).await?;
        let count = self.stage(backlog, part.span, Reading::Aside).await?;
        self.hold_staged(count, &ddl, rels, refusal).await?;
        wait_flushed(&self.aside, target.position, 0).await?;
        failing(self.commit().await)?;
        self.reached(&ending);
        self.summarize_quarantine().await
    }
}

/// Adds transactions to the last group as long as it fits; none is cut from one of the same place
/// or in the middle of a span.
fn join(groups: &mut Vec<Group>, transactions: &[Group], spans: &[Span]) {
    for next in transactions {
        let Some(last) = groups.last_mut() else {
            groups.push(*next);
            continue;
        };
        let together = Group {
            end: next.end,
            rows: last.rows + next.rows,
            bytes: last.bytes + next.bytes,
        };
        let inside = spans.iter().any(|&(first, end)| first <= last.end && last.end < end);
        if together.fits() || inside || last.end == next.end {
            *last = together;
        } else {
            groups.push(*next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_fit_where_they_can() {
        let transaction = |end, rows| Group { end, rows, bytes: 1 };
        let grouped = |transactions: &[Group], spans: &[Span]| {
            let mut groups = Vec::new();
            join(&mut groups, transactions, spans);
            groups.iter().map(|group| (group.end, group.rows)).collect::<Vec<_>>()
        };
        let list = [
            transaction(1, 4000),
            transaction(2, 500),
            transaction(3, 600),
            transaction(4, 9000),
            transaction(5, 1),
        ];
        assert_eq!(grouped(&list, &[]), [(2, 4500), (3, 600), (4, 9000), (5, 1)]);
        assert_eq!(grouped(&list, &[(2, 5)]), [(5, 14_101)]);
        let alike = [transaction(1, 4000), transaction(1, 4000)];
        assert_eq!(grouped(&alike, &[]), [(1, 8000)]);
    }
}
