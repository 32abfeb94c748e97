//! What a mapping needs to know of a side: its tables, their columns and keys, and its own types.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use tokio_postgres::Client;

use super::Name;
use crate::catalog::Oid;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Column {
    pub name: String,
    /// As `format_type` gives it with the pinned settings.
    #[serde(rename = "type")]
    pub type_name: String,
    /// `pg_type.typtype`: b, c, d, e, …
    pub kind: String,
    /// The type is the server's own.
    pub built_in: bool,
    pub not_null: bool,
    /// Empty, s, v.
    pub generated: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFacts {
    pub name: Name,
    pub oid: Oid,
    /// `pg_class.relkind`: r, p.
    pub kind: String,
    pub partition: bool,
    /// A crash empties it.
    pub unlogged: bool,
    pub columns: Vec<Column>,
    /// Of unique indexes over plain NOT NULL columns.
    pub keys: Vec<Vec<String>>,
}

impl TableFacts {
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }
}

/// One side.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Catalog {
    pub tables: BTreeMap<Name, TableFacts>,
    /// Types that are not the server's own.
    pub types: BTreeSet<String>,
}

const TABLES: &str = "\
SELECT n.nspname::text, c.relname::text, c.oid, c.relkind::text, c.relispartition,
       (SELECT COALESCE(json_agg(json_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod), 'kind', t.typtype,
                 'built_in', t.typnamespace = 'pg_catalog'::regnamespace, 'not_null', a.attnotnull, 'generated', a.attgenerated) ORDER BY a.attnum), '[]')::text
          FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
       (SELECT COALESCE(json_agg(k.columns ORDER BY i.indisprimary DESC, i.indexrelid), '[]')::text
          FROM pg_index i
         CROSS JOIN LATERAL (SELECT json_agg(a.attname ORDER BY x.ord) AS columns, bool_and(a.attnotnull) AS not_null
                               FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS x(attnum, ord)
                               JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = x.attnum WHERE x.ord <= i.indnkeyatts) k
         WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL AND k.not_null),
       c.relpersistence = 'u'
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
   AND n.nspname NOT IN ('pgtandem', 'information_schema') AND n.nspname NOT LIKE 'pg\\_%'";

const TYPES: &str = "\
SELECT format_type(t.oid, NULL) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pgtandem')";

impl Catalog {
    /// The session must have the [pinned settings](crate::catalog::PINNED_SETTINGS).
    pub async fn read(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let (tables, types) = tokio::try_join!(client.query(TABLES, &[]), client.query(TYPES, &[]))?;
        let tables = tables.iter().map(|row| {
            let name = Name::new(row.get(0), row.get(1));
            let table = TableFacts {
                name: name.clone(),
                oid: row.get(2),
                kind: row.get(3),
                partition: row.get(4),
                // Our own query built the JSON; without columns every mapping of the table is wrong.
                columns: serde_json::from_str(row.get(5)).unwrap_or_default(),
                keys: serde_json::from_str(row.get(6)).unwrap_or_default(),
                unlogged: row.get(7),
            };
            (name, table)
        });
        Ok(Self {
            tables: tables.collect(),
            types: types.iter().map(|row| row.get(0)).collect(),
        })
    }
}
