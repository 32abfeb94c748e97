//! Changing the phase, and the flip of the primary.
//!
//! [`plan()`], [`recover()`], [`gates()`] and [`machine`] decide, purely. What they decide is
//! carried out by a [`lead`]er, the proxy that was told to flip, and by every proxy's
//! [`Participant`], over the databases' [`Tandem`]s; what they tell each other is [`records`] in
//! both databases. Sessions and appliers see the outcome where the app publishes it.

mod coordinator;
mod crossing;
#[cfg(test)]
mod explore;
mod gates;
mod holding;
pub mod machine;
mod participant;
mod plan;
mod probe;
pub mod records;
mod recover;
mod report;
mod resolve;
mod servers;
mod sessions;
mod tandem;
pub mod told;

pub use coordinator::{Abandoned, Order, lead};
pub use gates::{Measured, OfProxy, gates, in_the_way};
pub use machine::{Kind, Step};
pub use participant::{Host, Participant, Sight};
pub use plan::{Plan, Refusal, plan};
pub use recover::{Beginning, CannotBegin, Observed, Recorded, recover};
pub use resolve::{seat, settle_database, take_over};
pub use sessions::Survey;
pub use tandem::Tandem;
