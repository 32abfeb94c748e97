//! A table split by columns: which rows a part has, and how the parts become one row again.

use std::collections::BTreeSet;

use super::{Column, Face, Fault, Planner, TableFacts, fits};
use crate::catalog::quote::identifier;
use crate::control::Side;
use crate::transform::join::{Join, Other};
use crate::transform::{Missing, Part, TableMap};

/// One of new's tables that a table of legacy goes to.
pub(super) struct Half<'a> {
    pub face: Face,
    pub there: &'a TableFacts,
    pub part: &'a Part,
}

impl Half<'_> {
    /// The part's column that holds legacy's, unchanged but for its type.
    fn of(&self, legacy: &str) -> Option<&Column> {
        let (to, _, _) = self.face.same.iter().find(|(_, from, _)| from == legacy)?;
        self.there.column(to)
    }

    /// The part's columns that hold these of legacy, where they are a key of the part and nothing more.
    fn key(&self, legacy: &[String]) -> Option<Vec<&Column>> {
        let columns: Vec<&Column> = legacy.iter().map(|name| self.of(name)).collect::<Option<_>>()?;
        let names: BTreeSet<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        let is_key = |key: &&Vec<String>| key.iter().map(String::as_str).collect::<BTreeSet<_>>() == names;
        self.there.keys.iter().find(is_key)?;
        Some(columns)
    }
}

impl Planner<'_> {
    /// Where a missing part stands for NULLs, NULLs stand for a missing part.
    pub(super) fn optional_parts(&mut self, here: &TableFacts, parts: &mut [Half<'_>]) {
        let optional = parts
            .iter_mut()
            .filter(|half| half.part.missing == Some(Missing::Nulls));
        for half in optional {
            let of_key = |name: &String| here.keys.iter().any(|key| key.contains(name));
            let values: Vec<String> = half
                .face
                .same
                .iter()
                .filter(|(_, from, _)| !of_key(from))
                .map(|(_, from, _)| format!("{}.{}", identifier(&here.name.table), identifier(from)))
                .collect();
            if values.is_empty() {
                self.fault(
                    Side::New,
                    &half.there.name,
                    "missing: nulls, and it has no column of its own that comes from legacy as it is",
                    "write missing: no_row, or carry a column over under columns",
                );
                continue;
            }
            half.face.only_where = Some(format!("num_nonnulls({}) > 0", values.join(", ")));
        }
    }

    /// Legacy's row out of the parts' rows of one key.
    pub(super) fn way_back_of_split(
        &self,
        legacy: &TableFacts,
        parts: &[Half<'_>],
        map: &TableMap,
    ) -> Result<Face, Fault> {
        let blocked = |side, subject: String, fact: &str, advice: &str| Fault {
            side,
            subject,
            fact: fact.to_owned(),
            advice: advice.to_owned(),
        };
        let anchor =
            anchor(parts).map_err(|(fact, advice)| blocked(Side::New, legacy.name.to_string(), fact, advice))?;
        for (index, half) in parts.iter().enumerate() {
            if half.there.unlogged {
                return Err(blocked(
                    Side::New,
                    half.there.name.to_string(),
                    "it is unlogged, and a part of a split",
                    "ALTER TABLE ... SET LOGGED",
                ));
            }
            if parts[..index]
                .iter()
                .any(|other| other.there.name.table == half.there.name.table)
            {
                return Err(blocked(
                    Side::New,
                    half.there.name.to_string(),
                    "two parts of a split have the same name, in two schemas",
                    "give them different names",
                ));
            }
        }
        let Some((key, columns)) = key_of_all(legacy, parts) else {
            return Err(blocked(
                Side::New,
                legacy.name.to_string(),
                "it is split on new, and its parts have no key in common",
                "let every part have the columns of one key of legacy, in the same types, as its primary key or under a unique constraint of these columns alone",
            ));
        };
        let mut face = Face::between(parts[anchor].there, legacy);
        for column in &legacy.columns {
            let subject = format!("{}.{}", legacy.name, column.name);
            if !column.generated.is_empty() {
                return Err(blocked(
                    Side::Legacy,
                    subject,
                    "a generated column has no way back",
                    "compute it otherwise",
                ));
            }
            if let Some(sql) = map.inverse.get(&column.name) {
                face.compute(self.new, sql, column);
                continue;
            }
            let holders: Vec<usize> = if key.contains(&column.name) {
                vec![anchor]
            } else {
                (0..parts.len())
                    .filter(|&at| parts[at].of(&column.name).is_some())
                    .collect()
            };
            let (holder, source) = match holders[..] {
                [holder] => match parts[holder].of(&column.name) {
                    Some(source) => (holder, source),
                    None => continue,
                },
                [] => {
                    return Err(blocked(
                        Side::Legacy,
                        subject,
                        "it has no inverse",
                        &format!(
                            "name under inverse an expression over the rows of the parts that gives {}",
                            column.name
                        ),
                    ));
                }
                _ => {
                    return Err(blocked(
                        Side::Legacy,
                        subject,
                        "several parts have it, which may come to differ on new",
                        "write it as an expression (sql) in all parts but the one that it comes back from",
                    ));
                }
            };
            let half = &parts[holder];
            if holder != anchor && half.part.missing == Some(Missing::Nulls) && column.not_null {
                return Err(blocked(
                    Side::Legacy,
                    subject,
                    &format!("it is NOT NULL, and NULL where {} has no row", half.there.name),
                    "write missing: no_row, or drop the constraint",
                ));
            }
            if !fits(source, column) {
                return Err(blocked(
                    Side::Legacy,
                    subject,
                    &format!(
                        "{} does not become {} again without loss",
                        source.type_name, column.type_name
                    ),
                    &format!(
                        "name under inverse an expression over the rows of the parts that gives {}",
                        column.name
                    ),
                ));
            }
            face.same(half.there, self.new, source, column);
            if holder != anchor {
                // Names of one table: the anchor's.
                face.same.pop();
            }
        }
        face.exact = face.exact && parts.iter().all(|half| half.face.exact);
        let others = (0..parts.len()).filter(|&at| at != anchor).map(|at| Other {
            source: parts[at].there.name.clone(),
            source_oid: parts[at].there.oid,
            key: columns[at].clone(),
            required: parts[at].part.missing != Some(Missing::Nulls),
        });
        face.join = Some(Join {
            key: columns[anchor].clone(),
            others: others.collect(),
            named: named(parts),
        });
        Ok(face)
    }
}

/// The part without whose row there is none.
fn anchor(parts: &[Half<'_>]) -> Result<usize, (&'static str, &'static str)> {
    const ADVICE: &str = "write missing: nulls or missing: no_row under every part but one";
    let unsaid: Vec<usize> = (0..parts.len())
        .filter(|&at| parts[at].part.missing.is_none())
        .collect();
    match unsaid[..] {
        [only] => Ok(only),
        [] => parts
            .iter()
            .position(|half| half.part.missing == Some(Missing::NoRow))
            .ok_or(("it is split on new, and every part may be missing", ADVICE)),
        _ => Err((
            "it is split on new, and nothing says what legacy has of a row that only one part has",
            ADVICE,
        )),
    }
}

/// A key of legacy that every part has, in the same types, and its columns in each.
fn key_of_all<'a>(legacy: &'a TableFacts, parts: &[Half<'_>]) -> Option<(&'a [String], Vec<Vec<String>>)> {
    legacy.keys.iter().find_map(|key| {
        let of_parts: Vec<Vec<&Column>> = parts.iter().map(|half| half.key(key)).collect::<Option<_>>()?;
        let types = |columns: &[&Column]| {
            columns
                .iter()
                .map(|column| column.type_name.clone())
                .collect::<Vec<_>>()
        };
        let alike = of_parts.iter().all(|columns| types(columns) == types(&of_parts[0]));
        let names = |columns: Vec<&Column>| columns.into_iter().map(|column| column.name.clone()).collect();
        alike.then(|| (key.as_slice(), of_parts.into_iter().map(names).collect()))
    })
}

/// Columns whose name only one part has.
fn named(parts: &[Half<'_>]) -> Vec<(String, String)> {
    let all = || parts.iter().flat_map(|half| &half.there.columns);
    all()
        .filter(|column| all().filter(|other| other.name == column.name).count() == 1)
        .map(|column| (column.name.clone(), column.type_name.clone()))
        .collect()
}
