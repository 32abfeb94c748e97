//! Why a job ends, or cannot go on for now.

use super::copy::NotCopied;
use crate::upstream::control::{ConnectError, error_chain};

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    Done,
    Cancelled,
    /// With the reason; recorded as such.
    Stopped(String),
    /// Not recorded: somebody else applies now, or nobody. It can go on.
    Interrupted(String),
}

/// Why a job cannot go on.
pub(super) enum Stop {
    Ended(Ended),
    /// May pass.
    Failing(String),
    /// Will pass: somebody has a lock. It is waited for without being in anybody's way.
    Busy(String),
}

impl From<tokio_postgres::Error> for Stop {
    fn from(error: tokio_postgres::Error) -> Self {
        match NotCopied::of("copy rows", &error) {
            NotCopied::Busy(why) => Self::Busy(why),
            _ => Self::Failing(error_chain(&error)),
        }
    }
}

impl From<ConnectError> for Stop {
    fn from(error: ConnectError) -> Self {
        Self::Failing(error.to_string())
    }
}

impl From<NotCopied> for Stop {
    fn from(error: NotCopied) -> Self {
        match error {
            NotCopied::TooMany(why) | NotCopied::Never(why) => Self::Ended(Ended::Stopped(why)),
            NotCopied::Failing(why) => Self::Failing(why),
            NotCopied::Busy(why) => Self::Busy(why),
            NotCopied::Moved | NotCopied::Reshaped | NotCopied::Turned { .. } => {
                Self::Failing("the secondary is not where it was".into())
            }
        }
    }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ended(Ended::Stopped(why) | Ended::Interrupted(why)) | Self::Failing(why) | Self::Busy(why) => {
                f.write_str(why)
            }
            Self::Ended(Ended::Done | Ended::Cancelled) => f.write_str("ended"),
        }
    }
}
