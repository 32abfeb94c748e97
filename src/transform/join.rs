//! One table's rows, put together from several tables by a key: the way back of a split.
//!
//! A row of the one table is a function of the parts' rows of its key, of which each part has one at
//! most. So the one table's rows at a snapshot follow from the parts' rows at that snapshot, and what
//! a transaction did to them from the parts' rows of the keys that it touched, before and after it
//! ([`crate::journal::joined`]).

use super::{Face, Name};
use crate::catalog::Oid;
use crate::catalog::quote::identifier;

/// What the rows of a face's source are put together with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// The key's columns in the source.
    pub key: Vec<String>,
    pub others: Vec<Other>,
    /// Columns by which an expression can name a value without saying of which table: name and type.
    pub named: Vec<(String, String)>,
}

/// Another table of a join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    pub source: Name,
    pub source_oid: Oid,
    /// The key's columns, in the order of [`Join::key`].
    pub key: Vec<String>,
    /// Without a row of it there is none; otherwise its columns are NULL.
    pub required: bool,
}

impl Face {
    /// The tables that its rows come from, the source first.
    pub fn sources(&self) -> Vec<Oid> {
        let others = self.join.iter().flat_map(|join| &join.others);
        std::iter::once(self.source_oid)
            .chain(others.map(|other| other.source_oid))
            .collect()
    }

    /// Whether its rows come from this table.
    pub fn reads(&self, schema: &str, table: &str) -> bool {
        let others = self.join.iter().flat_map(|join| &join.others);
        std::iter::once(&self.source)
            .chain(others.map(|other| &other.source))
            .any(|name| (name.schema.as_str(), name.table.as_str()) == (schema, table))
    }

    /// FROM and WHERE, of the tables as they are.
    pub fn from_tables(&self) -> String {
        let alias = |name: &Name| identifier(&name.table);
        let mut text = format!("FROM ONLY {} AS {}", self.source.quoted(), alias(&self.source));
        for (join, other) in self
            .join
            .iter()
            .flat_map(|join| join.others.iter().map(move |other| (join, other)))
        {
            let how = if other.required { "JOIN" } else { "LEFT JOIN" };
            let on: Vec<String> = join
                .key
                .iter()
                .zip(&other.key)
                .map(|(here, there)| {
                    format!(
                        "{}.{} = {}.{}",
                        alias(&other.source),
                        identifier(there),
                        alias(&self.source),
                        identifier(here)
                    )
                })
                .collect();
            text.push_str(&format!(
                " {how} ONLY {} AS {} ON {}",
                other.source.quoted(),
                alias(&other.source),
                on.join(" AND ")
            ));
        }
        text + &self.condition()
    }

    /// FROM and WHERE, of one image for each source: the function's parameters. OFFSET 0 keeps the
    /// planner from reading an image again for every column.
    pub fn from_images(&self) -> String {
        let others = self.join.iter().flat_map(|join| &join.others);
        let sources = std::iter::once(&self.source).chain(others.map(|other| &other.source));
        let images: Vec<String> = sources
            .enumerate()
            .map(|(index, source)| {
                format!(
                    "(SELECT (o.r).* FROM (SELECT ${}::{} AS r OFFSET 0) AS o) AS {}",
                    index + 1,
                    source.quoted(),
                    identifier(&source.table)
                )
            })
            .collect();
        format!("FROM {}{}", images.join(", "), self.condition())
    }

    /// Which of the function's parameters must be there for a row to be there.
    pub fn required_images(&self) -> Vec<usize> {
        let others = self.join.iter().flat_map(|join| &join.others);
        let required = others.enumerate().filter(|(_, other)| other.required);
        std::iter::once(1).chain(required.map(|(index, _)| index + 2)).collect()
    }

    fn condition(&self) -> String {
        self.only_where
            .as_ref()
            .map_or_else(String::new, |condition| format!(" WHERE {condition}"))
    }
}
