//! What the shadow reads need of the applier. The app implements it over [`crate::apply`]'s
//! `catch_up` and `cut`, for whichever direction is mirrored at the moment; tests fake it.

use std::pin::Pin;

/// Rounds and cuts of one database.
pub trait Cuts: Send + Sync + 'static {
    /// Returns the round's number when a round that began after this call has been applied.
    fn round_after_now(&self) -> CutsFuture<'_, u64>;

    /// Pauses the applier at the end of a round.
    fn hold_cut(&self) -> CutsFuture<'_, HeldCut>;

    /// Whether the secondary's database may still have to be created by a round.
    fn is_awaited(&self) -> bool {
        false
    }
}

pub type CutsFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, NoCut>> + Send + 'a>>;

/// No round will come soon: the applier is stopped, failing or running elsewhere.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no cut is to be had: {0}")]
pub struct NoCut(pub String);

/// The applier is held at a cut until this is dropped.
pub struct HeldCut {
    pub round: u64,
    /// An exported snapshot of the primary, as SET TRANSACTION SNAPSHOT takes it.
    pub primary_snapshot: String,
    _hold: Box<dyn Send>,
}

impl HeldCut {
    /// `hold` releases the applier when dropped.
    pub fn new(round: u64, primary_snapshot: String, hold: impl Send + 'static) -> Self {
        Self {
            round,
            primary_snapshot,
            _hold: Box::new(hold),
        }
    }
}
