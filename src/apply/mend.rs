//! Rows of the secondary brought to what the primary has, at the end of a round.
//!
//! The round's transaction on the primary is still open, so its rows are read in the very snapshot
//! that the secondary has just reached, and nothing is applied until they are written: so this
//! cannot collide with live writes, and cannot bring back what a later round has changed. Rows and
//! watermark are written in one transaction, as a round is: an applier that was deposed meanwhile
//! mends nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::pipeline::ImageArray;
use super::round::{Ending, Stop, wait_flushed};
use super::rows::{NotWritten, Writes};
use super::session::Session;
use super::statements::Source;
use super::tables::column_names;
use super::{ApplyError, doing, image};
use crate::catalog::Oid;
use crate::catalog::quote::{identifier, literal};
use crate::catalog::table::Generated;

/// Keys asked for by one statement.
const AT_ONCE: usize = 500;
/// Held changes that are mended at one cut; the applier stands still meanwhile.
const HELD_MAX: usize = 20_000;

/// What is to be mended.
#[derive(Debug, Clone)]
pub enum Mend {
    Rows {
        schema: String,
        name: String,
        rows: MendRows,
        /// Who asks, for the record.
        actor: String,
    },
    /// Everything that quarantine concerns, which is empty then.
    Held { actor: String },
    /// All sequences are copied, whatever this applier believes the secondary to have.
    Sequences,
}

#[derive(Debug, Clone)]
pub enum MendRows {
    /// Name and type of each key column, and the keys, as text.
    Keys {
        columns: Vec<(String, String)>,
        keys: Vec<Vec<String>>,
    },
    /// Whole rows, of a table without a key: as many as the primary has of each.
    Images(Vec<String>),
}

/// What was done, in which round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mended {
    pub round: u64,
    pub deleted: u64,
    pub inserted: u64,
}

/// Images that go and come.
#[derive(Default)]
struct Exchange {
    delete: Vec<String>,
    gone: Vec<String>,
    come: Vec<String>,
}

impl Session {
    /// Carries it out. The answer says what was done, or why nothing was.
    ///
    /// # Errors
    /// The session is of no use any more.
    pub(super) async fn mend(&mut self, mend: &Mend) -> Result<Result<Mended, String>, ApplyError> {
        match mend {
            Mend::Sequences => {
                self.sequences.forget();
                self.copy_sequences(true).await?;
                Ok(Ok(Mended {
                    round: self.round,
                    ..Mended::default()
                }))
            }
            Mend::Rows {
                schema,
                name,
                rows,
                actor,
            } => self.mend_table(schema, name, rows, actor).await,
            Mend::Held { actor } => self.mend_held(actor).await,
        }
    }

    async fn mend_table(
        &mut self,
        schema: &str,
        name: &str,
        rows: &MendRows,
        actor: &str,
    ) -> Result<Result<Mended, String>, ApplyError> {
        let found = self
            .tables
            .iter()
            .find(|table| table.schema == schema && table.name == name);
        let Some(rel) = found.filter(|table| table.writer.is_some()).map(|table| table.rel) else {
            return Ok(Err("it is not mirrored now, or its mirroring is paused".into()));
        };
        if self.held.holds(rel) {
            return Ok(Err(
                "transactions in quarantine concern it; `pgtandem quarantine retry` or `pgtandem quarantine discard` them first"
                    .into(),
            ));
        }
        self.exchange_and_write(&[(rel, rows.clone())], &[], actor).await
    }

    /// Brings every row that a held transaction touches to what the primary has, and empties the
    /// quarantine.
    ///
    /// Before, the secondary is the primary without the effects of what is held (held.rs). Each of
    /// these effects is on a row whose key, or without a key whose image, is in a held change. So
    /// with these rows as on the primary, all of them are; and there is nothing left to retry.
    async fn mend_held(&mut self, actor: &str) -> Result<Result<Mended, String>, ApplyError> {
        let (rows, entries) = match self.held_rows().await? {
            Ok(found) => found,
            Err(why) => return Ok(Err(why)),
        };
        if entries.is_empty() {
            return Ok(Ok(Mended::default()));
        }
        let mended = self.exchange_and_write(&rows, &entries, actor).await?;
        self.load_held(None).await?;
        self.summarize_quarantine().await?;
        Ok(mended)
    }

    /// The rows that everything in quarantine touches, and its entries; or why they cannot be
    /// mended.
    async fn held_rows(&self) -> Result<Result<(Vec<(Oid, MendRows)>, Vec<i64>), String>, ApplyError> {
        let refused = |what: &str| {
            Ok(Err(format!(
                "the quarantine holds {what}; `pgtandem quarantine retry` or `pgtandem quarantine discard` it"
            )))
        };
        let epoch = self.config.epoch.0 as i64;
        let entries = self
            .secondary
            .query(
                "SELECT q.id FROM pgtandem.quarantine q WHERE q.epoch = $1 ORDER BY q.id",
                &[&epoch],
            )
            .await
            .map_err(doing("read what is in quarantine"))?;
        let changes = self
            .secondary
            .query(
                "SELECT c.rel, c.op, c.old, c.new, c.old_bytes, c.new_bytes FROM pgtandem.quarantine_change c JOIN pgtandem.quarantine q USING (id)
                  WHERE q.epoch = $1 AND NOT c.void LIMIT $2",
                &[&epoch, &(HELD_MAX as i64 + 1)],
            )
            .await
            .map_err(doing("read what is in quarantine"))?;
        if changes.len() > HELD_MAX {
            return refused("too many changes to be mended at one cut");
        }
        let mut images: BTreeMap<Oid, BTreeSet<Vec<u8>>> = BTreeMap::new();
        for change in &changes {
            if change.get::<_, i8>(1) as u8 != b'R' {
                return refused("DDL or a TRUNCATE");
            }
            let texts = [2, 3].map(|at| change.get::<_, Option<String>>(at).map(String::into_bytes));
            let bytes = [4, 5].map(|at| change.get::<_, Option<Vec<u8>>>(at));
            let both = texts.into_iter().chain(bytes).flatten();
            images.entry(change.get(0)).or_default().extend(both);
        }
        let mut rows = Vec::with_capacity(images.len());
        for (rel, images) in images {
            let Some(touched) = self.rows_of_images(rel, images) else {
                return refused("rows of a table that is not mirrored now, or that are no text here");
            };
            rows.push((rel, touched));
        }
        Ok(Ok((rows, entries.iter().map(|row| row.get(0)).collect())))
    }

    fn rows_of_images(&self, rel: Oid, images: BTreeSet<Vec<u8>>) -> Option<MendRows> {
        let writer = self.tables.get(rel)?.writer.as_ref()?;
        let table = writer.table();
        let Some(key) = &table.key else {
            let texts: Result<_, _> = images.into_iter().map(String::from_utf8).collect();
            return texts.ok().map(MendRows::Images);
        };
        let type_of = |name: &String| {
            let column = table.columns.iter().find(|column| column.name == *name)?;
            Some((name.clone(), column.type_name.clone()))
        };
        let keys: Option<BTreeSet<Vec<String>>> = images
            .iter()
            .map(|image| image::key_fields(image, &writer.key_positions))
            .collect();
        Some(MendRows::Keys {
            columns: key.columns.iter().map(type_of).collect::<Option<_>>()?,
            keys: keys?.into_iter().collect(),
        })
    }

    /// Reads these rows on the primary and writes them here, all or nothing.
    async fn exchange_and_write(
        &mut self,
        rows: &[(Oid, MendRows)],
        entries: &[i64],
        actor: &str,
    ) -> Result<Result<Mended, String>, ApplyError> {
        let mut exchanges = Vec::with_capacity(rows.len());
        for (rel, rows) in rows {
            match self.exchange(*rel, rows).await {
                Ok(exchange) => exchanges.push((*rel, exchange)),
                Err(error) if error.is_connection() => return Err(error),
                Err(error) => return Ok(Err(error.to_string())),
            }
        }
        let refusal = match self.write_exchanges(&exchanges, entries, actor).await {
            Ok(mended) => return Ok(Ok(mended)),
            Err(NotWritten::Surprise(refusal)) => refusal,
            Err(NotWritten::Failed(error)) => self.refusal_of(error)?,
        };
        self.roll_back().await?;
        Ok(Err(format!("the secondary refuses: {refusal}")))
    }

    /// What the primary has of these rows in the round's snapshot.
    async fn exchange(&self, rel: Oid, rows: &MendRows) -> Result<Exchange, ApplyError> {
        let mut exchange = Exchange::default();
        let (Some(image), Some(table)) = (self.primary_image(rel), self.tables.get(rel)) else {
            return Ok(exchange);
        };
        let target = crate::catalog::quote::qualified(&table.schema, &table.name);
        let source = self.faces.relation(rel).unwrap_or(&target);
        match rows {
            MendRows::Keys { columns, keys } => {
                for keys in keys.chunks(AT_ONCE) {
                    let condition = among(columns, keys);
                    let sql = format!("SELECT {image} FROM ONLY {source} AS t WHERE {condition}");
                    let found = self.primary.query(&sql, &[]).await;
                    let found = found.map_err(doing("read rows to be mended on the primary"))?;
                    exchange.come.extend(found.iter().map(|row| row.get::<_, String>(0)));
                    exchange.delete.push(condition);
                }
            }
            MendRows::Images(images) => {
                let theirs = table
                    .writer
                    .as_ref()
                    .map_or_else(|| image.clone(), |writer| writer.row_text().to_owned());
                let count = |image: &str, relation: &str| {
                    format!(
                        "SELECT s.i, count(*) FROM (SELECT {image} COLLATE \"C\" AS i FROM ONLY {relation} AS t) s
                          WHERE s.i = ANY ($1::text[]) GROUP BY 1"
                    )
                };
                let (here, there) = (count(&image, source), count(&theirs, &target));
                let wanted: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [images];
                let (here, there) = tokio::try_join!(
                    self.primary.query(&here, &wanted),
                    self.secondary.query(&there, &wanted)
                )
                .map_err(doing("count rows to be mended"))?;
                let mut surplus: HashMap<String, i64> = HashMap::new();
                for (rows, by) in [(here, 1), (there, -1)] {
                    for row in rows {
                        *surplus.entry(row.get(0)).or_default() += by * row.get::<_, i64>(1);
                    }
                }
                for (image, by) in surplus {
                    let side = if by < 0 { &mut exchange.gone } else { &mut exchange.come };
                    side.extend(std::iter::repeat_n(image, by.unsigned_abs() as usize));
                }
            }
        }
        Ok(exchange)
    }

    /// How the primary writes a row `t` as an image; what the secondary computes is left out.
    fn primary_image(&self, rel: Oid) -> Option<String> {
        let table = self.tables.get(rel)?;
        let here = table.writer.as_ref()?.table();
        let fields: Vec<String> = column_names(&table.columns)
            .iter()
            .map(|name| match here.columns.iter().find(|column| column.name == *name) {
                Some(column) if column.generated != Generated::Virtual => format!("t.{}", identifier(name)),
                _ => "NULL".to_owned(),
            })
            .collect();
        Some(format!("ROW({})::text", fields.join(", ")))
    }

    async fn write_exchanges(
        &mut self,
        exchanges: &[(Oid, Exchange)],
        entries: &[i64],
        actor: &str,
    ) -> Result<Mended, NotWritten> {
        let end = self.standing();
        let ending = Ending {
            end: &end,
            stop: Stop::Target,
            flushed: 0,
        };
        self.begin_counting(0);
        let mut begin = Writes::default();
        begin.begin(self.watermark_sql(&ending));
        begin.text("SET LOCAL enable_hashjoin = on");
        self.write(&begin).await?;
        let mut mended = Mended {
            round: self.round + 1,
            ..Mended::default()
        };
        for (rel, exchange) in exchanges {
            let (deleted, inserted) = self.write_exchange(*rel, exchange, actor).await?;
            mended.deleted += deleted;
            mended.inserted += inserted;
        }
        for &id in entries {
            self.leave(id, "repaired", actor, None).await?;
        }
        // A crash of the primary must not take back what is now on the secondary.
        wait_flushed(&self.aside, end.position, 0).await?;
        self.commit().await?;
        self.reached(&ending);
        Ok(mended)
    }

    /// One table's rows, deleted and inserted.
    async fn write_exchange(&self, rel: Oid, exchange: &Exchange, actor: &str) -> Result<(u64, u64), NotWritten> {
        let inconsistent = || ApplyError::Inconsistent(format!("table {rel} lost its definition inside a round"));
        let table = self.tables.get(rel).ok_or_else(inconsistent)?;
        let writer = table.writer.as_ref().ok_or_else(inconsistent)?;
        let target = writer.table().qualified();
        let silence = writer.silence();
        if let Some((off, _)) = &silence {
            self.secondary.batch_execute(off).await.map_err(failed)?;
        }
        // All that goes comes first: unique values are free before they are given out again.
        let mut deleted = 0;
        for condition in &exchange.delete {
            let sql = format!("DELETE FROM ONLY {target} AS t WHERE {condition}");
            deleted += self.secondary.execute(&sql, &[]).await.map_err(failed)?;
        }
        deleted += self
            .execute_with(&writer.delete(Source::Parameter), &exchange.gone)
            .await?;
        let inserted = self
            .execute_with(&writer.insert(Source::Parameter), &exchange.come)
            .await?;
        if let Some((_, on)) = &silence {
            self.secondary.batch_execute(on).await.map_err(failed)?;
        }
        let record = format!(
            "INSERT INTO pgtandem.mended (round, schema, name, deleted, inserted, actor) VALUES ({}, {}, {}, {deleted}, {inserted}, {})",
            self.round + 1,
            literal(&table.schema),
            literal(&table.name),
            literal(actor)
        );
        self.secondary.batch_execute(&record).await.map_err(failed)?;
        tracing::warn!(
            schema = table.schema,
            table = table.name,
            deleted,
            inserted,
            "rows are mended from the primary"
        );
        Ok((deleted, inserted))
    }

    async fn execute_with(&self, sql: &str, images: &[String]) -> Result<u64, NotWritten> {
        if images.is_empty() {
            return Ok(0);
        }
        let images = ImageArray(images.iter().map(String::as_bytes).collect());
        self.secondary.execute(sql, &[&images]).await.map_err(failed)
    }
}

fn failed(error: tokio_postgres::Error) -> NotWritten {
    NotWritten::Failed(doing("mend rows")(error))
}

/// The condition that a row `t` has one of these keys.
fn among(columns: &[(String, String)], keys: &[Vec<String>]) -> String {
    let names: Vec<String> = columns
        .iter()
        .map(|(name, _)| format!("t.{}", identifier(name)))
        .collect();
    let rows: Vec<String> = keys
        .iter()
        .map(|key| {
            let values: Vec<String> = columns
                .iter()
                .zip(key)
                .map(|((_, type_name), value)| format!("{}::{type_name}", literal(value)))
                .collect();
            format!("({})", values.join(", "))
        })
        .collect();
    format!("({}) IN (VALUES {})", names.join(", "), rows.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_on_keys() {
        let columns = [
            ("a".to_owned(), "integer".to_owned()),
            ("b".to_owned(), "text".to_owned()),
        ];
        let keys = [
            vec!["1".to_owned(), "x'".to_owned()],
            vec!["2".to_owned(), String::new()],
        ];
        assert_eq!(
            among(&columns, &keys),
            "(t.\"a\", t.\"b\") IN (VALUES ('1'::integer, 'x'''::text), ('2'::integer, ''::text))"
        );
    }
}
