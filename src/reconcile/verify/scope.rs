//! What a verification is asked for: which tables, and how they are read.

use std::collections::BTreeSet;

use crate::apply::{Applier, Seeding, TableStatus};
use crate::reconcile::VerifyError;

/// Which tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chosen {
    All,
    /// `schema.name`, or a name that only one schema has.
    Named(Vec<String>),
    /// Those that hold rows from before mirroring and are not synced.
    Unseeded,
}

/// When the secondary's snapshot is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecondarySnapshot {
    AtTheCut,
    /// So many rounds after it: wrong, for the test that must find differences then.
    RoundsLater(u64),
}

/// How a verification is done.
#[derive(Debug, Clone)]
pub struct Options {
    pub chosen: Chosen,
    /// Each has a connection to both sides.
    pub workers: usize,
    /// Rows per second on each side; `None`: as fast as it goes.
    pub rate: Option<u64>,
    /// Rows of a range, about.
    pub range_rows: u64,
    /// Differing rows are shown as they are, not as their hash.
    pub plain: bool,
    /// Differing rows kept for each table; all are counted.
    pub keep: usize,
    pub secondary_snapshot: SecondarySnapshot,
}

impl Options {
    pub const WORKERS: usize = 2;
    /// A differing range is read once more, row by row: smaller ranges make differences cheap,
    /// larger ones their absence.
    pub const RANGE_ROWS: u64 = 8192;
    pub const KEEP: usize = 1000;

    pub const fn of(chosen: Chosen) -> Self {
        Self {
            chosen,
            workers: Self::WORKERS,
            rate: None,
            range_rows: Self::RANGE_ROWS,
            plain: false,
            keep: Self::KEEP,
            secondary_snapshot: SecondarySnapshot::AtTheCut,
        }
    }
}

/// The tables that are meant, as the applier's last round has them.
pub(super) fn choose(applier: &Applier, chosen: &Chosen) -> Result<Vec<TableStatus>, VerifyError> {
    let status = applier.status();
    let tables = &status.borrow().tables;
    match chosen {
        Chosen::All => Ok(tables.clone()),
        Chosen::Unseeded => Ok(tables
            .iter()
            .filter(|table| table.seeding == Seeding::Unseeded && table.paused.is_none())
            .cloned()
            .collect()),
        Chosen::Named(names) => {
            let mut found = BTreeSet::new();
            for name in names {
                let matching: Vec<usize> = (0..tables.len())
                    .filter(|&at| {
                        let table = &tables[at];
                        *name == table.name || *name == format!("{}.{}", table.schema, table.name)
                    })
                    .collect();
                match matching[..] {
                    [only] => found.insert(only),
                    [] => return Err(VerifyError::NoSuchTable(name.clone())),
                    _ => return Err(VerifyError::Ambiguous(name.clone())),
                };
            }
            Ok(found.into_iter().map(|at| tables[at].clone()).collect())
        }
    }
}
