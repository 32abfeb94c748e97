//! Whether two databases define the same objects: everything that makes up a schema, as the
//! catalogs describe it, outside of schema `pgtandem` and of what extensions brought along.
//!
//! Objects go by name, never by OID. What only the server's version makes different is left
//! out where the versions differ: how it qualifies names when it prints a query (from 16 on it
//! leaves needless qualifications out), the privilege MAINTAIN (from 17 on), an extension's
//! version. Cluster-wide objects (roles, tablespaces) are not part of a database.

use std::collections::BTreeMap;

use serde::Serialize;
use tokio_postgres::Client;

use super::PINNED_SETTINGS;

/// One object that is not defined alike on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DefinitionDifference {
    /// `table`, `column`, `index`, `comment`, …
    pub kind: String,
    /// With its schema and, where it has one, its table.
    pub name: String,
    /// How each side defines it; `None`: it does not have it.
    pub first: Option<String>,
    pub second: Option<String>,
}

impl DefinitionDifference {
    /// A column that stands elsewhere in its table, and differs in nothing else: rows are mirrored
    /// by name, and no statement can move it.
    pub fn is_about_order(&self) -> bool {
        let rest = |side: &Option<String>| {
            let (_, rest) = side.as_ref()?.split_once(' ')?;
            Some(rest.to_owned())
        };
        self.kind == "column" && self.first.is_some() && rest(&self.first) == rest(&self.second)
    }
}

impl std::fmt::Display for DefinitionDifference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let side = |text: &Option<String>| text.clone().unwrap_or_else(|| "absent".to_owned());
        write!(
            f,
            "{} {}:\n  first:  {}\n  second: {}",
            self.kind,
            self.name,
            side(&self.first),
            side(&self.second)
        )
    }
}

/// Compares all definitions. Empty: the same. Changes the search path and how values are
/// written in both sessions.
pub async fn definitions_different(
    first: &Client,
    second: &Client,
) -> Result<Vec<DefinitionDifference>, tokio_postgres::Error> {
    let mine = read(first).await?;
    let mut yours = read(second).await?;
    let alike = mine.major == yours.major;
    let mut differences = Vec::new();
    for ((kind, name), here) in mine.objects {
        let there = yours.objects.remove(&(kind.clone(), name.clone()));
        let same = there
            .as_ref()
            .is_some_and(|there| *there == here || (!alike && neutral(&kind, there) == neutral(&kind, &here)));
        if !same {
            differences.push(DefinitionDifference {
                kind,
                name,
                first: Some(here),
                second: there,
            });
        }
    }
    differences.extend(
        yours
            .objects
            .into_iter()
            .map(|((kind, name), there)| DefinitionDifference {
                kind,
                name,
                first: None,
                second: Some(there),
            }),
    );
    differences.sort_by(|one, other| (&one.kind, &one.name).cmp(&(&other.kind, &other.name)));
    Ok(differences)
}

struct Definitions {
    major: i32,
    objects: BTreeMap<(String, String), String>,
}

async fn read(client: &Client) -> Result<Definitions, tokio_postgres::Error> {
    client.batch_execute(PINNED_SETTINGS).await?;
    let version: i32 = client
        .query_one("SELECT current_setting('server_version_num')::int", &[])
        .await?
        .get(0);
    let mut objects = BTreeMap::new();
    for row in client.query(SQL, &[]).await? {
        let (kind, name): (String, String) = (row.get(0), row.get(1));
        let definition = row.get::<_, Option<String>>(2).unwrap_or_default();
        // Two of one name (a comment on each of two casts between the same types) count both.
        objects
            .entry((kind, name))
            .and_modify(|text: &mut String| {
                text.push_str(" | ");
                text.push_str(&definition);
            })
            .or_insert(definition);
    }
    Ok(Definitions {
        major: version / 10_000,
        objects,
    })
}

/// A definition without what only the server's version decides.
fn neutral(kind: &str, definition: &str) -> String {
    match kind {
        "extension" => definition
            .split_whitespace()
            .filter(|word| !word.starts_with("version="))
            .collect(),
        "grant" | "default privilege" => definition
            .split(' ')
            .filter(|word| !word.contains("=MAINTAIN"))
            .collect(),
        "query" | "rule" | "function" => unqualified(definition),
        _ => definition.to_owned(),
    }
}

/// The text without qualifications of names and without layout: `t.a` becomes `a`.
pub(crate) fn unqualified(text: &str) -> String {
    let spaced = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut kept = String::with_capacity(spaced.len());
    for character in spaced.chars() {
        if character == '.'
            && let Some(start) = name_before(&kept)
        {
            kept.truncate(start);
        } else {
            kept.push(character);
        }
    }
    kept
}

/// Where the name begins that the text ends with, quoted or not.
fn name_before(text: &str) -> Option<usize> {
    if let Some(inner) = text.strip_suffix('"') {
        return inner.rfind('"');
    }
    let is_part = |c: char| c == '_' || c == '$' || c.is_alphanumeric();
    let start = text.rfind(|c| !is_part(c)).map_or(0, |at| at + 1);
    let first = text[start..].chars().next()?;
    (!first.is_ascii_digit()).then_some(start)
}

/// Kind, name and definition of every object.
const SQL: &str = include_str!("definitions.sql");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualifications_and_layout_do_not_count() {
        for (one, other, same) in [
            (
                " SELECT t.id,\n    t.v\n   FROM s.t;",
                " SELECT id,\n    v\n   FROM s.t;",
                true,
            ),
            ("SELECT \"T x\".id FROM \"T x\"", "SELECT id FROM \"T x\"", true),
            ("SELECT 1.5 FROM t", "SELECT 1.6 FROM t", false),
            ("SELECT t.a FROM t", "SELECT t.b FROM t", false),
        ] {
            assert_eq!(unqualified(one) == unqualified(other), same, "{one} / {other}");
        }
    }

    #[test]
    fn maintain_counts_only_between_equal_versions() {
        assert_eq!(
            neutral("grant", "app=SELECT/app app=MAINTAIN/app"),
            neutral("grant", "app=SELECT/app")
        );
        assert_ne!(neutral("grant", "app=SELECT/app"), neutral("grant", "app=INSERT/app"));
    }
}
