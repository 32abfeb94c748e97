//! What a verification says: the documents of the report file, of the admin API and of `--json`,
//! and the events by which it tells how far it is.
//!
//! The report file is a [`VerificationReport`] as JSON. [`VERSION`] grows when a field changes
//! its meaning; fields may be added without. Times are RFC 3339 (UTC), durations carry their unit
//! in the name, digests are decimal numbers as text (they exceed 64 bits).

use serde::{Deserialize, Serialize};

use super::key::{Boundary, KeyRange};
use crate::control::{Epoch, Side};

pub const FORMAT: &str = "pgtandem verification";
pub const VERSION: u32 = 1;

/// The file that an auditor keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerificationReport {
    /// [`FORMAT`]
    pub format: String,
    /// [`VERSION`]
    pub version: u32,
    /// The proxy's version.
    pub pgtandem: String,
    /// Whether every table and every sequence that was to be compared was found equal.
    pub equal: bool,
    pub databases: Vec<DatabaseReport>,
}

impl VerificationReport {
    pub fn of(databases: Vec<DatabaseReport>) -> Self {
        Self {
            format: FORMAT.into(),
            version: VERSION,
            pgtandem: env!("CARGO_PKG_VERSION").into(),
            equal: databases.iter().all(|database| database.equal),
            databases,
        }
    }
}

/// One database's tables and sequences.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DatabaseReport {
    pub database: String,
    pub equal: bool,
    pub began: String,
    pub ended: String,
    pub epoch: Epoch,
    pub primary: ServerReport,
    pub secondary: ServerReport,
    /// How rows were hashed, in words.
    pub method: String,
    /// The cuts at which ranges were read; a range names one by its round.
    pub cuts: Vec<CutReport>,
    pub tables: Vec<TableReport>,
    pub sequences: Vec<SequenceReport>,
    /// What is not mirrored and so was not compared.
    pub not_mirrored: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerReport {
    pub side: Side,
    pub address: String,
    pub server_version: String,
    pub encoding: String,
}

/// A cut: both snapshots show the same committed transactions of the primary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CutReport {
    pub round: u64,
    pub at: String,
    /// As `pg_current_snapshot()` writes them.
    pub primary_snapshot: String,
    pub secondary_snapshot: String,
    /// The end of the primary's log when its snapshot was taken.
    pub position: String,
    /// How long the applier was held for it.
    pub held_ms: f64,
    /// How old its snapshots were when they were let go.
    pub age_ms: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TableResult {
    Equal,
    Different,
    NotCompared,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableReport {
    pub schema: String,
    pub name: String,
    pub result: TableResult,
    /// Why it was not compared; or what else is to know.
    pub note: Option<String>,
    /// In the order of the digest's text.
    pub columns: Vec<String>,
    /// By which it was walked; empty: read in one piece.
    pub key: Vec<String>,
    /// Of the primary.
    pub rows: u64,
    /// The table's size on the primary, without indexes.
    pub bytes: u64,
    pub ranges: u64,
    pub digest: TableDigest,
    pub differing: Differing,
    /// The first differing rows.
    pub differing_rows: Vec<DifferingRow>,
    /// Every range with its digest and its cut, ascending by key.
    pub parts: Vec<RangeReport>,
    pub duration_ms: f64,
    pub rows_per_second: f64,
    /// First and last round at whose cuts it was read.
    pub rounds: Option<(u64, u64)>,
    /// It was `unseeded` and is `synced` from here on.
    pub now_synced: bool,
    /// The statements by which psql gives `rows digest`, on either side.
    pub psql: String,
}

impl TableReport {
    pub fn qualified(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

/// The sums of the rows' hashes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableDigest {
    pub primary: String,
    pub secondary: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RangeReport {
    #[serde(flatten)]
    pub range: KeyRange,
    pub round: u64,
    pub rows: u64,
    pub digest: String,
    pub equal: bool,
}

/// How many rows differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differing {
    /// Only on the primary.
    pub missing: u64,
    /// Only on the secondary.
    pub extra: u64,
    /// On both, with other values.
    pub different: u64,
}

impl Differing {
    pub const fn total(self) -> u64 {
        self.missing + self.extra + self.different
    }

    pub fn count(&mut self, kind: DifferenceKind) {
        *match kind {
            DifferenceKind::Missing => &mut self.missing,
            DifferenceKind::Extra => &mut self.extra,
            DifferenceKind::Different => &mut self.different,
        } += 1;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DifferenceKind {
    Missing,
    Extra,
    Different,
}

/// One row that is not the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DifferingRow {
    pub kind: DifferenceKind,
    /// Absent in a table without a key.
    pub key: Option<Boundary>,
    /// The row on each side: its hash in hex, or with `--values plain` its text.
    pub primary: Option<String>,
    pub secondary: Option<String>,
    /// The whole row, by which one without a key is mended. Never leaves the process.
    #[serde(skip)]
    pub image: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceReport {
    pub schema: String,
    pub name: String,
    pub equal: bool,
    /// Behind: the secondary would give out a value again that the primary has given out.
    pub behind: bool,
    /// `last_value`, and whether it was given out.
    pub primary: Option<(i64, bool)>,
    pub secondary: Option<(i64, bool)>,
}

/// How far a verification or a repair is. One JSON line each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Begun {
        database: String,
        tables: u64,
        ranges: u64,
    },
    Progress {
        database: String,
        table: String,
        /// Of this table.
        ranges_done: u64,
        ranges: u64,
        /// Of all tables, on the primary.
        rows: u64,
    },
    Table {
        database: String,
        table: Box<TableReport>,
    },
    /// Rows that were mended at one cut.
    Mended {
        database: String,
        table: String,
        round: u64,
        deleted: u64,
        inserted: u64,
    },
    /// A database is done.
    Done {
        report: Box<DatabaseReport>,
    },
    /// What was asked cannot be done, or not to the end; the last event.
    Failed {
        database: String,
        error: String,
    },
}
