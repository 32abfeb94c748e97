//! Changing the phase, and the flip of the primary.
//!
//! [`plan`] and [`recover`] decide, purely; the procedure carries it out. It is the only writer
//! of [`crate::control::Control`]; sessions and the applier see its outcome there.

mod plan;
mod recover;

pub use plan::{Plan, Refusal, plan};
pub use recover::{Beginning, CannotBegin, Observed, Recorded, recover};
