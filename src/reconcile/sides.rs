//! The two sides of one database, as whatever works on existing rows is given them.

use std::sync::Arc;

use crate::apply::Applier;
use crate::config::Target;
use crate::control::Epoch;

/// The two sides as they are now, and who brings one to the other.
#[derive(Clone)]
pub struct Sides {
    pub database: String,
    pub primary: Target,
    pub secondary: Target,
    pub epoch: Epoch,
    pub applier: Arc<Applier>,
}
