//! What the applier says of itself. Written by its task only, through a watch.

use serde::Serialize;
use tokio::time::Instant;

use super::quarantine::QuarantineStatus;
use crate::control::{Epoch, Side};

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ApplierState {
    /// No connection to one of the sides; says why.
    Connecting {
        error: Option<String>,
    },
    /// Another proxy holds the lease.
    Waiting,
    Running,
    /// Connected, but rounds fail; retried with growing pauses. Nothing is lost.
    Failing {
        error: String,
    },
    /// Too much was refused (`writes.error_threshold`): stands still until an operator says to go
    /// on. Nothing is lost.
    Halted {
        error: String,
    },
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Seeding {
    Unseeded,
    Seeding,
    Synced,
}

impl Seeding {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unseeded => "unseeded",
            Self::Seeding => "seeding",
            Self::Synced => "synced",
        }
    }

    pub(super) fn parse(text: &str) -> Self {
        match text {
            "synced" => Self::Synced,
            "seeding" => Self::Seeding,
            _ => Self::Unseeded,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableStatus {
    pub schema: String,
    pub name: String,
    pub seeding: Seeding,
    /// Why the table's changes are not applied; it needs seeding afterwards.
    pub paused: Option<String>,
    /// Why a table that was synced no longer is.
    pub note: Option<String>,
    /// Old images that were not found as they should be, and rows found where none should be.
    pub diverged: u64,
    /// When a verification last found both sides equal.
    pub verified: Option<Verified>,
}

/// The cut at which a table was last proved equal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Verified {
    /// RFC 3339, UTC.
    pub at: String,
    pub round: u64,
    /// The end of the primary's log there.
    pub position: String,
}

/// A table or other object whose contents are not mirrored, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotMirrored {
    pub what: String,
    pub reason: String,
}

/// How far the secondary is behind.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Lag {
    /// Transaction ids given out on the primary since the watermark, read-only ones excepted:
    /// an upper bound of the transactions to apply. 0 when caught up.
    pub transactions: u64,
    /// Bytes of log between the watermark and the primary's end. 0 when caught up.
    pub bytes: u64,
    /// Since the secondary last equalled the primary.
    pub seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WatermarkStatus {
    pub snapshot: String,
    pub position: String,
    /// A long backlog is being applied in pieces.
    pub in_pieces: bool,
}

/// Why a table is no longer synced after the journal was full under `stop_mirroring`.
pub(super) const MIRRORING_STOPPED: &str = "mirroring was stopped: the journal was full";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct JournalStatus {
    pub bytes: u64,
    /// Writes on the primary are refused until it has drained.
    pub full: bool,
    /// Capture is off: the secondary must be seeded again.
    pub stopped: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ApplierStatus {
    #[serde(flatten)]
    pub state: ApplierState,
    /// The proxy that holds the lease, this one or another: `pid 4711 on host`.
    pub applier: Option<String>,
    pub primary: Side,
    pub epoch: Epoch,
    pub round: u64,
    pub watermark: Option<WatermarkStatus>,
    pub lag: Lag,
    pub journal: JournalStatus,
    pub tables: Vec<TableStatus>,
    pub not_mirrored: Vec<NotMirrored>,
    /// SQL that a DBA must run, because the proxy's role may not.
    pub sql_for_dba: Vec<String>,
    /// What the two sides define otherwise, by DDL that nobody saw.
    pub different: Vec<String>,
    /// Tables whose rows have no way back to the primary's shape, and why.
    pub one_way: Vec<String>,
    pub sequences: usize,
    pub sequence_errors: Vec<String>,
    /// Writes of stray writers that the secondary recorded (`stray_writers: report`).
    pub strays: u64,
    pub changes_applied: u64,
    pub transactions_applied: u64,
    pub diverged: u64,
    pub quarantine: QuarantineStatus,
    /// When the secondary last equalled the primary, for `lag.seconds`.
    #[serde(skip)]
    pub caught_up_at: Option<Instant>,
    /// While another proxy applies: something waits in the journal beyond its watermark.
    #[serde(skip)]
    pub(super) behind: bool,
}

impl ApplierStatus {
    pub(super) const fn new(primary: Side, epoch: Epoch) -> Self {
        Self {
            state: ApplierState::Connecting { error: None },
            applier: None,
            primary,
            epoch,
            round: 0,
            watermark: None,
            lag: Lag {
                transactions: 0,
                bytes: 0,
                seconds: 0.0,
            },
            journal: JournalStatus {
                bytes: 0,
                full: false,
                stopped: false,
            },
            tables: Vec::new(),
            not_mirrored: Vec::new(),
            sql_for_dba: Vec::new(),
            different: Vec::new(),
            one_way: Vec::new(),
            sequences: 0,
            sequence_errors: Vec::new(),
            strays: 0,
            changes_applied: 0,
            transactions_applied: 0,
            diverged: 0,
            quarantine: QuarantineStatus {
                transactions: 0,
                refused: 0,
                changes: 0,
                oldest: None,
                oldest_seconds: 0,
                error: None,
            },
            caught_up_at: None,
            behind: false,
        }
    }

    /// Tables that are neither synced nor on their way there by themselves.
    pub fn tables_to_seed(&self) -> usize {
        self.tables_now()
            .iter()
            .filter(|table| table.seeding != Seeding::Synced || table.paused.is_some())
            .count()
    }

    /// `lag` with its seconds as of now, also while nothing is published.
    pub fn lag_now(&self) -> Lag {
        let mut lag = self.lag;
        let none = match self.state {
            ApplierState::Running => lag.transactions == 0,
            ApplierState::Waiting => !self.behind,
            _ => false,
        };
        if let (false, Some(at)) = (none, self.caught_up_at) {
            lag.seconds = at.elapsed().as_secs_f64();
        }
        lag
    }

    /// The tables as they stand now: once capture is off, nothing is known to be equal any more,
    /// whatever the secondary (which may be away) has recorded.
    pub fn tables_now(&self) -> Vec<TableStatus> {
        let mut tables = self.tables.clone();
        if self.journal.stopped {
            for table in &mut tables {
                table.seeding = Seeding::Unseeded;
                table.note.get_or_insert_with(|| MIRRORING_STOPPED.into());
            }
        }
        tables
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_as_json() {
        let mut status = ApplierStatus::new(Side::Legacy, Epoch::FIRST);
        status.state = ApplierState::Failing { error: "no".into() };
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(
            (json["state"].as_str(), json["error"].as_str()),
            (Some("failing"), Some("no"))
        );
        assert_eq!(
            (json["primary"].as_str(), json["epoch"].as_u64()),
            (Some("legacy"), Some(1))
        );
        assert_eq!(status.tables_to_seed(), 0);
    }
}
