//! Existing rows, copied while applications write.
//!
//! ```text
//! desk.rs   starts, changes, cancels, tells        ledger.rs what the secondary records
//! job.rs    step by step until all is in           pace.rs   how much, and when to wait
//! parts.rs  at each cut: ranges → workers          plan.rs   a table's columns, key, statements
//! table.rs  one table on its way                   copy.rs   one worker: a range in one transaction
//! progress.rs  how far it is                       stop.rs   why it ends
//! ```
//!
//! Why it is exact. A table is emptied on the secondary at a cut; from there on what the
//! secondary has of it is a part of what the primary has, since each round leaves every row that
//! it touches as the primary has it, and removes those that are gone. At a later cut a range is
//! read in the round's snapshot and replaces what the secondary has of that range: still a part
//! of what the primary has, and all of the range. Rounds keep both true. So when all ranges are
//! in, the table is equal, and stays so; and since at every moment all rows are of one cut, no
//! constraint that holds on the primary can be violated on the way.
//!
//! The job runs in the proxy that applies: only there a cut can be held. What it has done is
//! recorded with the rows, so whoever starts it again goes on from there.

mod copy;
mod desk;
mod job;
mod ledger;
mod pace;
mod parts;
mod plan;
mod progress;
mod status;
mod stop;
mod table;

pub use desk::{Desk, Order};
pub use job::{Hook, InsertAt, OpenRanges};
pub use status::{BackfillStatus, BackfillTable, Counts};
