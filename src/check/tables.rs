//! Findings about tables and sequences, and for every table whether it is captured and applied
//! exactly.

use std::collections::BTreeMap;

use serde::Serialize;

use super::facts::{ColumnFacts, Facts, SequenceFacts, SideFacts, TableFacts};
use super::finding::Finding;
use crate::catalog::quote::{identifier, qualified};

/// What becomes of one of the primary's tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableVerdict {
    /// `schema.table`
    pub name: String,
    /// Every committed change of it reaches the secondary, exactly.
    pub exact: bool,
    /// Why not; or, where it is, what to know of it.
    pub why: Vec<String>,
}

/// Sequences with less than this share of their values left.
const NEARLY_OUT: f64 = 0.1;

pub(super) fn verdicts(facts: &Facts) -> Vec<TableVerdict> {
    let there: BTreeMap<String, &TableFacts> = facts
        .secondary()
        .tables
        .iter()
        .map(|table| (table.qualified(), table))
        .collect();
    let tables = facts.primary().tables.iter().filter(|table| table.extension.is_none());
    tables
        .map(|table| verdict(table, there.get(&table.qualified()).copied(), facts))
        .collect()
}

fn verdict(here: &TableFacts, there: Option<&TableFacts>, facts: &Facts) -> TableVerdict {
    let secondary = facts.primary.other();
    let mut not = Vec::new();
    let mut notes = Vec::new();
    match here.kind.as_str() {
        "f" => not.push("a foreign table's rows are elsewhere and are not mirrored".to_owned()),
        "p" => notes.push("its partitions are mirrored, one by one".to_owned()),
        _ => {}
    }
    if !here.owned {
        not.push(format!(
            "the proxy's role does not act for its owner {} on {}",
            here.owner, facts.primary
        ));
    }
    match there {
        _ if facts.is_transformed(here) => not.extend(transformed(facts, here, &mut notes)),
        None => not.push(format!("{secondary} does not have it")),
        Some(there) => {
            if !there.owned {
                not.push(format!(
                    "the proxy's role does not act for its owner {} on {secondary}",
                    there.owner
                ));
            }
            not.extend(columns_differ(&here.columns, &there.columns));
            if there.kind != here.kind && here.kind != "f" {
                not.push(format!("it is another kind of table on {secondary}"));
            }
            if here.key.is_some() && there.key.is_none() && here.kind == "r" {
                notes.push(format!(
                    "{secondary} has no key for it: each change searches the whole table"
                ));
            }
        }
    }
    if here.kind == "r" && here.key.is_none() {
        notes.push(
            "no key: rows are found by all of their values, and it is copied and compared in one piece".to_owned(),
        );
    }
    if here.row_security && here.forced && !facts.primary().role.bypasses_row_security {
        notes.push("row security is forced on its owner: existing rows cannot be copied without BYPASSRLS".to_owned());
    }
    if here.persistence == "u" {
        notes.push("unlogged: after a crash of either server its rows are sent once more".to_owned());
    }
    let exact = not.is_empty();
    TableVerdict {
        name: here.qualified(),
        exact,
        why: if exact { notes } else { not },
    }
}

/// What becomes of a transformed table: why it is not mirrored, or else a note.
fn transformed(facts: &Facts, here: &TableFacts, notes: &mut Vec<String>) -> Option<String> {
    let faces = facts.mapping.faces(facts.primary).iter();
    let faces = faces.filter(|face| face.reads(&here.schema, &here.name));
    let targets: Vec<String> = faces.map(|face| face.target.to_string()).collect();
    if targets.is_empty() {
        return Some("its transform cannot be used".into());
    }
    notes.push(format!("mirrored as {}", targets.join(" and ")));
    None
}

/// In words, where they do; the order does not count.
fn columns_differ(here: &[ColumnFacts], there: &[ColumnFacts]) -> Option<String> {
    let mut words = Vec::new();
    for column in here {
        match there.iter().find(|other| other.name == column.name) {
            None => words.push(format!("{} is missing", column.name)),
            Some(other) if other.type_name != column.type_name => {
                words.push(format!(
                    "{} is {} instead of {}",
                    column.name, other.type_name, column.type_name
                ));
            }
            Some(other) if other.generated != column.generated => {
                words.push(format!("{} is generated on one side only, or otherwise", column.name));
            }
            Some(_) => {}
        }
    }
    let extra = there
        .iter()
        .filter(|column| !here.iter().any(|mine| mine.name == column.name));
    words.extend(extra.map(|column| format!("{} is too much", column.name)));
    (!words.is_empty()).then(|| format!("the two sides' columns differ ({})", words.join(", ")))
}

pub(super) fn findings(facts: &Facts, verdicts: &[TableVerdict]) -> Vec<Finding> {
    let mut found = missing(facts);
    found.extend(columns(facts));
    let primary = facts.primary();
    for table in primary.tables.iter().filter(|table| table.extension.is_none()) {
        found.extend(of_table(facts, table));
    }
    found.extend(foreign(primary, facts));
    for sequence in &primary.sequences {
        found.extend(of_sequence(facts, sequence));
    }
    if primary.large_objects > 0 {
        found.push(
            Finding::warns(
                "large_objects",
                format!(
                    "{} has {} large objects, which are not mirrored",
                    facts.primary, primary.large_objects
                ),
            )
            .on(facts.primary)
            .advice("move them into bytea columns, or copy them by hand while nobody writes"),
        );
    }
    for name in &primary.event_triggers {
        found.push(
            Finding::warns(
                "event_trigger",
                format!("{} has the event trigger {name}, which is not copied", facts.primary),
            )
            .on(facts.primary)
            .about(name)
            .advice("create it on the other side when it has become primary"),
        );
    }
    let exact = verdicts.iter().filter(|verdict| verdict.exact).count();
    found.push(Finding::fine(
        "tables",
        format!("{exact} of {} tables are captured and applied exactly", verdicts.len()),
    ));
    found
}

/// Tables that the secondary does not have; one finding where it has none at all.
fn missing(facts: &Facts) -> Vec<Finding> {
    let side = facts.primary.other();
    let has = |table: &TableFacts| {
        let secondary = &facts.secondary().tables;
        secondary
            .iter()
            .any(|there| there.schema == table.schema && there.name == table.name)
    };
    let tables: Vec<&TableFacts> = facts
        .primary()
        .tables
        .iter()
        .filter(|table| table.extension.is_none() && table.kind != "f" && !facts.is_transformed(table))
        .collect();
    let missing: Vec<&&TableFacts> = tables.iter().filter(|table| !has(table)).collect();
    if !missing.is_empty() && missing.len() == tables.len() {
        return vec![
            Finding::blocks(
                "schema.missing",
                format!("{side} has none of the {} tables", tables.len()),
            )
            .on(side)
            .advice("`pgtandem schema copy` brings them"),
        ];
    }
    let find = |table: &&&TableFacts| {
        Finding::blocks("table.missing", format!("{side} does not have it"))
            .on(side)
            .about(table.qualified())
            .advice("`pgtandem schema diff --sql` prints the statements")
    };
    missing.iter().map(find).collect()
}

fn columns(facts: &Facts) -> Vec<Finding> {
    let side = facts.primary.other();
    let mut found = Vec::new();
    for table in facts
        .primary()
        .tables
        .iter()
        .filter(|table| !facts.is_transformed(table))
    {
        let mut there = facts.secondary().tables.iter();
        let there = there.find(|there| there.schema == table.schema && there.name == table.name);
        if let Some(why) = there.and_then(|there| columns_differ(&table.columns, &there.columns)) {
            found.push(
                Finding::blocks("table.columns", why)
                    .on(side)
                    .about(table.qualified())
                    .advice("`pgtandem schema diff --sql` prints the statements"),
            );
        }
    }
    found
}

fn of_table(facts: &Facts, table: &TableFacts) -> Vec<Finding> {
    let side = facts.primary;
    let role = &facts.primary().role;
    let name = table.qualified();
    let target = qualified(&table.schema, &table.name);
    let mut found = Vec::new();
    let mut find = |finding: Finding| found.push(finding.on(side).about(&name));
    if table.kind == "r" && table.key.is_none() {
        find(
            Finding::warns(
                "table.key",
                "it has no primary key and no unique index over NOT NULL columns",
            )
            .advice("it is mirrored exactly, by whole rows: slow where it is large; give it a primary key if you can"),
        );
    }
    if table.persistence == "u" {
        find(
            Finding::warns(
                "table.unlogged",
                "it is unlogged: a crash of either server empties it, and its rows are sent once more",
            )
            .advice("make it logged, if its rows matter")
            .sql(format!("ALTER TABLE {target} SET LOGGED")),
        );
    }
    if table.row_security && table.forced && !role.bypasses_row_security {
        find(
            Finding::blocks(
                "table.row_security",
                format!(
                    "row security is forced on its owner, and {} does not bypass it",
                    role.name
                ),
            )
            .advice("rows that the proxy's role cannot see cannot be copied or compared")
            .sql(format!("ALTER ROLE {} BYPASSRLS", identifier(&role.name))),
        );
    } else if table.row_security && !table.owned {
        find(
            Finding::warns("table.row_security", "row security hides rows from the proxy's role")
                .advice("let it act for the owner"),
        );
    }
    for (trigger, _) in table
        .triggers
        .iter()
        .filter(|(_, enabled)| matches!(enabled.as_str(), "A" | "R"))
    {
        find(
            Finding::warns(
                "table.trigger",
                format!("its trigger {trigger} fires even for replicas (ENABLE ALWAYS or REPLICA)"),
            )
            .advice("it is silenced while changes are applied on the secondary; see that it has no other work there"),
        );
    }
    for (rule, _) in table
        .rules
        .iter()
        .filter(|(_, enabled)| matches!(enabled.as_str(), "A" | "R"))
    {
        find(
            Finding::warns(
                "table.rule",
                format!("its rule {rule} acts even for replicas (ENABLE ALWAYS or REPLICA)"),
            )
            .advice("it is silenced while changes are applied on the secondary; see that it has no other work there"),
        );
    }
    found
}

fn foreign(primary: &SideFacts, facts: &Facts) -> Vec<Finding> {
    let foreign = primary
        .tables
        .iter()
        .filter(|table| table.kind == "f" && table.extension.is_none());
    foreign
        .map(|table| {
            Finding::warns(
                "table.foreign",
                "a foreign table's rows are elsewhere: they are not mirrored",
            )
            .on(facts.primary)
            .about(table.qualified())
            .advice("see that the other side can reach the foreign server, too")
        })
        .collect()
}

fn of_sequence(facts: &Facts, sequence: &SequenceFacts) -> Option<Finding> {
    let side = facts.primary;
    if sequence.cycles {
        return Some(
            Finding::warns("sequence.cycles", "it cycles: after its end it begins anew")
                .on(side)
                .about(&sequence.name)
                .advice("at a flip it is brought to where the primary's is; values may be given again, as before"),
        );
    }
    let left = left(sequence)?;
    let whose = match &sequence.owned_by {
        Some(column) => format!(" (of {column})"),
        None => String::new(),
    };
    (left < NEARLY_OUT).then(|| {
        Finding::warns(
            "sequence.end",
            format!("{:.1} % of its values are left{whose}", left * 100.0),
        )
        .on(side)
        .about(&sequence.name)
        .advice("widen it (and its column), on both sides, before it ends")
    })
}

/// The share of its values that a sequence has not given out.
fn left(sequence: &SequenceFacts) -> Option<f64> {
    let (last, min, max) = (sequence.last? as f64, sequence.min as f64, sequence.max as f64);
    let span = (max - min).max(1.0);
    Some(if sequence.increment > 0 { max - last } else { last - min } / span)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, type_name: &str) -> ColumnFacts {
        ColumnFacts {
            name: name.into(),
            type_name: type_name.into(),
            ..ColumnFacts::default()
        }
    }

    #[test]
    fn columns_go_by_name() {
        let (a, b) = (column("a", "integer"), column("b", "text"));
        let stored = ColumnFacts {
            generated: "s".into(),
            ..b.clone()
        };
        for (here, there, says) in [
            (vec![a.clone(), b.clone()], vec![b.clone(), a.clone()], None),
            (vec![a.clone(), b.clone()], vec![a.clone()], Some("b is missing")),
            (vec![a.clone()], vec![a.clone(), b.clone()], Some("b is too much")),
            (
                vec![a.clone()],
                vec![column("a", "bigint")],
                Some("a is bigint instead of integer"),
            ),
            (vec![b.clone()], vec![stored], Some("b is generated on one side only")),
        ] {
            let found = columns_differ(&here, &there);
            match says {
                None => assert_eq!(found, None),
                Some(says) => assert!(found.as_ref().is_some_and(|found| found.contains(says)), "{found:?}"),
            }
        }
    }

    #[test]
    fn how_much_of_a_sequence_is_left() {
        let sequence = |last, increment| SequenceFacts {
            last,
            min: 1,
            max: 101,
            increment,
            ..SequenceFacts::default()
        };
        for (sequence, expected) in [
            (sequence(None, 1), None),
            (sequence(Some(91), 1), Some(0.1)),
            (sequence(Some(91), -1), Some(0.9)),
        ] {
            assert_eq!(left(&sequence), expected);
        }
    }
}
