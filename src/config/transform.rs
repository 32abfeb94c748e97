//! `transform:` of a database: how its schema differs between the two sides.
//!
//! ```yaml
//! transform:
//!   schemas: { sales: crm }
//!   tables:
//!     public.kunden:
//!       to: public.customers
//!       columns:
//!         full_name: name
//!         cents: { sql: "(preis * 100)::bigint" }
//!       drop: [fax]
//!       inverse: { preis: "cents / 100.0", fax: "NULL" }
//!     public.orders:
//!       split:
//!         public.orders: {}
//!         public.order_notes: { columns: { text: note }, missing: nulls }
//! ```

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// A table's name with its schema.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    pub schema: String,
    pub table: String,
}

impl Name {
    pub fn new(schema: &str, table: &str) -> Self {
        Self {
            schema: schema.to_owned(),
            table: table.to_owned(),
        }
    }

    /// `"schema"."table"`
    pub fn quoted(&self) -> String {
        crate::catalog::quote::qualified(&self.schema, &self.table)
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.schema, self.table)
    }
}

/// Parses `schema.table`; a name alone is in schema `public`.
impl std::str::FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (schema, table) = text.split_once('.').unwrap_or(("public", text));
        if schema.is_empty() || table.is_empty() {
            return Err(format!("\"{text}\" is no table; write schema.table"));
        }
        Ok(Self::new(schema, table))
    }
}

/// Where a column's values come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The column of that name.
    Column(String),
    /// An SQL expression over the row.
    Sql(String),
}

/// One of new's tables that a table of legacy becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub to: Name,
    /// By new's column; what is not named comes from the column of the same name.
    pub columns: BTreeMap<String, Origin>,
    /// Of a split: what legacy has of a row that this part does not have, while others do.
    pub missing: Option<Missing>,
}

/// What legacy has of a row while a part of it is missing on new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Missing {
    /// The row, with NULLs for the part's columns; and a row of legacy with nothing else there has
    /// none in the part.
    Nulls,
    /// No row, until the part has one.
    NoRow,
}

/// What becomes of one of legacy's tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableMap {
    /// More than one: the table is split by columns.
    pub parts: Vec<Part>,
    /// Legacy's columns that go nowhere.
    pub drop: BTreeSet<String>,
    /// Legacy's columns as expressions over new's row, for the way back.
    pub inverse: BTreeMap<String, String>,
}

/// One database's mapping from legacy's shape to new's. Empty: both have the same.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Transform {
    /// Legacy's schemas whose tables are in another one on new, under the same names.
    pub schemas: BTreeMap<String, String>,
    pub tables: BTreeMap<Name, TableMap>,
}

impl Transform {
    pub fn is_empty(&self) -> bool {
        self.schemas.is_empty() && self.tables.is_empty()
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTransform {
    #[serde(default)]
    schemas: BTreeMap<String, String>,
    #[serde(default)]
    tables: BTreeMap<String, RawTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTable {
    to: Option<String>,
    #[serde(default)]
    columns: BTreeMap<String, RawOrigin>,
    #[serde(default)]
    split: BTreeMap<String, RawPart>,
    #[serde(default)]
    drop: BTreeSet<String>,
    #[serde(default)]
    inverse: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPart {
    #[serde(default)]
    columns: BTreeMap<String, RawOrigin>,
    missing: Option<Missing>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawOrigin {
    Column(String),
    Sql(RawSql),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSql {
    sql: String,
}

impl RawTransform {
    pub(super) fn check(self) -> Result<Transform, String> {
        let mut tables = BTreeMap::new();
        for (name, raw) in self.tables {
            let source: Name = name.parse().map_err(|error| format!("tables: {error}"))?;
            let map = raw
                .check(&source, &self.schemas)
                .map_err(|error| format!("tables: {name}: {error}"))?;
            if tables.insert(source, map).is_some() {
                return Err(format!("tables: {name}: named twice"));
            }
        }
        Ok(Transform {
            schemas: self.schemas,
            tables,
        })
    }
}

impl RawTable {
    fn check(self, source: &Name, schemas: &BTreeMap<String, String>) -> Result<TableMap, String> {
        let parts = if self.split.is_empty() {
            let to = match &self.to {
                Some(to) => to.parse()?,
                None => Name::new(schemas.get(&source.schema).unwrap_or(&source.schema), &source.table),
            };
            vec![part(to, self.columns, None)]
        } else if self.to.is_some() || !self.columns.is_empty() {
            return Err("split: stands instead of to and columns; each part has columns of its own".into());
        } else if self.split.len() < 2 {
            return Err("split: names one part; use to".into());
        } else {
            let parts = self.split.into_iter();
            parts
                .map(|(to, raw)| Ok(part(to.parse()?, raw.columns, raw.missing)))
                .collect::<Result<_, String>>()?
        };
        Ok(TableMap {
            parts,
            drop: self.drop,
            inverse: self.inverse,
        })
    }
}

fn part(to: Name, columns: BTreeMap<String, RawOrigin>, missing: Option<Missing>) -> Part {
    let origin = |origin| match origin {
        RawOrigin::Column(name) => Origin::Column(name),
        RawOrigin::Sql(sql) => Origin::Sql(sql.sql),
    };
    Part {
        to,
        columns: columns.into_iter().map(|(name, raw)| (name, origin(raw))).collect(),
        missing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Transform, String> {
        let raw: RawTransform = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        raw.check()
    }

    #[test]
    fn a_mapping_as_written() {
        let transform = check(
            "schemas: { sales: crm }
tables:
  kunden:
    to: public.customers
    columns: { full_name: name, cents: { sql: (preis * 100)::bigint } }
    drop: [fax]
    inverse: { fax: 'NULL' }
  sales.orders: { drop: [scratch] }
  public.notes:
    split:
      public.notes: {}
      public.texts: { columns: { text: note }, missing: nulls }",
        )
        .unwrap();
        let kunden = &transform.tables[&Name::new("public", "kunden")];
        assert_eq!(kunden.parts[0].to, Name::new("public", "customers"));
        assert_eq!(kunden.parts[0].columns["full_name"], Origin::Column("name".into()));
        assert_eq!(
            kunden.parts[0].columns["cents"],
            Origin::Sql("(preis * 100)::bigint".into())
        );
        assert_eq!(kunden.inverse["fax"], "NULL");
        // A table of a renamed schema goes along with it.
        let orders = &transform.tables[&Name::new("sales", "orders")];
        assert_eq!(orders.parts[0].to, Name::new("crm", "orders"));
        let missing: Vec<Option<Missing>> = transform.tables[&Name::new("public", "notes")]
            .parts
            .iter()
            .map(|part| part.missing)
            .collect();
        assert_eq!(missing, [None, Some(Missing::Nulls)]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, says) in [
            ("tabels: {}", "tabels"),
            ("tables: { t: { too: u } }", "too"),
            ("tables: { t: { columns: { a: { sgl: x } } } }", "a"),
            ("tables: { .t: {} }", "schema.table"),
            ("tables: { t: { to: 'u.' } }", "schema.table"),
            ("tables: { t: { to: u, split: { a: {}, b: {} } } }", "stands instead of"),
            ("tables: { t: { split: { a: {} } } }", "names one part"),
            ("tables: { t: { split: { a: {}, b: { missing: zeros } } } }", "no_row"),
            ("tables: { t: {}, public.t: {} }", "named twice"),
        ] {
            let error = check(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
