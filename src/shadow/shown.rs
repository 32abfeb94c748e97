//! What the rows shown of a mismatch say: which columns differ, and by which values the differing
//! rows are found again. Pure.

use serde_json::{Map, Value};

use super::log::BothSides;
use crate::wire::backend;

#[derive(Debug, Default, PartialEq)]
pub(super) struct Apart {
    pub(super) differing_columns: Vec<String>,
    /// For each pair of rows, and each row that the other side lacks: the values of its key. Where
    /// no key is known, the first values in which a pair agrees, or the row's first value.
    pub(super) keys: Vec<Map<String, Value>>,
}

/// Agreeing columns shown of a pair: a key has few, and stands in front.
const KEY_COLUMNS_MAX: usize = 4;

type Row<'a> = Vec<Option<&'a [u8]>>;

/// Each row of the primary is held against the row of the secondary that agrees with it in most
/// columns. The values come from `written`, so that they are hidden as the log hides them.
pub(super) fn told_apart(
    columns: &[String],
    key: &[usize],
    primary: &[Vec<u8>],
    secondary: &[Vec<u8>],
    written: &BothSides<Vec<Vec<Option<String>>>>,
) -> Apart {
    let primary: Vec<Row<'_>> = primary.iter().map(|row| backend::columns(row).collect()).collect();
    let secondary: Vec<Row<'_>> = secondary.iter().map(|row| backend::columns(row).collect()).collect();
    let mut free: Vec<usize> = (0..secondary.len()).collect();
    let mut apart = Apart::default();
    let alone = if key.is_empty() { &[0][..] } else { key };
    let mut differs = vec![false; columns.len()];
    for (place, ours) in primary.iter().enumerate() {
        let best = free
            .iter()
            .copied()
            .max_by_key(|&other| agreeing(ours, &secondary[other]));
        match best.filter(|&other| agreeing(ours, &secondary[other]) > 0) {
            Some(other) => {
                free.retain(|&left| left != other);
                let theirs = &secondary[other];
                let agrees = |n: &usize| ours.get(*n) == theirs.get(*n);
                differs
                    .iter_mut()
                    .enumerate()
                    .for_each(|(n, differs)| *differs |= !agrees(&n));
                let agreeing: Vec<usize> = (0..columns.len()).filter(agrees).take(KEY_COLUMNS_MAX).collect();
                let key = if key.is_empty() { &agreeing[..] } else { key };
                apart.keys.extend(named(columns, written.primary.get(place), key));
            }
            None => apart.keys.extend(named(columns, written.primary.get(place), alone)),
        }
    }
    for left in free {
        apart.keys.extend(named(columns, written.secondary.get(left), alone));
    }
    apart.differing_columns = columns
        .iter()
        .zip(&differs)
        .filter(|(_, differs)| **differs)
        .map(|(name, _)| name.clone())
        .collect();
    // With nothing in common it is another value all the same.
    if let ([column], true, true) = (columns, !primary.is_empty(), !secondary.is_empty()) {
        apart.differing_columns = vec![column.clone()];
    }
    apart
}

fn agreeing(one: &Row<'_>, other: &Row<'_>) -> usize {
    one.iter().zip(other).filter(|(one, other)| one == other).count()
}

fn named(columns: &[String], row: Option<&Vec<Option<String>>>, which: &[usize]) -> Option<Map<String, Value>> {
    let row = row?;
    let key: Map<String, Value> = which
        .iter()
        .filter_map(|&n| Some((columns.get(n)?.clone(), row.get(n)?.clone().into())))
        .collect();
    (!key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LoggedValues;
    use crate::shadow::values::ValueWriter;

    fn row(values: &[&str]) -> Vec<u8> {
        let mut body = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            body.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
            body.extend_from_slice(value.as_bytes());
        }
        body
    }

    fn apart(columns: &[&str], key: &[usize], primary: &[&[&str]], secondary: &[&[&str]]) -> (Vec<String>, String) {
        let columns: Vec<String> = columns.iter().map(|name| (*name).to_owned()).collect();
        let bodies = |rows: &[&[&str]]| rows.iter().map(|values| row(values)).collect::<Vec<_>>();
        let (primary, secondary) = (bodies(primary), bodies(secondary));
        let values = ValueWriter::with_key(LoggedValues::Plain, [0; 32]);
        let written = BothSides {
            primary: values.rows(&columns, &primary),
            secondary: values.rows(&columns, &secondary),
        };
        let apart = told_apart(&columns, key, &primary, &secondary, &written);
        (apart.differing_columns, serde_json::to_string(&apart.keys).unwrap())
    }

    #[test]
    fn rows_are_held_against_those_most_alike() {
        assert_eq!(
            apart(
                &["id", "name", "price"],
                &[],
                &[&["1", "a", "10"], &["2", "b", "20"]],
                &[&["2", "b", "21"], &["1", "x", "10"]]
            ),
            (
                vec!["name".to_owned(), "price".to_owned()],
                r#"[{"id":"1","price":"10"},{"id":"2","name":"b"}]"#.to_owned()
            )
        );
    }

    #[test]
    fn rows_of_one_side_alone_differ_in_no_column() {
        assert_eq!(
            apart(&["id", "name"], &[], &[&["8", "eight"]], &[]),
            (vec![], r#"[{"id":"8"}]"#.to_owned())
        );
        assert_eq!(
            apart(&["id", "name"], &[], &[], &[&["0", "zero"]]),
            (vec![], r#"[{"id":"0"}]"#.to_owned())
        );
    }

    #[test]
    fn a_known_key_is_told() {
        assert_eq!(
            apart(&["name", "id"], &[1], &[&["a", "7"], &["z", "9"]], &[&["b", "7"]]),
            (vec!["name".to_owned()], r#"[{"id":"7"},{"id":"9"}]"#.to_owned())
        );
    }

    #[test]
    fn the_only_column() {
        assert_eq!(apart(&["count"], &[], &[&["1"]], &[&["2"]]).0, ["count"]);
    }
}
