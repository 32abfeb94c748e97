//! A database that a client has just created through the proxy: it is on the primary, and comes to
//! the secondary with a round of the database that it was created in. Until then its absence there
//! is nothing to be alarmed by.

use std::fmt;
use std::sync::Arc;

/// Tells whether the secondary's database may still be on its way.
#[derive(Clone, Default)]
pub struct Awaited(Option<Arc<dyn Fn() -> bool + Send + Sync>>);

impl Awaited {
    /// As long as `may_come` says so.
    pub fn as_long_as(may_come: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(may_come)))
    }

    pub fn is(&self) -> bool {
        self.0.as_ref().is_some_and(|may_come| may_come())
    }
}

impl fmt::Debug for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Awaited").field(&self.is()).finish()
    }
}
