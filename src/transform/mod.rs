//! Schemas that differ: how legacy's rows look as new's, and the other way round.
//!
//! The mapping of proxy.yaml ([`Transform`]) and both catalogs ([`facts`]) give, by pure functions
//! ([`plan`]), a [`Face`] for each table and direction: a select list over one side's table that
//! gives a row as the other side has it. Everything else follows from that list. [`install`] puts it
//! on the side it reads from, as a view in schema `pgtandem` (a backfill, a verification and a repair
//! read that view where they would read the table) and as a function that does the same to an image.
//! The view's OID stands for the other side's table from there on: images leave the journal mapped,
//! under that OID, so the net difference, the quarantine and the writing know nothing of mappings.
//!
//! Why that is exact. One server evaluates every expression, the one that has the row, over one row
//! and with immutable functions only ([`check`] refuses others): so an old image is mapped to the
//! very row that its new image was mapped to before. The rows of the other side are the mapped rows
//! of this one, as multisets, and a mapped multiset less mapped old images plus mapped new ones is
//! the mapped new multiset. What an expression cannot compute (a division by zero) is no image; the
//! secondary refuses it, and its transaction goes into quarantine like any other.
//!
//! A split table's way back is a face over several tables: legacy's row is the [`join`] of its parts'.

pub mod check;
pub mod facts;
pub mod hidden;
pub mod install;
pub mod join;
pub mod plan;
pub mod sequences;

pub use plan::{Face, Fault, Plan, plan};

pub use crate::config::{Missing, Name, Origin, Part, TableMap, Transform};
