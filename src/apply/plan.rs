//! What a round does, from the changes it read: differences per table, with DDL in between.
//! Pure.
//!
//! Only DDL and TRUNCATE need an order. A transaction's place is its highest position: one that
//! built on another's rows wrote after that one's commit, so highest positions are a valid
//! order of whole transactions. The changes of a transaction that itself contains a barrier are
//! placed one by one, as the barrier stands between them; no other transaction's changes to the
//! tables concerned can be on both sides of it, because of the barrier's locks.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;

use super::difference::{Difference, Image, net};
use crate::catalog::Oid;
use crate::journal::read::{Change, Operation};

/// One step of a round, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<'a> {
    Rows(BTreeMap<Oid, Difference<'a>>),
    Ddl(DdlRecord),
}

/// Changes that can be written in one transaction, and the DDL after them that cannot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Segment<'a> {
    pub changes: Vec<Change<'a>>,
    /// Runs outside a transaction, after what came before is committed.
    pub outside: Option<Change<'a>>,
}

/// A round's changes, ready to be written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan<'a> {
    pub steps: Vec<Step<'a>>,
    pub changes: usize,
    pub transactions: usize,
    /// Every table that a change names.
    pub rels: Vec<Oid>,
    /// Transactions with a DDL record that cannot be read, and why. They have no step.
    pub bad: BTreeMap<u64, String>,
}

impl Plan<'_> {
    /// The DDL inside the round's transactions, in order.
    pub fn ddl(&self) -> impl Iterator<Item = &DdlRecord> {
        self.steps.iter().filter_map(|step| match step {
            Step::Ddl(record) => Some(record),
            Step::Rows(_) => None,
        })
    }
}

/// A DDL statement with what decides its meaning, and what it did to tables.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DdlRecord {
    #[serde(default)]
    pub statement: String,
    pub user: String,
    pub role: String,
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    #[serde(default)]
    pub created: Vec<TableRecord>,
    #[serde(default)]
    pub changed: Vec<TableRecord>,
    /// Of DDL without a text of its own: the objects that it concerned, as rows of
    /// [`crate::catalog::objects::SQL`] after it.
    #[serde(default)]
    pub objects: Option<Vec<[String; 6]>>,
    /// What goes before: a role, where it is not the proxy's own, and a statement.
    #[serde(default)]
    pub first: Vec<(Option<String>, String)>,
    /// The primary's version, where objects are given.
    #[serde(default)]
    pub major: u32,
}

/// A table as the primary had it right after the DDL.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TableRecord {
    pub rel: Oid,
    pub schema: String,
    pub name: String,
    /// JSON, as view `pgtandem.shape` has it.
    pub columns: String,
    pub shape: String,
    pub filenode: Oid,
    pub attributes: String,
    /// Values that existing rows got for new columns without a rewrite.
    #[serde(default)]
    pub computed: Vec<ComputedColumn>,
    /// Its rows follow, after a clear.
    #[serde(default)]
    pub filled: bool,
    /// Columns that got another name.
    #[serde(default)]
    pub renamed: Vec<(String, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ComputedColumn {
    pub column: String,
    /// An array with one element, as text.
    pub value: String,
}

/// A DDL record that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("a DDL record cannot be read: {0}")]
pub struct BadDdlRecord(String);

impl DdlRecord {
    pub fn from_change(change: &Change<'_>) -> Result<Self, BadDdlRecord> {
        let context = change.old.ok_or_else(|| BadDdlRecord("no context".into()))?;
        let statement = change.new.ok_or_else(|| BadDdlRecord("no statement".into()))?;
        let mut record: Self = serde_json::from_slice(context).map_err(|error| BadDdlRecord(error.to_string()))?;
        record.statement = String::from_utf8(statement.to_vec()).map_err(|error| BadDdlRecord(error.to_string()))?;
        Ok(record)
    }
}

/// Whether a DDL statement gives an enum a new label. Such a label may be used only after the
/// transaction that added it: what came later on the primary must come later here.
pub fn adds_label(change: &Change<'_>) -> bool {
    let words = || {
        let text = String::from_utf8_lossy(change.new.unwrap_or_default()).to_ascii_uppercase();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    change.operation == Operation::Ddl && {
        let text = words();
        text.contains("TYPE") && text.contains("ADD VALUE")
    }
}

/// Where changes stand among others: those of a transaction with a barrier one by one, others at
/// their transaction's highest position.
struct Places {
    tops: HashMap<u64, u64>,
    barriers: HashSet<u64>,
}

impl Places {
    fn of(changes: &[Change<'_>]) -> Self {
        let mut places = Self {
            tops: HashMap::new(),
            barriers: HashSet::new(),
        };
        for change in changes {
            let top = places.tops.entry(change.xid).or_default();
            *top = (*top).max(change.position);
            if change.operation.is_barrier() {
                places.barriers.insert(change.xid);
            }
        }
        places
    }

    fn ordered<'a>(&self, changes: &[Change<'a>]) -> Vec<Change<'a>> {
        let mut ordered = changes.to_vec();
        ordered.sort_by_key(|change| {
            let place = if self.barriers.contains(&change.xid) {
                change.position
            } else {
                self.tops[&change.xid]
            };
            (place, change.position)
        });
        ordered
    }
}

/// Cuts a round where DDL must run outside of a transaction: the last segment has none after it.
/// The changes come in any order.
pub fn segments<'a>(changes: &[Change<'a>]) -> Vec<Segment<'a>> {
    if !changes.iter().any(|change| change.operation == Operation::DdlOutside) {
        return vec![Segment {
            changes: changes.to_vec(),
            outside: None,
        }];
    }
    let mut segments = vec![Segment::default()];
    for change in Places::of(changes).ordered(changes) {
        let Some(last) = segments.last_mut() else { break };
        if change.operation == Operation::DdlOutside {
            last.outside = Some(change);
            segments.push(Segment::default());
        } else {
            last.changes.push(change);
        }
    }
    segments
}

/// Plans what goes into one transaction; DDL outside of transactions is no part of it. The
/// changes come in any order.
pub fn plan<'a>(changes: &[Change<'a>]) -> Plan<'a> {
    let places = Places::of(changes);
    let rels: HashSet<Oid> = changes
        .iter()
        .map(|change| change.rel)
        .filter(|&rel| rel != 0)
        .collect();
    let mut rels: Vec<Oid> = rels.into_iter().collect();
    rels.sort_unstable();
    let mut plan = Plan {
        steps: Vec::new(),
        changes: changes.len(),
        transactions: places.tops.len(),
        rels,
        bad: BTreeMap::new(),
    };
    let mut stretch = Stretch::default();
    if places.barriers.is_empty() {
        changes.iter().for_each(|change| stretch.add(change));
        plan.steps.extend(stretch.finish());
        return plan;
    }
    for change in &places.ordered(changes) {
        match change.operation {
            Operation::Row | Operation::Truncate => stretch.add(change),
            Operation::Ddl => match DdlRecord::from_change(change) {
                Ok(record) => {
                    plan.steps.extend(std::mem::take(&mut stretch).finish());
                    plan.steps.push(Step::Ddl(record));
                }
                Err(error) => {
                    plan.bad.insert(change.xid, error.to_string());
                }
            },
            Operation::DdlOutside => {}
        }
    }
    plan.steps.extend(stretch.finish());
    plan
}

/// The changes of a table between two barriers.
#[derive(Default)]
struct Stretch<'a> {
    tables: BTreeMap<Oid, TableChanges<'a>>,
}

#[derive(Default)]
struct TableChanges<'a> {
    cleared: bool,
    images: Vec<(Option<Image<'a>>, Option<Image<'a>>)>,
}

impl<'a> Stretch<'a> {
    fn add(&mut self, change: &Change<'a>) {
        let table = self.tables.entry(change.rel).or_default();
        if change.operation == Operation::Truncate {
            // What the table's earlier changes did is void.
            table.cleared = true;
            table.images.clear();
        } else {
            table.images.push((change.old, change.new));
        }
    }

    fn finish(self) -> Option<Step<'a>> {
        let mut differences = BTreeMap::new();
        for (rel, table) in self.tables {
            let mut difference = net(table.images);
            difference.cleared = table.cleared;
            if !difference.is_empty() {
                differences.insert(rel, difference);
            }
        }
        (!differences.is_empty()).then_some(Step::Rows(differences))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `(position, xid, rel, kind, old, new)`
    type Short = (u64, u64, Oid, char, &'static str, &'static str);

    fn changes(short: &[Short]) -> Vec<Change<'static>> {
        let image = |text: &'static str| (!text.is_empty()).then_some(text.as_bytes());
        short
            .iter()
            .map(|&(position, xid, rel, kind, old, new)| Change {
                position,
                xid,
                rel,
                operation: match kind {
                    'T' => Operation::Truncate,
                    'S' => Operation::Ddl,
                    'O' => Operation::DdlOutside,
                    _ => Operation::Row,
                },
                old: image(old),
                new: image(new),
            })
            .collect()
    }

    /// The plan as text: `7:-a+b` is table 7 losing a and gaining b, `7:!` cleared.
    fn check(short: &[Short], expected: &str) {
        let changes = changes(short);
        let mut text: Vec<String> = Vec::new();
        for segment in segments(&changes) {
            let plan = plan(&segment.changes);
            text.extend(plan.steps.iter().map(|step| {
                match step {
                    Step::Rows(tables) => tables
                        .iter()
                        .map(|(rel, difference)| {
                            let mut text = format!("{rel}:{}", if difference.cleared { "!" } else { "" });
                            for old in &difference.gone {
                                text.push_str(&format!("-{}", String::from_utf8_lossy(old)));
                            }
                            for new in &difference.come {
                                text.push_str(&format!("+{}", String::from_utf8_lossy(new)));
                            }
                            text
                        })
                        .collect::<Vec<_>>()
                        .join(" "),
                    Step::Ddl(record) => format!("ddl({})", record.statement),
                }
            }));
            text.extend(segment.outside.map(|change| {
                let record = DdlRecord::from_change(&change).unwrap();
                format!("outside({}@{})", record.statement, change.position)
            }));
        }
        assert_eq!(text.join(" | "), expected);
    }

    const CONTEXT: &str = r#"{"user":"u","role":"r"}"#;

    #[test]
    fn without_barriers_one_difference_a_table() {
        check(&[], "");
        check(
            &[
                (5, 1, 7, 'I', "", "a"),
                (6, 2, 8, 'I', "", "x"),
                (9, 2, 7, 'U', "a", "b"),
            ],
            "7:+b 8:+x",
        );
        check(&[(5, 1, 7, 'I', "", "a"), (6, 2, 7, 'D', "a", "")], "");
    }

    #[test]
    fn truncate_voids_what_came_before() {
        check(
            &[
                (1, 1, 7, 'U', "a", "b"),
                (2, 2, 7, 'T', "", ""),
                (3, 3, 7, 'I', "", "c"),
                (4, 3, 8, 'I', "", "d"),
            ],
            "7:!+c 8:+d",
        );
        // In one transaction, by position; the journal's order does not matter.
        check(
            &[(3, 1, 7, 'I', "", "c"), (1, 1, 7, 'I', "", "b"), (2, 1, 7, 'T', "", "")],
            "7:!+c",
        );
    }

    #[test]
    fn ddl_stands_between() {
        check(
            &[
                (1, 1, 7, 'I', "", "a"),
                (2, 2, 0, 'S', CONTEXT, "alter"),
                (3, 3, 7, 'U', "a", "b"),
            ],
            "7:+a | ddl(alter) | 7:-a+b",
        );
        check(&[(2, 2, 0, 'O', CONTEXT, "index")], "outside(index@2)");
        check(
            &[
                (1, 1, 7, 'I', "", "a"),
                (2, 2, 0, 'O', CONTEXT, "index"),
                (3, 3, 7, 'U', "a", "b"),
            ],
            "7:+a | outside(index@2) | 7:-a+b",
        );
    }

    #[test]
    fn other_transactions_stay_whole_around_a_barrier() {
        // Transaction 3 has changes before and after the DDL: its place is its last.
        check(
            &[
                (1, 3, 8, 'U', "b", "c"),
                (2, 2, 0, 'S', CONTEXT, "alter"),
                (3, 3, 8, 'U', "a", "b"),
            ],
            "ddl(alter) | 8:-a+c",
        );
        // The DDL's own transaction is taken apart.
        check(
            &[
                (1, 2, 7, 'I', "", "a"),
                (2, 2, 0, 'S', CONTEXT, "alter"),
                (3, 2, 7, 'I', "", "b"),
            ],
            "7:+a | ddl(alter) | 7:+b",
        );
    }

    #[test]
    fn labels_that_are_added() {
        for (statement, adds) in [
            ("alter type mood add value 'x'", true),
            ("ALTER TYPE s.mood\n ADD  VALUE IF NOT EXISTS 'x' BEFORE 'y'", true),
            ("alter type mood rename value 'x' to 'y'", false),
            ("alter table t add value int", false),
        ] {
            let changes = changes(&[(2, 2, 0, 'S', CONTEXT, statement)]);
            assert_eq!(adds_label(&changes[0]), adds, "{statement}");
        }
    }

    #[test]
    fn a_broken_record_is_said_and_the_rest_planned() {
        for context in ["{}", ""] {
            let changes = changes(&[(1, 1, 7, 'I', "", "a"), (2, 2, 0, 'S', context, "alter")]);
            let plan = plan(&changes);
            assert_eq!(plan.bad.keys().collect::<Vec<_>>(), [&2]);
            assert_eq!(plan.steps.len(), 1);
        }
    }
}
