//! The mirrored tables as the secondary has recorded them (`pgtandem.seeding`), with what is
//! needed to write each.

use std::collections::HashMap;

use tokio_postgres::{Client, Statement};

use super::ApplyError;
use super::statements::Writer;
use super::status::{Seeding, TableStatus, Verified};
use crate::apply::doing;
use crate::catalog::{Oid, table};
use crate::journal::read::Shape;

/// One mirrored table. Known by the primary's OID, which survives renames.
pub(super) struct Mirrored {
    pub rel: Oid,
    pub local: Option<Oid>,
    pub schema: String,
    pub name: String,
    pub state: Seeding,
    pub paused: Option<String>,
    pub note: Option<String>,
    /// The primary's columns, JSON as view `pgtandem.shape` has it, as of the last applied DDL.
    pub columns: String,
    /// What the primary's definition must look like at the end of a round.
    pub shape: Shape,
    /// How to write it; `None` while paused.
    pub writer: Option<Writer>,
    pub diverged: u64,
    pub verified: Option<Verified>,
    /// The columns of the primary's unique indexes; read when a row stands in the way of one here.
    pub theirs: Vec<Vec<String>>,
    prepared: HashMap<String, Statement>,
}

impl Mirrored {
    /// Prepares once per connection and definition.
    pub(super) async fn prepare(&mut self, client: &Client, sql: String) -> Result<Statement, tokio_postgres::Error> {
        if let Some(statement) = self.prepared.get(&sql) {
            return Ok(statement.clone());
        }
        let hides_rows = self.writer.as_ref().is_some_and(|writer| writer.table().hides_rows);
        if hides_rows {
            // The statement runs while row security is not forced; preparing it comes before.
            client.batch_execute("SET row_security = on").await?;
        }
        let statement = client.prepare(&sql).await?;
        if hides_rows {
            client.batch_execute("SET row_security = off").await?;
        }
        self.prepared.insert(sql, statement.clone());
        Ok(statement)
    }

    pub(super) fn status(&self) -> TableStatus {
        TableStatus {
            schema: self.schema.clone(),
            name: self.name.clone(),
            seeding: self.state,
            paused: self.paused.clone(),
            note: self.note.clone(),
            diverged: self.diverged,
            verified: self.verified.clone(),
        }
    }
}

/// All of them.
#[derive(Default)]
pub(super) struct Tables {
    by_rel: HashMap<Oid, Mirrored>,
}

impl Tables {
    /// Reads the recorded tables and their definitions here. Also inside a round's transaction,
    /// after a DDL statement.
    pub(super) async fn load(secondary: &Client) -> Result<Self, ApplyError> {
        let rows = secondary
            .query(
                &format!(
                    "SELECT s.rel, s.local, s.schema, s.name, s.state, s.paused, s.note, s.columns, s.shape, s.filenode, s.attributes,
                        (SELECT count(*) FROM pgtandem.divergence d WHERE d.schema = s.schema AND d.name = s.name), {VERIFIED}
                   FROM pgtandem.seeding s LEFT JOIN pgtandem.verified v USING (schema, name)"
                ),
                &[],
            )
            .await
            .map_err(doing("read pgtandem.seeding"))?;
        let mut by_rel = HashMap::with_capacity(rows.len());
        for row in &rows {
            let mirrored = Mirrored {
                rel: row.get(0),
                local: row.get(1),
                schema: row.get(2),
                name: row.get(3),
                state: Seeding::parse(row.get(4)),
                paused: row.get(5),
                note: row.get(6),
                columns: row.get(7),
                shape: Shape {
                    rel: row.get(0),
                    shape: row.get(8),
                    filenode: row.get(9),
                    attributes: row.get(10),
                },
                writer: None,
                diverged: row.get::<_, i64>(11) as u64,
                verified: verified(row, 12),
                theirs: Vec::new(),
                prepared: HashMap::new(),
            };
            by_rel.insert(mirrored.rel, mirrored);
        }
        let mut tables = Self { by_rel };
        tables.load_definitions(secondary).await?;
        Ok(tables)
    }

    async fn load_definitions(&mut self, secondary: &Client) -> Result<(), ApplyError> {
        let locals: Vec<Oid> = self
            .by_rel
            .values()
            .filter(|mirrored| mirrored.paused.is_none())
            .filter_map(|mirrored| mirrored.local)
            .collect();
        let loaded = table::load(secondary, &locals)
            .await
            .map_err(doing("read the secondary's tables"))?;
        let mut by_local: HashMap<Oid, table::Table> = loaded.into_iter().map(|table| (table.oid, table)).collect();
        let mut pausing = Vec::new();
        for mirrored in self.by_rel.values_mut().filter(|mirrored| mirrored.paused.is_none()) {
            let table = mirrored.local.and_then(|local| by_local.remove(&local));
            let Some(table) = table else {
                pausing.push((mirrored.rel, "the secondary has no such table".to_owned()));
                continue;
            };
            let columns = column_names(&mirrored.columns);
            let mut known: Vec<&String> = columns.iter().collect();
            let mut here: Vec<&String> = table.columns.iter().map(|column| &column.name).collect();
            known.sort_unstable();
            here.sort_unstable();
            if known != here {
                let reason = format!(
                    "columns differ: the primary has ({}), the secondary ({})",
                    join(&known),
                    join(&here)
                );
                pausing.push((mirrored.rel, reason));
                continue;
            }
            let writer = Writer::new(table, &columns);
            if let Some(sql) = writer.create_image_type(&columns) {
                secondary
                    .batch_execute(&format!("SET client_min_messages = warning; {sql}"))
                    .await
                    .map_err(doing("create a row type in the primary's column order"))?;
            }
            mirrored.writer = Some(writer);
        }
        for (rel, reason) in pausing {
            self.pause(secondary, rel, &reason).await?;
        }
        Ok(())
    }

    /// Leaves a table's changes out from now on, and says so; afterwards it needs seeding.
    pub(super) async fn pause(&mut self, secondary: &Client, rel: Oid, reason: &str) -> Result<(), ApplyError> {
        record_pause(secondary, rel, reason).await?;
        if let Some(mirrored) = self.by_rel.get_mut(&rel) {
            tracing::error!(
                schema = mirrored.schema,
                table = mirrored.name,
                reason,
                "mirroring of a table is paused; it will need seeding"
            );
            mirrored.paused = Some(reason.to_owned());
            mirrored.state = Seeding::Unseeded;
            mirrored.writer = None;
        }
        Ok(())
    }

    pub(super) fn get(&self, rel: Oid) -> Option<&Mirrored> {
        self.by_rel.get(&rel)
    }

    pub(super) fn get_mut(&mut self, rel: Oid) -> Option<&mut Mirrored> {
        self.by_rel.get_mut(&rel)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Mirrored> {
        self.by_rel.values()
    }

    pub(super) fn rels(&self) -> Vec<Oid> {
        self.by_rel.keys().copied().collect()
    }

    pub(super) fn status(&self) -> Vec<TableStatus> {
        let mut list: Vec<TableStatus> = self.by_rel.values().map(Mirrored::status).collect();
        list.sort_by(|one, other| (&one.schema, &one.name).cmp(&(&other.schema, &other.name)));
        list
    }

    /// The statements that write one table's images, prepared.
    pub(super) async fn prepare(
        &mut self,
        client: &Client,
        rel: Oid,
        text: impl FnOnce(&Writer) -> Option<String>,
    ) -> Result<Option<Statement>, tokio_postgres::Error> {
        let Some(mirrored) = self.by_rel.get_mut(&rel) else {
            return Ok(None);
        };
        let Some(sql) = mirrored.writer.as_ref().and_then(text) else {
            return Ok(None);
        };
        mirrored.prepare(client, sql).await.map(Some)
    }
}

/// When and at which cut `v`, a row of `pgtandem.verified`, says that a table was equal.
pub(super) const VERIFIED: &str =
    r#"to_char(v.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), v.round, v.position::text"#;

/// What [`VERIFIED`] gives, from this column on.
pub(super) fn verified(row: &tokio_postgres::Row, column: usize) -> Option<Verified> {
    Some(Verified {
        at: row.get::<_, Option<String>>(column)?,
        round: row.get::<_, i64>(column + 1) as u64,
        position: row.get(column + 2),
    })
}

/// What is held of the table in quarantine means nothing any more: it needs seeding as a whole.
pub(super) async fn record_pause(secondary: &Client, rel: Oid, reason: &str) -> Result<(), ApplyError> {
    secondary
        .execute("SELECT pgtandem.void_held($1, $2)", &[&rel, &reason])
        .await
        .map_err(doing("void what is held of a paused table"))?;
    secondary
        .execute(
            "UPDATE pgtandem.seeding SET state = 'unseeded', paused = $2 WHERE rel = $1",
            &[&rel, &reason],
        )
        .await
        .map_err(doing("pause a table"))?;
    Ok(())
}

/// Names out of the JSON of view `pgtandem.shape`: `[["name", "type", "generated"], …]`.
pub(super) fn column_names(columns: &str) -> Vec<String> {
    let parsed: Vec<(String, String, String)> = serde_json::from_str(columns).unwrap_or_default();
    parsed.into_iter().map(|(name, _, _)| name).collect()
}

/// Whether both sides' columns are the same but for their order.
pub(super) fn same_columns(one: &str, other: &str) -> bool {
    let parse = |text: &str| {
        let mut parsed: Vec<(String, String, String)> = serde_json::from_str(text).unwrap_or_default();
        parsed.sort_unstable();
        parsed
    };
    parse(one) == parse(other)
}

fn join(names: &[&String]) -> String {
    names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_compared_whatever_their_order() {
        let one = r#"[["a","integer",""],["b","text",""]]"#;
        let two = r#"[["b","text",""],["a","integer",""]]"#;
        let three = r#"[["b","text",""],["a","bigint",""]]"#;
        assert!(same_columns(one, two));
        assert!(!same_columns(one, three));
        assert_eq!(column_names(two), ["b", "a"]);
    }
}
