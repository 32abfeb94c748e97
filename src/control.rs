//! Where the migration stands: the words that every layer shares.
//!
//! The switchover writes one [`Control`] into a watch; sessions, the applier and the shadow
//! reads look at it and never talk to the switchover otherwise. No I/O lives here.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One of the two databases of a pair. These names never move; roles do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Legacy,
    New,
}

impl Side {
    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::Legacy => Self::New,
            Self::New => Self::Legacy,
        }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::New => "new",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Side {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "legacy" => Ok(Self::Legacy),
            "new" => Ok(Self::New),
            other => Err(format!("unknown side \"{other}\", expected legacy or new")),
        }
    }
}

/// Where the migration stands. `phase:` in proxy.yaml is the operator's wish for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Initial,
    DualWrite,
    DualRead,
    Switchover,
    Complete,
}

impl Phase {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Initial => "initial",
            Self::DualWrite => "dual_write",
            Self::DualRead => "dual_read",
            Self::Switchover => "switchover",
            Self::Complete => "complete",
        }
    }

    /// The side that answers clients in this phase.
    pub const fn primary(self) -> Side {
        match self {
            Self::Initial | Self::DualWrite | Self::DualRead => Side::Legacy,
            Self::Switchover | Self::Complete => Side::New,
        }
    }

    /// Whether the primary's writes are captured and applied to the secondary.
    pub const fn mirrors(self) -> bool {
        match self {
            Self::DualWrite | Self::DualRead | Self::Switchover => true,
            Self::Initial | Self::Complete => false,
        }
    }

    /// Whether a share of the reads is repeated on the secondary.
    pub const fn shadows(self) -> bool {
        match self {
            Self::DualRead | Self::Switchover => true,
            Self::Initial | Self::DualWrite | Self::Complete => false,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A number that grows with every flip; every proxy and both databases agree on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    pub const FIRST: Self = Self(1);

    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// Of the flip before.
    pub const fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a transaction needs to know of the migration; it lives in exactly one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    pub phase: Phase,
    pub primary: Side,
    pub epoch: Epoch,
}

impl Control {
    pub const fn secondary(self) -> Side {
        self.primary.other()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phase_table_of_the_design() {
        use Phase::{Complete, DualRead, DualWrite, Initial, Switchover};
        for (phase, primary, mirrors, shadows) in [
            (Initial, Side::Legacy, false, false),
            (DualWrite, Side::Legacy, true, false),
            (DualRead, Side::Legacy, true, true),
            (Switchover, Side::New, true, true),
            (Complete, Side::New, false, false),
        ] {
            assert_eq!(phase.primary(), primary, "{phase}");
            assert_eq!(phase.mirrors(), mirrors, "{phase}");
            assert_eq!(phase.shadows(), shadows, "{phase}");
        }
    }
}
