//! What two answers say about two databases. Pure.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::digest::{Column, Digest, FIRST_CUSTOM_OID};
use crate::sql::{NotComparable, OrderKey, ReadFacts, Unstable};
use crate::wire::backend;

/// Whether the secondary's answer is the primary's, as far as the digests tell.
pub(super) fn same(facts: &ReadFacts, primary: &Digest, secondary: &Digest) -> bool {
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
        && if facts.ordered {
            primary.ordered == secondary.ordered
        } else {
            primary.multiset == secondary.multiset
        }
}

/// Rows of one answer are told apart up to this number; more only by the digest.
const ROWS_MAX: usize = 500_000;
/// Bytes of rows kept to be shown or to have their ORDER BY keys compared.
pub(super) const KEPT_BYTES_MAX: usize = 8 * 1024 * 1024;

/// An answer taken at a cut, in text format, with as many of its rows as may be kept.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) digest: Digest,
    pub(super) columns: Vec<Column>,
    /// Of each row in order, up to [`ROWS_MAX`].
    hashes: Vec<u128>,
    /// The bodies of the first rows, up to [`KEPT_BYTES_MAX`].
    kept: Vec<Vec<u8>>,
    kept_bytes: usize,
}

impl Answer {
    /// The next row by its hash; without its body where that is too long to be kept.
    pub(super) fn add_row(&mut self, hash: u128, body: Option<&[u8]>) {
        self.digest.add_row(hash);
        if self.hashes.len() < ROWS_MAX {
            self.hashes.push(hash);
            if let Some(body) = body
                && self.kept.len() + 1 == self.hashes.len()
                && self.kept_bytes + body.len() <= KEPT_BYTES_MAX
            {
                self.kept_bytes += body.len();
                self.kept.push(body.to_owned());
            }
        }
    }

    const fn all_told(&self) -> bool {
        self.hashes.len() as u64 == self.digest.rows
    }

    const fn all_kept(&self) -> bool {
        self.kept.len() as u64 == self.digest.rows
    }

    fn same_columns(&self, other: &Self) -> bool {
        let known = |column: &Column| column.type_oid.min(FIRST_CUSTOM_OID);
        self.columns.len() == other.columns.len()
            && self
                .columns
                .iter()
                .zip(&other.columns)
                .all(|(one, other)| one.name == other.name && known(one) == known(other))
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Equal,
    /// Equal but for the order of rows whose ORDER BY keys are equal (or not known).
    OrderTies,
    /// They differ where the statement leaves the answer open.
    Open(NotComparable),
    Different(Difference),
}

/// How two answers differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) kind: Kind,
    /// The first rows that the other answer does not have (for [`Kind::Order`]: the rows at the
    /// first place that differs).
    pub(super) primary: Vec<Vec<u8>>,
    pub(super) secondary: Vec<Vec<u8>>,
}

/// The kinds of mismatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One side failed, or both with different SQLSTATEs.
    Error,
    /// Number, names or types of the columns.
    Columns,
    /// The secondary lacks rows.
    MissingRow,
    /// The secondary has rows too many.
    ExtraRow,
    /// As many rows, other values.
    Value,
    /// Rows missing and rows too many, in different numbers.
    Rows,
    /// The same rows, out of order by the ORDER BY keys themselves.
    Order,
}

impl Kind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Columns => "columns",
            Self::MissingRow => "missing_row",
            Self::ExtraRow => "extra_row",
            Self::Value => "value",
            Self::Rows => "rows",
            Self::Order => "order",
        }
    }
}

/// Differing rows shown of each side.
const SHOWN_ROWS_MAX: usize = 3;

/// Compares two answers taken at a cut.
pub(super) fn compare(facts: &ReadFacts, primary: &Answer, secondary: &Answer) -> Verdict {
    let different = |kind| {
        Verdict::Different(Difference {
            kind,
            primary: Vec::new(),
            secondary: Vec::new(),
        })
    };
    let (one, other) = (&primary.digest, &secondary.digest);
    if one.sqlstate.is_some() || other.sqlstate.is_some() {
        return if one.sqlstate == other.sqlstate {
            Verdict::Equal
        } else {
            different(Kind::Error)
        };
    }
    if !primary.same_columns(secondary) {
        return different(Kind::Columns);
    }
    let same_rows = one.rows == other.rows && one.multiset == other.multiset;
    if same_rows && (!facts.ordered || one.ordered == other.ordered) {
        return Verdict::Equal;
    }
    if same_rows {
        return match keys(facts, primary).zip(keys(facts, secondary)) {
            Some((ours, theirs)) if ours != theirs => {
                let at = ours.iter().zip(&theirs).position(|(one, other)| one != other);
                let row = |answer: &Answer| at.and_then(|at| answer.kept.get(at)).cloned();
                Verdict::Different(Difference {
                    kind: Kind::Order,
                    primary: row(primary).into_iter().collect(),
                    secondary: row(secondary).into_iter().collect(),
                })
            }
            _ => Verdict::OrderTies,
        };
    }
    if let Some(reason) = left_open(facts, primary, secondary) {
        return Verdict::Open(reason);
    }
    let mut difference = Difference {
        kind: match one.rows.cmp(&other.rows) {
            std::cmp::Ordering::Equal => Kind::Value,
            std::cmp::Ordering::Greater => Kind::MissingRow,
            std::cmp::Ordering::Less => Kind::ExtraRow,
        },
        primary: Vec::new(),
        secondary: Vec::new(),
    };
    if primary.all_told() && secondary.all_told() {
        let ours = surplus(primary, secondary);
        let theirs = surplus(secondary, primary);
        difference.kind = match (ours.is_empty(), theirs.is_empty()) {
            (false, true) => Kind::MissingRow,
            (true, false) => Kind::ExtraRow,
            _ if one.rows == other.rows => Kind::Value,
            _ => Kind::Rows,
        };
        let shown = |answer: &Answer, surplus: &[usize]| -> Vec<Vec<u8>> {
            surplus
                .iter()
                .filter_map(|&at| answer.kept.get(at).cloned())
                .take(SHOWN_ROWS_MAX)
                .collect()
        };
        difference.primary = shown(primary, &ours);
        difference.secondary = shown(secondary, &theirs);
    }
    Verdict::Different(difference)
}

/// Where in `answer` the rows stand that `other` does not have as often.
fn surplus(answer: &Answer, other: &Answer) -> Vec<usize> {
    let mut there: HashMap<u128, usize> = HashMap::new();
    for hash in &other.hashes {
        *there.entry(*hash).or_default() += 1;
    }
    let mut surplus = Vec::new();
    for (at, hash) in answer.hashes.iter().enumerate() {
        match there.get_mut(hash) {
            Some(count) if *count > 0 => *count -= 1,
            _ => surplus.push(at),
        }
    }
    surplus
}

/// Whether answers of different rows may both be right.
fn left_open(facts: &ReadFacts, primary: &Answer, secondary: &Answer) -> Option<NotComparable> {
    let same_count = primary.digest.rows == secondary.digest.rows;
    match facts.unstable {
        // How many rows come is not left open, except to a sample.
        Some(Unstable::Sample) => return Some(NotComparable::Sample),
        Some(Unstable::LimitWithoutOrder) if same_count => return Some(NotComparable::LimitWithoutOrder),
        Some(Unstable::OrderDependentFunction) if same_count => return Some(NotComparable::OrderDependentFunction),
        Some(Unstable::DistinctOnWithoutOrder) if same_count => return Some(NotComparable::DistinctOn),
        Some(_) | None => {}
    }
    if !(facts.limited && same_count) {
        return None;
    }
    // ORDER BY with LIMIT: where several rows share the last keys, which of them come is open.
    // A single last row may be tied with rows beyond the limit, too; but were it taken for open,
    // ORDER BY key LIMIT 1 would never show a difference.
    let (ours, theirs) = (keys(facts, primary)?, keys(facts, secondary)?);
    let last = ours.last()?;
    let tied = ours.iter().rev().take_while(|key| *key == last).count();
    let before = ours.len() - tied;
    let sorted = |answer: &Answer| {
        let mut hashes = answer.hashes[..before].to_vec();
        hashes.sort_unstable();
        hashes
    };
    let open = tied > 1 && ours == theirs && sorted(primary) == sorted(secondary);
    open.then_some(NotComparable::LimitWithoutOrder)
}

/// The ORDER BY keys of each row, where they are output columns and all rows are kept.
fn keys<'a>(facts: &ReadFacts, answer: &'a Answer) -> Option<Vec<Vec<Option<&'a [u8]>>>> {
    if !answer.all_kept() {
        return None;
    }
    let places = facts
        .order_keys
        .as_ref()?
        .iter()
        .map(|key| match key {
            OrderKey::Position(position) => position.checked_sub(1),
            OrderKey::Name(name) => {
                let mut found = (0..answer.columns.len()).filter(|&at| answer.columns[at].name == name.as_bytes());
                let place = found.next();
                // Two columns of one name: which one is meant depends on what they are.
                place.filter(|_| found.next().is_none())
            }
        })
        .collect::<Option<Vec<usize>>>()?;
    answer
        .kept
        .iter()
        .map(|row| {
            let columns: Vec<_> = backend::columns(row).collect();
            places.iter().map(|&place| columns.get(place).copied()).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut answer = Answer {
            columns: vec![
                Column {
                    name: b"k".to_vec(),
                    type_oid: 23,
                },
                Column {
                    name: b"v".to_vec(),
                    type_oid: 25,
                },
            ],
            ..Answer::default()
        };
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

    fn verdict(sql: &str, primary: &str, secondary: &str) -> String {
        match compare(&facts(sql), &answer(primary), &answer(secondary)) {
            Verdict::Equal => "equal".into(),
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
        let failed = |code: &[u8; 5]| Answer {
            digest: Digest {
                sqlstate: Some(*code),
                ..Digest::default()
            },
            ..Answer::default()
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
        assert_eq!(kind(&answer("1=a"), &other), Some(Kind::Columns));
        for (oid, expected) in [(20_000, None), (25, Some(Kind::Columns))] {
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
        assert!(one.kept_bytes <= KEPT_BYTES_MAX && one.hashes.len() == ROWS_MAX);
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
        assert!(same(&plain, &digest("1=a 2=b"), &digest("2=b 1=a")));
        assert!(!same(&ordered, &digest("1=a 2=b"), &digest("2=b 1=a")));
        assert!(!same(&plain, &digest("1=a"), &digest("1=b")));
        let with = |columns| Digest {
            columns,
            ..digest("1=a")
        };
        assert!(same(&plain, &with(Some(1)), &with(None)));
        assert!(!same(&plain, &with(Some(1)), &with(Some(2))));
    }
}
