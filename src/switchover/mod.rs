//! Changing the phase, and the flip of the primary.
//!
//! [`plan()`], [`recover()`] and [`gates()`] decide, purely; [`Flip`] carries a flip out over the
//! databases' [`Tandem`]s. The app calls it and publishes the outcome; sessions and appliers see
//! it there.

mod gates;
mod plan;
mod procedure;
mod recover;
mod tandem;

pub use gates::gates;
pub use plan::{Plan, Refusal, plan};
pub use procedure::{Abandoned, Flip, Flipped};
pub use recover::{Beginning, CannotBegin, Observed, Recorded, recover};
pub use tandem::{Drained, Fenced, Tandem};
