//! What two answers say about two databases. Pure.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::alike::{Cell, alike, is_collated, only_precision};
use super::answer::{Answer, key_places};
use super::catalog::Catalog;
use super::digest::{Column, Digest};
use super::rows::{PAIRED_ROWS_MAX, left_open, pair, settle, surplus};
use super::rules::{ColumnPlan, ReadRules};
use crate::config::How;
use crate::sql::{NotComparable, ReadFacts};

/// Whether the secondary's answer is the primary's, as far as the digests tell.
pub(super) fn same(facts: &ReadFacts, notices: bool, primary: &Digest, secondary: &Digest) -> bool {
    if primary.sqlstate.is_some() || secondary.sqlstate.is_some() {
        return primary.sqlstate == secondary.sqlstate;
    }
    let columns = match (primary.columns, secondary.columns) {
        (Some(primary), Some(secondary)) => primary == secondary,
        // A client that described its statement long ago got no RowDescription now.
        _ => true,
    };
    columns
        && primary.rows == secondary.rows
        && same_tag(primary, secondary)
        && (!notices || primary.notices == secondary.notices)
        && if facts.ordered {
            primary.ordered == secondary.ordered
        } else {
            primary.multiset == secondary.multiset
        }
}

fn same_tag(one: &Digest, other: &Digest) -> bool {
    let whole = |digest: &Digest| digest.tag.filter(|_| !digest.in_parts);
    whole(one).zip(whole(other)).is_none_or(|(one, other)| one == other)
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Equal,
    /// Equal but for the order of rows whose ORDER BY keys are equal (or not known).
    OrderTies,
    /// Equal by a rule, not to the letter.
    Tolerated,
    /// They differ only where the statement leaves the answer open, or where an ignore is in force.
    Open(NotComparable),
    /// A rule would have to be applied to more rows than are kept.
    TooMany,
    Different(Difference),
}

/// How two answers differ.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Difference {
    pub(super) kind: Kind,
    /// The first rows that the other answer does not have (for [`Kind::Order`]: the rows at the
    /// first place that differs).
    pub(super) primary: Vec<Vec<u8>>,
    pub(super) secondary: Vec<Vec<u8>>,
    /// Output columns whose values differ in rows that are the same by their keys, in the order
    /// of the answer.
    pub(super) columns: Vec<String>,
}

/// The kinds of mismatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One side failed, or both with different SQLSTATEs.
    Error,
    /// The number of columns.
    Columns,
    /// A column's name.
    ColumnName,
    /// A column's type.
    Type,
    /// The command tag, of equal rows.
    Tag,
    /// Other notices (`reads.compare_notices`), of equal rows.
    Notices,
    /// The secondary lacks rows.
    MissingRow,
    /// The secondary has rows too many.
    ExtraRow,
    /// As many rows, other values.
    #[default]
    Value,
    /// As many rows, and values differ in precision only: digits of a float, of a numeric's scale,
    /// of a time's second.
    Precision,
    /// Rows missing and rows too many, in different numbers or of different keys.
    Rows,
    /// The same rows, out of order by the ORDER BY keys themselves.
    Order,
    /// The same rows, which a text column sorts otherwise.
    Collation,
    /// No wrong answer, and no part of any rate of them: new clearly takes longer. Told by
    /// [lines of their own](super::slower), once a statement and window.
    Slower,
    /// A rehearsed write: one side failed, or both with different SQLSTATEs.
    WriteError,
    /// A rehearsed write: another command tag, or another number of rows.
    WriteTag,
    /// A rehearsed write: RETURNING gives columns of other names, types or number.
    WriteColumns,
}

impl Kind {
    pub const ALL: [Self; 17] = [
        Self::Error,
        Self::Columns,
        Self::ColumnName,
        Self::Type,
        Self::Tag,
        Self::Notices,
        Self::MissingRow,
        Self::ExtraRow,
        Self::Value,
        Self::Precision,
        Self::Rows,
        Self::Order,
        Self::Collation,
        Self::Slower,
        Self::WriteError,
        Self::WriteTag,
        Self::WriteColumns,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Columns => "columns",
            Self::ColumnName => "column_name",
            Self::Type => "type",
            Self::Tag => "tag",
            Self::Notices => "notices",
            Self::MissingRow => "missing_row",
            Self::ExtraRow => "extra_row",
            Self::Value => "value",
            Self::Precision => "precision",
            Self::Rows => "rows",
            Self::Order => "order",
            Self::Collation => "collation",
            Self::Slower => "slower",
            Self::WriteError => "write_error",
            Self::WriteTag => "write_tag",
            Self::WriteColumns => "write_columns",
        }
    }
}

impl Kind {
    /// Of a rehearsed write, not of a read.
    pub const fn is_write(self) -> bool {
        matches!(self, Self::WriteError | Self::WriteTag | Self::WriteColumns)
    }
}

impl From<Kind> for Verdict {
    fn from(kind: Kind) -> Self {
        Self::Different(Difference {
            kind,
            ..Difference::default()
        })
    }
}

/// Differing rows shown of each side.
const SHOWN_ROWS_MAX: usize = 3;
/// What two answers to one read, taken at a cut, are compared by.
#[derive(Clone, Copy)]
pub(super) struct Comparison<'a> {
    pub(super) facts: &'a ReadFacts,
    pub(super) rules: &'a ReadRules,
    pub(super) catalog: &'a Catalog,
    /// Both come from the primary, so that types are the same by their OIDs.
    pub(super) one_server: bool,
}

impl Comparison<'_> {
    pub(super) fn compare(&self, primary: &Answer, secondary: &Answer) -> Verdict {
        let (one, other) = (&primary.digest, &secondary.digest);
        if one.sqlstate.is_some() || other.sqlstate.is_some() {
            return match one.sqlstate == other.sqlstate {
                true => Verdict::Equal,
                false => Kind::Error.into(),
            };
        }
        if let Some(kind) = self.columns_differ(&primary.columns, &secondary.columns) {
            return kind.into();
        }
        let plans: Vec<ColumnPlan> = primary
            .columns
            .iter()
            .map(|column| self.rules.of_column(&column.name))
            .collect();
        match self.compare_rows(&plans, primary, secondary) {
            Verdict::Different(difference) => Verdict::Different(difference),
            // The tag holds the number of rows: where that is left open, so is the tag.
            _ if one.rows == other.rows && !same_tag(one, other) => Kind::Tag.into(),
            _ if self.rules.notices && one.notices != other.notices => Kind::Notices.into(),
            alike => alike,
        }
    }

    fn columns_differ(&self, ours: &[Column], theirs: &[Column]) -> Option<Kind> {
        if ours.len() != theirs.len() {
            return Some(Kind::Columns);
        }
        let pairs = || ours.iter().zip(theirs);
        if pairs().any(|(one, other)| one.name != other.name) {
            return Some(Kind::ColumnName);
        }
        let same = |one: &Column, other: &Column| match self.one_server {
            true => one.type_oid == other.type_oid,
            false => self.catalog.is_same_type(one.type_oid, other.type_oid),
        };
        pairs().any(|(one, other)| !same(one, other)).then_some(Kind::Type)
    }

    fn compare_rows(&self, plans: &[ColumnPlan], primary: &Answer, secondary: &Answer) -> Verdict {
        let (one, other) = (&primary.digest, &secondary.digest);
        if one.rows == other.rows && one.multiset == other.multiset {
            return match self.facts.ordered && one.ordered != other.ordered {
                true => self.compare_order(plans, primary, secondary),
                false => Verdict::Equal,
            };
        }
        let mut difference = Difference {
            kind: match one.rows.cmp(&other.rows) {
                Ordering::Equal => Kind::Value,
                Ordering::Greater => Kind::MissingRow,
                Ordering::Less => Kind::ExtraRow,
            },
            ..Difference::default()
        };
        if primary.all_told() && secondary.all_told() {
            let mut ours = surplus(primary, secondary);
            let mut theirs = surplus(secondary, primary);
            if plans.iter().any(|plan| *plan != ColumnPlan::default()) {
                let Some(ignored) = settle(plans, primary, secondary, &mut ours, &mut theirs) else {
                    return Verdict::TooMany;
                };
                if ours.is_empty() && theirs.is_empty() {
                    return match self.compare_order(plans, primary, secondary) {
                        Verdict::Different(difference) if self.facts.ordered => Verdict::Different(difference),
                        _ if ignored => Verdict::Open(NotComparable::Ignored),
                        _ => Verdict::Tolerated,
                    };
                }
            }
            self.describe(plans, primary, secondary, &ours, &theirs, &mut difference);
        }
        match left_open(self.facts, primary, secondary) {
            Some(reason) => Verdict::Open(reason),
            None => Verdict::Different(difference),
        }
    }

    /// Of the same rows: whether they come in the order of their keys on both sides alike.
    fn compare_order(&self, plans: &[ColumnPlan], primary: &Answer, secondary: &Answer) -> Verdict {
        let Some(places) = key_places(self.facts, primary).filter(|_| primary.all_kept() && secondary.all_kept())
        else {
            return Verdict::OrderTies;
        };
        for row in 0..primary.kept.len() {
            let (Some(ours), Some(theirs)) = (primary.cells(row), secondary.cells(row)) else {
                return Verdict::OrderTies;
            };
            let plan = |place: usize| plans.get(place).copied().unwrap_or_default();
            let cell = |cells: &[Cell<'_>], place: usize| cells.get(place).copied().flatten().map(<[u8]>::to_vec);
            let differs = |place: &usize| {
                let (one, other) = (cell(&ours, *place), cell(&theirs, *place));
                !plan(*place).ignored && !alike(plan(*place).how, one.as_deref(), other.as_deref())
            };
            let Some(place) = places.iter().copied().find(differs) else {
                continue;
            };
            let collated = primary
                .columns
                .get(place)
                .is_some_and(|column| is_collated(column.type_oid));
            if collated && plan(place).how == Some(How::Collation) {
                return Verdict::Tolerated;
            }
            return Verdict::Different(Difference {
                kind: if collated { Kind::Collation } else { Kind::Order },
                primary: vec![primary.kept[row].clone()],
                secondary: vec![secondary.kept[row].clone()],
                columns: names(&primary.columns, [place]),
            });
        }
        Verdict::OrderTies
    }

    /// Lays the rows side by side that the two answers do not share.
    fn describe(
        &self,
        plans: &[ColumnPlan],
        primary: &Answer,
        secondary: &Answer,
        ours: &[usize],
        theirs: &[usize],
        difference: &mut Difference,
    ) {
        let keys: Vec<usize> = (0..primary.columns.len())
            .filter(|&at| self.catalog.is_key(primary.columns[at].origin))
            .collect();
        // The lines of a COPY are in no columns that could be laid side by side.
        let paired = match primary.columns.is_empty() {
            true => Vec::new(),
            false => pair(&keys, primary, secondary, ours, theirs),
        };
        difference.kind = match (ours.is_empty(), theirs.is_empty()) {
            (false, true) => Kind::MissingRow,
            (true, false) => Kind::ExtraRow,
            _ if keys.is_empty() && ours.len() != theirs.len() => Kind::Rows,
            // By their keys these are different rows.
            _ if !keys.is_empty() && paired.len() < ours.len().max(theirs.len()).min(PAIRED_ROWS_MAX) => Kind::Rows,
            _ => Kind::Value,
        };
        let mut columns = BTreeSet::new();
        let mut precise = !paired.is_empty() && paired.len() == ours.len();
        for &(our, their) in &paired {
            let (Some(one), Some(other)) = (primary.cells(our), secondary.cells(their)) else {
                continue;
            };
            for (at, (one, other)) in one.iter().zip(&other).enumerate() {
                let plan = plans.get(at).copied().unwrap_or_default();
                if plan.ignored || alike(plan.how, *one, *other) {
                    continue;
                }
                columns.insert(at);
                let type_oid = primary.columns.get(at).map_or(0, |column| column.type_oid);
                precise &= only_precision(type_oid, *one, *other);
            }
        }
        if difference.kind == Kind::Value && precise && !columns.is_empty() {
            difference.kind = Kind::Precision;
        }
        difference.columns = names(&primary.columns, columns);
        let shown = |answer: &Answer, surplus: &[usize]| -> Vec<Vec<u8>> {
            surplus
                .iter()
                .filter_map(|&at| answer.kept.get(at).cloned())
                .take(SHOWN_ROWS_MAX)
                .collect()
        };
        difference.primary = shown(primary, ours);
        difference.secondary = shown(secondary, theirs);
    }
}

fn names(columns: &[Column], places: impl IntoIterator<Item = usize>) -> Vec<String> {
    let name = |at: usize| {
        columns
            .get(at)
            .map(|column| String::from_utf8_lossy(&column.name).into_owned())
    };
    places.into_iter().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::super::answer::ROWS_MAX;
    use super::*;
    use crate::wire::backend;

    fn add(answer: &mut Answer, values: &[&str]) {
        let mut body = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            body.extend_from_slice(&i32::try_from(value.len()).unwrap().to_be_bytes());
            body.extend_from_slice(value.as_bytes());
        }
        answer.add_row(xxhash_rust::xxh3::xxh3_128(&body), Some(&body));
    }

    /// Columns `k` and `v`, one row a word `k=v`.
    fn answer(rows: &str) -> Answer {
        let mut answer = Answer::default();
        answer.columns = vec![
            Column {
                name: b"k".to_vec(),
                origin: (0, 0),
                type_oid: 23,
            },
            Column {
                name: b"v".to_vec(),
                origin: (0, 0),
                type_oid: 25,
            },
        ];
        for word in rows.split_whitespace() {
            let (key, value) = word.split_once('=').unwrap();
            add(&mut answer, &[key, value]);
        }
        answer
    }

    fn facts(sql: &str) -> ReadFacts {
        crate::sql::single_read(&crate::sql::analyze(sql.as_bytes()))
            .unwrap()
            .clone()
    }

    fn compare(facts: &ReadFacts, primary: &Answer, secondary: &Answer) -> Verdict {
        Comparison {
            facts,
            rules: &ReadRules::default(),
            catalog: &Catalog::default(),
            one_server: false,
        }
        .compare(primary, secondary)
    }

    fn verdict(sql: &str, primary: &str, secondary: &str) -> String {
        match compare(&facts(sql), &answer(primary), &answer(secondary)) {
            Verdict::Equal => "equal".into(),
            Verdict::Tolerated => "tolerated".into(),
            Verdict::TooMany => "too many".into(),
            Verdict::OrderTies => "order_ties".into(),
            Verdict::Open(reason) => format!("open: {reason}"),
            Verdict::Different(difference) => {
                let show = |rows: &[Vec<u8>]| {
                    let rows: Vec<String> = rows
                        .iter()
                        .map(|row| {
                            let values: Vec<_> = backend::columns(row)
                                .map(|value| String::from_utf8_lossy(value.unwrap()).into_owned())
                                .collect();
                            values.join("=")
                        })
                        .collect();
                    rows.join(" ")
                };
                let sides = format!("{} | {}", show(&difference.primary), show(&difference.secondary));
                format!("{}: {}", difference.kind.as_str(), sides)
            }
        }
    }

    #[test]
    fn rows_without_order() {
        let check = |primary, secondary, expected| {
            assert_eq!(verdict("select k, v from t", primary, secondary), expected);
        };
        check("1=a 2=b", "1=a 2=b", "equal");
        check("1=a 2=b", "2=b 1=a", "equal");
        check("1=a 1=a", "1=a", "missing_row: 1=a | ");
        check("1=a", "1=a 2=b", "extra_row:  | 2=b");
        check("1=a 2=b", "1=a 2=c", "value: 2=b | 2=c");
        check("1=a 2=b 3=c", "1=a 4=d", "rows: 2=b 3=c | 4=d");
        check("1=a 1=a 2=b", "1=a 2=b 2=b", "value: 1=a | 2=b");
        check("", "", "equal");
    }

    #[test]
    fn rows_in_order() {
        let check = |sql, primary, secondary, expected| assert_eq!(verdict(sql, primary, secondary), expected, "{sql}");
        let by_k = "select k, v from t order by k";
        check(by_k, "1=a 2=b", "1=a 2=b", "equal");
        check(by_k, "1=a 1=b 2=c", "1=b 1=a 2=c", "order_ties");
        check(by_k, "1=a 2=b", "2=b 1=a", "order: 1=a | 2=b");
        check(
            "select k, v from t order by 1",
            "1=a 2=b",
            "2=b 1=a",
            "order: 1=a | 2=b",
        );
        check(
            "select k, v from t order by lower(k)",
            "1=a 2=b",
            "2=b 1=a",
            "order_ties",
        );
        check(by_k, "1=a 2=b", "1=a 2=c", "value: 2=b | 2=c");
    }

    #[test]
    fn rows_that_the_statement_leaves_open() {
        let check = |sql, primary, secondary, expected| assert_eq!(verdict(sql, primary, secondary), expected, "{sql}");
        let limit = "select k, v from t limit 1";
        check(limit, "1=a", "2=b", "open: limit_without_order");
        check(limit, "1=a", "", "missing_row: 1=a | ");
        let top = "select k, v from t order by k limit 3";
        check(top, "1=a 2=b 2=c", "1=a 2=d 2=b", "open: limit_without_order");
        check(top, "1=a 2=b 2=c", "1=x 2=b 2=c", "value: 1=a | 1=x");
        check(top, "1=a 2=b 3=c", "1=a 2=b 3=x", "value: 3=c | 3=x");
        check(
            "select k, array_agg(v) from t group by k",
            "1=ab",
            "1=ba",
            "open: order_dependent_function",
        );
        check("select * from t tablesample system (1)", "1=a", "", "open: sample");
    }

    #[test]
    fn errors_and_columns() {
        let failed = |code: &[u8; 5]| {
            let mut answer = Answer::default();
            answer.digest.sqlstate = Some(*code);
            answer
        };
        let facts = facts("select 1");
        let kind = |one: &Answer, other: &Answer| match compare(&facts, one, other) {
            Verdict::Different(difference) => Some(difference.kind),
            _ => None,
        };
        assert_eq!(kind(&failed(b"22012"), &failed(b"22012")), None);
        assert_eq!(kind(&failed(b"22012"), &failed(b"42P01")), Some(Kind::Error));
        assert_eq!(kind(&failed(b"22012"), &answer("1=a")), Some(Kind::Error));
        let mut other = answer("1=a");
        other.columns[1].type_oid = 1043;
        assert_eq!(kind(&answer("1=a"), &other), Some(Kind::Type));
        other.columns[1].name = b"w".to_vec();
        assert_eq!(kind(&answer("1=a"), &other), Some(Kind::ColumnName));
        other.columns.pop();
        assert_eq!(kind(&answer("1=a"), &other), Some(Kind::Columns));
        // Without a catalog nothing is known of custom types but that they are such.
        for (oid, expected) in [(20_000, None), (25, Some(Kind::Type))] {
            let (mut one, mut other) = (answer("1=a"), answer("1=a"));
            one.columns[1].type_oid = 16_400;
            other.columns[1].type_oid = oid;
            assert_eq!(kind(&one, &other), expected);
        }
    }

    #[test]
    fn more_rows_than_are_kept() {
        let (mut one, mut other) = (answer(""), answer(""));
        for number in 0..ROWS_MAX + 10 {
            add(&mut one, &[&number.to_string(), "x"]);
            add(&mut other, &[&number.to_string(), "x"]);
        }
        add(&mut other, &["1", "x"]);
        assert!(!one.all_told() && one.hashes.len() == ROWS_MAX);
        assert!(matches!(
            compare(&facts("select k, v from t"), &one, &other),
            Verdict::Different(Difference {
                kind: Kind::ExtraRow,
                ..
            })
        ));
    }

    #[test]
    fn digests() {
        let digest = |rows: &str| answer(rows).digest;
        let (plain, ordered) = (facts("select k from t"), facts("select k from t order by k"));
        assert!(same(&plain, false, &digest("1=a 2=b"), &digest("2=b 1=a")));
        assert!(!same(&ordered, false, &digest("1=a 2=b"), &digest("2=b 1=a")));
        assert!(!same(&plain, false, &digest("1=a"), &digest("1=b")));
        let with = |columns| Digest {
            columns,
            ..digest("1=a")
        };
        assert!(same(&plain, false, &with(Some(1)), &with(None)));
        assert!(!same(&plain, false, &with(Some(1)), &with(Some(2))));
    }
}
