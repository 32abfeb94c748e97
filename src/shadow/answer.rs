//! An answer taken at a cut, to be laid beside another one.

use super::alike::Cell;
use super::digest::{Column, Digest};
use crate::sql::{OrderKey, ReadFacts};
use crate::wire::backend;

/// Rows of one answer are told apart up to this number; more only by the digest.
pub(super) const ROWS_MAX: usize = 500_000;
/// Bytes of rows kept to be shown or to have their ORDER BY keys compared.
pub(super) const KEPT_BYTES_MAX: usize = 8 * 1024 * 1024;

/// An answer taken at a cut, in text format, with as many of its rows as may be kept.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) digest: Digest,
    pub(super) columns: Vec<Column>,
    /// Of each row in order, up to [`ROWS_MAX`].
    pub(super) hashes: Vec<u128>,
    /// The bodies of the first rows, up to [`KEPT_BYTES_MAX`].
    pub(super) kept: Vec<Vec<u8>>,
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

    pub(super) const fn all_told(&self) -> bool {
        self.hashes.len() as u64 == self.digest.rows
    }

    pub(super) const fn all_kept(&self) -> bool {
        self.kept.len() as u64 == self.digest.rows
    }

    /// The first column of the rows that are kept.
    pub(super) fn lines(&self) -> impl Iterator<Item = String> {
        let first = |row| self.cells(row)?.first().copied().flatten();
        let lines = (0..self.kept.len()).filter_map(first);
        lines.map(|line| String::from_utf8_lossy(line).into_owned())
    }

    pub(super) fn cells(&self, row: usize) -> Option<Vec<Cell<'_>>> {
        self.kept.get(row).map(|body| backend::columns(body).collect())
    }
}

/// The places of the ORDER BY keys, where they are output columns.
pub(super) fn key_places(facts: &ReadFacts, answer: &Answer) -> Option<Vec<usize>> {
    let place = |key: &OrderKey| match key {
        OrderKey::Position(position) => position.checked_sub(1),
        OrderKey::Name(name) => {
            let mut found = (0..answer.columns.len()).filter(|&at| answer.columns[at].name == name.as_bytes());
            let place = found.next();
            // Two columns of one name: which one is meant depends on what they are.
            place.filter(|_| found.next().is_none())
        }
    };
    facts.order_keys.as_ref()?.iter().map(place).collect()
}

/// The ORDER BY keys of each row, where they are output columns and all rows are kept.
pub(super) fn keys<'a>(facts: &ReadFacts, answer: &'a Answer) -> Option<Vec<Vec<Cell<'a>>>> {
    if !answer.all_kept() {
        return None;
    }
    let places = key_places(facts, answer)?;
    (0..answer.kept.len())
        .map(|row| {
            let columns = answer.cells(row)?;
            places.iter().map(|&place| columns.get(place).copied()).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded() {
        let mut answer = Answer::default();
        let body = vec![0; KEPT_BYTES_MAX / 4];
        for number in 0..6 {
            answer.add_row(number, Some(&body));
        }
        assert_eq!((answer.kept.len(), answer.hashes.len()), (4, 6));
        assert!(answer.kept_bytes <= KEPT_BYTES_MAX && answer.all_told() && !answer.all_kept());
        // Never with a gap: the first rows.
        let mut answer = Answer::default();
        for (number, body) in [(0, Some(&b"a"[..])), (1, None), (2, Some(b"c"))] {
            answer.add_row(number, body);
        }
        assert_eq!(answer.kept, [b"a"]);
    }
}
