//! Putting a transaction into quarantine: whole, with its keys and the error.

use std::collections::{BTreeSet, HashMap};

use bytes::{BufMut, BytesMut};
use futures_util::{SinkExt, pin_mut};

use crate::apply::held::{Touched, Unit};
use crate::apply::isolate::{Cause, failing};
use crate::apply::plan::DdlRecord;
use crate::apply::refusal::Refusal;
use crate::apply::session::Session;
use crate::apply::{ApplyError, doing, image};
use crate::catalog::Oid;
use crate::journal::read::{Change, Operation, lsn};

/// Keys of a transaction that are kept as text, to be listed.
const SHOWN_MAX: usize = 20;

/// Numbers for what a round holds, taken as a block, so that they follow the places of the
/// transactions and not the order in which refusals are found.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::apply) struct EntryNumbers {
    first: Option<i64>,
}

impl EntryNumbers {
    /// The number that this transaction has or would have, once the block is taken.
    pub(in crate::apply) fn number(self, unit: &Unit<'_>) -> Option<i64> {
        self.first.map(|first| first + unit.order as i64)
    }
}

impl Session {
    /// Puts a whole transaction into quarantine, in the round's transaction.
    pub(in crate::apply) async fn hold(&mut self, unit: &Unit<'_>, cause: &Cause) -> Result<(), ApplyError> {
        let (refusal, follows) = match cause {
            Cause::Refused(refusal) => (refusal.clone(), None),
            Cause::Follows(id) => (Refusal::said(format!("touches what entry {id} holds")), Some(*id)),
            Cause::Continues => (Refusal::said("an earlier part of the same transaction is held"), None),
        };
        let Refusal {
            sqlstate,
            text: error,
            detail,
        } = refusal;
        if follows.is_none() {
            self.last_refusal = Some(error.clone());
        }
        self.pause_tables_of(unit, &error).await?;
        self.held_of_read.insert(unit.xid);
        self.held_in_round += 1;
        let paused: BTreeSet<Oid> = unit
            .rels()
            .into_iter()
            .filter(|&rel| self.key_places(rel).is_none())
            .collect();
        let is_void = |change: &Change<'_>| match change.operation {
            Operation::Row | Operation::Truncate => paused.contains(&change.rel),
            Operation::Ddl | Operation::DdlOutside => false,
        };
        if unit.changes.iter().all(is_void) {
            // All its tables are paused, which says that they need seeding.
            return Ok(());
        }
        let utf8 = self.keeps_utf8().await?;
        let touched = unit.touches(|rel| self.key_places(rel));
        let keys = serde_json::to_string(&self.shown_keys(unit, utf8)).unwrap_or_else(|_| "[]".into());
        let id = self.number_of(unit).await?;
        self.secondary
            .execute(
                "INSERT INTO pgtandem.quarantine (id, epoch, round, xid, sqlstate, error, detail, follows, tables, keys, changes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::jsonb, $11)",
                &[
                    &id,
                    &(self.config.epoch.0 as i64),
                    &(self.round as i64 + 1),
                    &unit.xid.to_string(),
                    &sqlstate,
                    &error,
                    &detail,
                    &follows,
                    &self.names_of(unit),
                    &keys,
                    &(unit.changes.len() as i64),
                ],
            )
            .await
            .map_err(doing("put a transaction into quarantine"))?;
        let mut rows = BytesMut::new();
        for change in &unit.changes {
            copy_change(&mut rows, id, change, is_void(change), utf8);
        }
        self.copy(
            "pgtandem.quarantine_change (id, pos, rel, op, old, old_bytes, new, new_bytes, void)",
            rows,
        )
        .await?;
        self.copy("pgtandem.quarantine_key (id, rel, key)", key_rows(id, &touched))
            .await?;
        self.note_held(id).await?;
        self.held.add(id, &touched);
        match follows {
            None => tracing::error!(id, xid = unit.xid, error, "a transaction was put into quarantine"),
            Some(_) => tracing::warn!(id, xid = unit.xid, error, "a transaction was put into quarantine"),
        }
        Ok(())
    }

    /// Whether every text can be kept on the secondary.
    async fn keeps_utf8(&self) -> Result<bool, ApplyError> {
        let row = self
            .secondary
            .query_one("SELECT current_setting('server_encoding') = 'UTF8'", &[])
            .await
            .map_err(doing("read the secondary's encoding"))?;
        Ok(row.get(0))
    }

    async fn number_of(&mut self, unit: &Unit<'_>) -> Result<i64, ApplyError> {
        if self.entries.first.is_none() {
            let row = self
                .secondary
                .query_one(
                    "SELECT setval(s, nextval(s) + $1) - $1 FROM CAST('pgtandem.quarantine_id_seq' AS regclass) s",
                    &[&(self.transactions_in_round.max(1) as i64 - 1)],
                )
                .await
                .map_err(doing("number what is held"))?;
            self.entries.first = Some(row.get(0));
        }
        Ok(self.entries.number(unit).unwrap_or_default())
    }

    /// The same with what `pgtandem.staged` holds, for what does not fit into memory. It holds its
    /// tables as a whole.
    pub(in crate::apply) async fn hold_staged(
        &mut self,
        count: usize,
        ddl: &Unit<'_>,
        rels: &[Oid],
        refusal: &Refusal,
    ) -> Result<(), ApplyError> {
        let live: Vec<Oid> = rels
            .iter()
            .copied()
            .filter(|&rel| self.key_places(rel).is_some())
            .collect();
        self.held_in_round += 1;
        let names: BTreeSet<String> = rels
            .iter()
            .filter_map(|&rel| self.tables.get(rel))
            .map(|table| format!("{}.{}", table.schema, table.name))
            .chain(self.names_of(ddl))
            .collect();
        let names: Vec<String> = names.into_iter().collect();
        let id: i64 = self
            .secondary
            .query_one(
                "INSERT INTO pgtandem.quarantine (epoch, round, xid, sqlstate, error, detail, tables, changes)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id",
                &[
                    &(self.config.epoch.0 as i64),
                    &(self.round as i64 + 1),
                    &ddl.xid.to_string(),
                    &refusal.sqlstate,
                    &refusal.text,
                    &refusal.detail,
                    &names,
                    &(count as i64),
                ],
            )
            .await
            .map_err(doing("put a transaction into quarantine"))?
            .get(0);
        self.secondary
            .execute(
                "INSERT INTO pgtandem.quarantine_change (id, pos, rel, op, old, new, void)
                 SELECT $1, s.pos, s.rel, s.op, s.old, s.new, s.op IN ('R', 'T') AND s.rel <> ALL ($2)
                   FROM pgtandem.staged s WHERE s.op <> 'O'",
                &[&id, &live],
            )
            .await
            .map_err(doing("put a transaction into quarantine"))?;
        self.secondary
            .execute(
                "INSERT INTO pgtandem.quarantine_key (id, rel) SELECT $1, unnest($2::oid[])",
                &[&id, &live],
            )
            .await
            .map_err(doing("put a transaction into quarantine"))?;
        self.note_held(id).await?;
        for rel in live {
            self.held.add_whole(id, rel);
        }
        tracing::error!(
            id,
            changes = count,
            error = refusal.text,
            "a transaction was put into quarantine"
        );
        Ok(())
    }

    pub(in crate::apply) async fn note_held(&self, id: i64) -> Result<(), ApplyError> {
        self.secondary
            .execute(
                "INSERT INTO pgtandem.quarantine_history (action, id, xid, tables, changes, error)
                 SELECT 'held', q.id, q.xid, q.tables, q.changes, q.error FROM pgtandem.quarantine q WHERE q.id = $1",
                &[&id],
            )
            .await
            .map_err(doing("record the quarantine"))?;
        Ok(())
    }

    /// DDL outside of transactions that the secondary refused for good.
    pub(in crate::apply) async fn hold_outside(
        &mut self,
        record: &DdlRecord,
        refusal: Refusal,
    ) -> Result<(), ApplyError> {
        let context = crate::apply::ddl::record_text(record);
        let change = Change {
            position: self.target.as_ref().map_or(0, |target| target.piece),
            xid: 0,
            rel: 0,
            operation: Operation::DdlOutside,
            old: Some(context.as_bytes()),
            new: Some(record.statement.as_bytes()),
        };
        self.hold_alone(&change, &Cause::Refused(refusal)).await
    }

    /// A record of such DDL that cannot be read.
    pub(in crate::apply) async fn hold_outside_change(
        &mut self,
        change: &Change<'_>,
        error: &str,
    ) -> Result<(), ApplyError> {
        self.hold_alone(change, &Cause::Refused(Refusal::said(error))).await
    }

    async fn hold_alone(&mut self, change: &Change<'_>, cause: &Cause) -> Result<(), ApplyError> {
        let unit = Unit {
            xid: change.xid,
            order: 0,
            changes: vec![*change],
        };
        self.begin_counting(1);
        self.secondary
            .batch_execute(&format!("BEGIN; {}", self.guarded_watermark("outside = NULL")))
            .await
            .map_err(doing("put DDL into quarantine"))?;
        self.hold(&unit, cause).await?;
        failing(self.commit().await)?;
        self.outside = None;
        self.summarize_quarantine().await
    }

    fn names_of(&self, unit: &Unit<'_>) -> Vec<String> {
        let mut names: BTreeSet<String> = unit
            .rels()
            .iter()
            .filter_map(|&rel| self.tables.get(rel))
            .map(|table| format!("{}.{}", table.schema, table.name))
            .collect();
        for record in unit.ddl() {
            let tables = record.created.iter().chain(&record.changed);
            names.extend(tables.map(|table| format!("{}.{}", table.schema, table.name)));
        }
        names.into_iter().collect()
    }

    fn shown_keys(&self, unit: &Unit<'_>, utf8: bool) -> Vec<(String, String)> {
        let mut shown = BTreeSet::new();
        for change in &unit.changes {
            let Some((table, writer)) = self
                .tables
                .get(change.rel)
                .and_then(|table| Some((table, table.writer.as_ref()?)))
            else {
                continue;
            };
            for image in [change.old, change.new].into_iter().flatten() {
                if let Some(key) = image::key_text(image, &writer.key_positions) {
                    let key = key.replace(|c: char| c == '\0' || !(utf8 || c.is_ascii()), "?");
                    shown.insert((format!("{}.{}", table.schema, table.name), key));
                }
            }
            if shown.len() >= SHOWN_MAX {
                break;
            }
        }
        shown.into_iter().take(SHOWN_MAX).collect()
    }

    pub(in crate::apply) async fn copy(&self, into: &str, rows: BytesMut) -> Result<(), ApplyError> {
        let copied = async {
            let sink = self
                .secondary
                .copy_in::<_, bytes::Bytes>(&format!("COPY {into} FROM STDIN"))
                .await?;
            pin_mut!(sink);
            sink.send(rows.freeze()).await?;
            sink.finish().await
        };
        copied.await.map_err(doing("write into the quarantine"))?;
        Ok(())
    }
}

/// A row for COPY in text format.
fn copy_change(out: &mut BytesMut, id: i64, change: &Change<'_>, void: bool, utf8: bool) {
    let op = match change.operation {
        Operation::Row => 'R',
        Operation::Truncate => 'T',
        Operation::Ddl => 'S',
        Operation::DdlOutside => 'O',
    };
    out.put_slice(format!("{id}\t{}\t{}\t{op}\t", lsn(change.position), change.rel).as_bytes());
    copy_image(out, change.old, utf8);
    out.put_u8(b'\t');
    copy_image(out, change.new, utf8);
    out.put_slice(if void { b"\tt\n" } else { b"\tf\n" });
}

/// Two columns, text and bytes. The primary may have what the secondary takes for no text at all
/// (SQL_ASCII, a function in C): that must not keep it from being held.
fn copy_image(out: &mut BytesMut, image: Option<&[u8]>, utf8: bool) {
    let is_text =
        |image: &[u8]| !image.contains(&0) && (image.is_ascii() || utf8 && std::str::from_utf8(image).is_ok());
    match image {
        None => out.put_slice(b"\\N\t\\N"),
        Some(image) if is_text(image) => {
            copy_text(out, image);
            out.put_slice(b"\t\\N");
        }
        Some(image) => {
            out.put_slice(b"\\N\t\\\\x");
            for byte in image {
                out.put_slice(format!("{byte:02x}").as_bytes());
            }
        }
    }
}

fn copy_text(out: &mut BytesMut, text: &[u8]) {
    for &byte in text {
        match byte {
            b'\\' => out.put_slice(b"\\\\"),
            b'\n' => out.put_slice(b"\\n"),
            b'\r' => out.put_slice(b"\\r"),
            b'\t' => out.put_slice(b"\\t"),
            other => out.put_u8(other),
        }
    }
}

fn key_rows(id: i64, touched: &HashMap<Oid, Touched>) -> BytesMut {
    let mut out = BytesMut::new();
    for (rel, touched) in touched {
        if touched.whole {
            out.put_slice(format!("{id}\t{rel}\t\\N\n").as_bytes());
        }
        for key in &touched.keys {
            out.put_slice(format!("{id}\t{rel}\t\\\\x{key:032x}\n").as_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_text_is_escaped() {
        let mut out = BytesMut::new();
        let change = Change {
            position: 16,
            xid: 1,
            rel: 7,
            operation: Operation::Row,
            old: None,
            new: Some(b"(\"a\tb\\\\\n\")"),
        };
        copy_change(&mut out, 3, &change, false, true);
        assert_eq!(&out[..], b"3\t0/10\t7\tR\t\\N\t\\N\t(\"a\\tb\\\\\\\\\\n\")\t\\N\tf\n");
    }

    #[test]
    fn what_is_no_text_there_goes_as_bytes() {
        for (image, utf8, copied) in [
            (&b"(a)"[..], false, &b"(a)\t\\N"[..]),
            ("(é)".as_bytes(), true, "(é)\t\\N".as_bytes()),
            ("(é)".as_bytes(), false, b"\\N\t\\\\x28c3a929"),
            (b"(\xc3)", true, b"\\N\t\\\\x28c329"),
            (b"(\0)", true, b"\\N\t\\\\x280029"),
        ] {
            let mut out = BytesMut::new();
            copy_image(&mut out, Some(image), utf8);
            assert_eq!(&out[..], copied);
        }
    }
}
