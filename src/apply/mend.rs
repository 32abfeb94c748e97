//! Rows of the secondary brought to what the primary has, at the end of a round.
//!
//! The round's transaction on the primary is still open, so its rows are read in the very snapshot
//! that the secondary has just reached, and nothing is applied until they are written: so this
//! cannot collide with live writes, and cannot bring back what a later round has changed. Rows and
//! watermark are written in one transaction, as a round is: an applier that was deposed meanwhile
//! mends nothing.

use std::collections::HashMap;

use super::pipeline::ImageArray;
use super::round::{Ending, Stop, wait_flushed};
use super::rows::NotWritten;
use super::session::{Session, Target};
use super::statements::Source;
use super::tables::column_names;
use super::{ApplyError, doing};
use crate::catalog::Oid;
use crate::catalog::quote::{identifier, literal};
use crate::catalog::table::Generated;

/// Keys asked for by one statement.
const AT_ONCE: usize = 500;

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
        let exchange = match self.exchange(rel, rows).await {
            Ok(exchange) => exchange,
            Err(error) if error.is_connection() => return Err(error),
            Err(error) => return Ok(Err(error.to_string())),
        };
        match self.write_exchange(rel, exchange, actor).await {
            Ok(mended) => Ok(Ok(mended)),
            Err(NotWritten::Surprise(refusal)) => {
                self.roll_back().await?;
                Ok(Err(refusal.to_string()))
            }
            Err(NotWritten::Failed(error)) => {
                let refusal = self.refusal_of(error)?;
                self.roll_back().await?;
                Ok(Err(refusal.to_string()))
            }
        }
    }

    /// What the primary has of these rows in the round's snapshot.
    async fn exchange(&self, rel: Oid, rows: &MendRows) -> Result<Exchange, ApplyError> {
        let mut exchange = Exchange::default();
        let (Some(image), Some(table)) = (self.primary_image(rel), self.tables.get(rel)) else {
            return Ok(exchange);
        };
        let target = crate::catalog::quote::qualified(&table.schema, &table.name);
        match rows {
            MendRows::Keys { columns, keys } => {
                for keys in keys.chunks(AT_ONCE) {
                    let condition = among(columns, keys);
                    let sql = format!("SELECT {image} FROM ONLY {target} AS t WHERE {condition}");
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
                let count = |image: &str| {
                    format!(
                        "SELECT s.i, count(*) FROM (SELECT {image} COLLATE \"C\" AS i FROM ONLY {target} AS t) s
                          WHERE s.i = ANY ($1::text[]) GROUP BY 1"
                    )
                };
                let (here, there) = (count(&image), count(&theirs));
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

    async fn write_exchange(&mut self, rel: Oid, exchange: Exchange, actor: &str) -> Result<Mended, NotWritten> {
        let inconsistent = || ApplyError::Inconsistent(format!("table {rel} lost its definition inside a round"));
        let table = self.tables.get(rel).ok_or_else(inconsistent)?;
        let writer = table.writer.clone().ok_or_else(inconsistent)?;
        let names = (literal(&table.schema), literal(&table.name));
        let target = writer.table().qualified();
        let end = Target {
            snapshot: self.since.clone(),
            position: self.position,
            piece: 0,
        };
        let ending = Ending {
            end: &end,
            stop: Stop::Target,
            flushed: 0,
        };
        let failed = doing("mend rows");
        self.begin_counting(0);
        let mut mended = Mended {
            round: self.round + 1,
            ..Mended::default()
        };
        let mut begin = super::rows::Writes::default();
        begin.begin(self.watermark_sql(&ending));
        if let Some((off, _)) = writer.silence() {
            begin.text(off);
        }
        begin.text("SET LOCAL enable_hashjoin = on");
        self.write(&begin).await?;
        // All that goes comes first: unique values are free before they are given out again.
        for condition in &exchange.delete {
            let sql = format!("DELETE FROM ONLY {target} AS t WHERE {condition}");
            mended.deleted += self
                .secondary
                .execute(&sql, &[])
                .await
                .map_err(failed_as("mend rows"))?;
        }
        for (images, sql, count) in [
            (&exchange.gone, writer.delete(Source::Parameter), &mut mended.deleted),
            (&exchange.come, writer.insert(Source::Parameter), &mut mended.inserted),
        ] {
            if images.is_empty() {
                continue;
            }
            let images = ImageArray(images.iter().map(|image| image.as_bytes()).collect());
            *count += self
                .secondary
                .execute(&sql, &[&images])
                .await
                .map_err(failed_as("mend rows"))?;
        }
        if let Some((_, on)) = writer.silence() {
            self.secondary
                .batch_execute(&on)
                .await
                .map_err(failed_as("mend rows"))?;
        }
        let record = format!(
            "INSERT INTO pgtandem.mended (round, schema, name, deleted, inserted, actor) VALUES ({}, {}, {}, {}, {}, {})",
            mended.round,
            names.0,
            names.1,
            mended.deleted,
            mended.inserted,
            literal(actor)
        );
        self.secondary.batch_execute(&record).await.map_err(failed)?;
        // A crash of the primary must not take back what is now on the secondary.
        wait_flushed(&self.aside, end.position, 0).await?;
        self.commit().await?;
        self.reached(&ending);
        tracing::warn!(
            schema = names.0,
            table = names.1,
            deleted = mended.deleted,
            inserted = mended.inserted,
            round = mended.round,
            "rows were mended from the primary"
        );
        Ok(mended)
    }
}

fn failed_as(what: &'static str) -> impl FnOnce(tokio_postgres::Error) -> NotWritten {
    move |error| NotWritten::Failed(doing(what)(error))
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
