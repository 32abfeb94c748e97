//! Whether two databases hold the same rows: every table of both, as multisets of row texts
//! under the pinned settings. For tests, the demo and checks of small databases; it reads
//! everything, and is meaningful only while nobody writes or at a cut.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use tokio_postgres::Client;

use super::{PINNED_SETTINGS, quote};

/// One table that is not the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableDifference {
    pub schema: String,
    pub name: String,
    /// Rows only on the first side, and only on the second. A table that one side does not have
    /// counts all rows of the other, and says so in `missing_on`.
    pub only_first: u64,
    pub only_second: u64,
    pub missing_on: Option<&'static str>,
    /// A few of the rows that are on one side only, for a person to look at.
    pub examples: Vec<String>,
}

impl std::fmt::Display for TableDifference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}: ", self.schema, self.name)?;
        if let Some(side) = self.missing_on {
            return write!(f, "missing on the {side} database");
        }
        write!(
            f,
            "{} rows only on the first database, {} only on the second",
            self.only_first, self.only_second
        )?;
        for example in &self.examples {
            write!(f, "\n  {example}")?;
        }
        Ok(())
    }
}

const EXAMPLES_MAX: usize = 5;

/// Compares every ordinary table outside schema `pgtandem`, sequences included. Empty: the same.
pub async fn rows_different(first: &Client, second: &Client) -> Result<Vec<TableDifference>, tokio_postgres::Error> {
    for client in [first, second] {
        client.batch_execute(PINNED_SETTINGS).await?;
    }
    let here = tables(first).await?;
    let there = tables(second).await?;
    let names: BTreeSet<&(String, String)> = here.keys().chain(there.keys()).collect();
    let mut differences = Vec::new();
    for name in names {
        let (mine, yours) = (here.get(name), there.get(name));
        if let (Some(mine), Some(yours)) = (mine, yours)
            && digest(first, name, mine).await? == digest(second, name, yours).await?
        {
            continue;
        }
        let difference = list(first, second, name, mine, yours).await?;
        if difference.only_first + difference.only_second > 0 || difference.missing_on.is_some() {
            differences.push(difference);
        }
    }
    Ok(differences)
}

/// Columns by name, so that another order is no difference.
async fn tables(client: &Client) -> Result<BTreeMap<(String, String), Vec<String>>, tokio_postgres::Error> {
    let rows = client
        .query(
            "SELECT n.nspname::text, c.relname::text, c.relkind::text,
                    COALESCE((SELECT array_agg(a.attname::text ORDER BY a.attname) FROM pg_attribute a
                      WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '{}')
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE c.relkind IN ('r', 'S') AND c.relpersistence <> 't'
                AND n.nspname NOT IN ('pgtandem', 'information_schema') AND n.nspname NOT LIKE 'pg\\_%'",
            &[],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| {
            let kind: String = row.get(2);
            let columns = if kind == "S" {
                vec!["last_value".to_owned(), "is_called".to_owned()]
            } else {
                row.get(3)
            };
            ((row.get(0), row.get(1)), columns)
        })
        .collect())
}

fn row_text(columns: &[String]) -> String {
    let listed: Vec<String> = columns
        .iter()
        .map(|name| format!("t.{}", quote::identifier(name)))
        .collect();
    format!("ROW({})::text", listed.join(", "))
}

/// Count and an order-free sum of hashes: equal digests of different rows would need a
/// collision of 2 × 64 bits.
async fn digest(
    client: &Client,
    (schema, name): &(String, String),
    columns: &[String],
) -> Result<(i64, String), tokio_postgres::Error> {
    let sql = format!(
        "SELECT count(*), concat(COALESCE(sum(hashtextextended(x.r, 1)::numeric), 0), ' ', COALESCE(sum(hashtextextended(x.r, 2)::numeric), 0))
           FROM (SELECT {} COLLATE \"C\" AS r FROM ONLY {} AS t) x",
        row_text(columns),
        quote::qualified(schema, name)
    );
    let row = client.query_one(&sql, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

async fn list(
    first: &Client,
    second: &Client,
    name: &(String, String),
    mine: Option<&Vec<String>>,
    yours: Option<&Vec<String>>,
) -> Result<TableDifference, tokio_postgres::Error> {
    let mut counts: BTreeMap<String, i64> = BTreeMap::new();
    for (client, columns, by) in [(first, mine, 1), (second, yours, -1)] {
        let Some(columns) = columns else { continue };
        let sql = format!(
            "SELECT {} AS r, count(*) FROM ONLY {} AS t GROUP BY 1",
            row_text(columns),
            quote::qualified(&name.0, &name.1)
        );
        for row in client.query(&sql, &[]).await? {
            *counts.entry(row.get(0)).or_default() += by * row.get::<_, i64>(1);
        }
    }
    counts.retain(|_, count| *count != 0);
    let examples = counts
        .iter()
        .take(EXAMPLES_MAX)
        .map(|(row, count)| format!("{count:+} {row}"))
        .collect();
    Ok(TableDifference {
        schema: name.0.clone(),
        name: name.1.clone(),
        only_first: counts.values().filter(|count| **count > 0).sum::<i64>() as u64,
        only_second: -counts.values().filter(|count| **count < 0).sum::<i64>() as u64,
        missing_on: match (mine, yours) {
            (None, _) => Some("the first"),
            (_, None) => Some("the second"),
            _ => None,
        },
        examples,
    })
}
